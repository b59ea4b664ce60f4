"""Trains one model on ranks that Ray Train starts: on a cluster, or on this machine, and again where one is lost.

Ray's ``TorchTrainer`` starts a process a rank and PyTorch's process group among them; each calls the same function as a
rank of torchrun does. Where a process or a machine dies, Ray ends the others and starts all again, and the run goes on
from its last checkpoint, so the machines have to share the run folder. It is imported only when it is asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffattn.errors import ConfigError, DiffattnError, TrainingError, error_from_json, error_to_json, one_line
from diffattn.files import PARTIAL, PROBE, writable_folder
from diffattn.folders import RUN, own_folder
from diffattn.progress import OnStage, Stage
from diffattn.train.callbacks import Interruption, Progress, quiet
from diffattn.train.lock import InUseError, held
from diffattn.train.recipe import Recipe
from diffattn.train.record import TrainResult
from diffattn.train.run import check_new
from diffattn.train.spread.layout import Layout
from diffattn.train.spread.ranks import EndedError, LostError, joined
from diffattn.train.spread.ray_cluster import cluster, mailbox, taken, variables

RESTARTS = 3
"""The number of times that all ranks are started again where one is lost."""
# Between two looks at what the ranks say; and for the ranks of a call that was stopped, to end.
_PAUSE, _PATIENCE = 0.3, 60.0
# Ray Train's own: no page of metrics, and the working directory stays.
_SETTINGS = {"RAY_TRAIN_V2_ENABLED": "1", "RAY_TRAIN_METRICS_ENABLED": "0", "RAY_CHDIR_TO_TRIAL_DIR": "0",
             "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
             # A rank imports PyTorch before it is ready, and the machine may be busy with something else.
             "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600"}  # fmt: skip


def train_on_ray(
    call: Callable[..., TrainResult],
    recipe: Recipe,
    out: str | Path,
    *,
    layout: Layout | None = None,
    ranks: int | None = None,
    resume: bool = False,
    on_progress: Callable[[Progress], None] = lambda step: None,
    on_stage: OnStage = lambda stage: None,
    on_note: Callable[[str], None] = lambda line: None,
) -> TrainResult:
    """Calls a function that trains on every rank, until it has ended on all.

    Args:
        call: ``train_shape``, ``continue_training`` or ``resume_training`` with all arguments but ``resume`` and the
            callbacks, by :func:`functools.partial`.
        recipe, layout: those of the call.
        out: the run folder of the call, which all machines share.
        ranks: the number of processes. Default: all GPUs of the cluster, or else as many as it has threads and the
            batch can be shared out to.
        resume: whether the run is to go on from what is in its folder.
        on_progress, on_stage, on_note: called with what rank 0 reports.

    Raises:
        ConfigError, DataError: what the call raises, and ranks that the cluster has no room for.
        UnsupportedError: Ray is not installed, or not reached.
        TrainingError: what the call raises, or ranks that were lost too often.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the run goes on from its last checkpoint the next time.
    """
    layout, folder = layout or Layout(), own_folder(out, RUN)
    check_new(folder, resume)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    on_stage(Stage("reaching Ray"))
    with cluster(on_note) as ray, contextlib.ExitStack() as left:
        places = _places(ray, recipe, layout, ranks)
        layout.check(places.ranks, recipe.batch_size)
        left.callback(_remove_empty, made)
        # Somebody else trains there now, or nobody does; later it can only be a rank of ours that has not ended yet.
        with held(writable_folder(folder)):
            pass
        # Ray Train wants a folder that all machines see, and makes sure there that they do.
        storage = folder.absolute() / f"{PROBE}ray{PARTIAL}"
        left.callback(shutil.rmtree, storage, ignore_errors=True)
        box = mailbox(ray)
        job = {"call": call, "resume": resume, "folder": folder.absolute(), "cwd": os.getcwd(), "box": box,
               "threads": places.threads}  # fmt: skip
        on_stage(Stage(f"starting {places.ranks} ranks on Ray"))
        settings = {"env_vars": {**variables(places.threads), **_SETTINGS}}
        fit = ray.remote(_fit).options(num_cpus=0, max_retries=0, runtime_env=settings)
        running = fit.remote(job, places, str(storage), settings)
        try:
            with Interruption():
                return _listen(ray, running, box, folder, on_progress, on_stage, on_note)
        finally:
            _end(ray, running)
            _await_end(folder)


@dataclass(frozen=True)
class _Places:
    """The processes that Ray Train is to start."""

    ranks: int
    threads: int
    gpus: bool


def _places(ray: Any, recipe: Recipe, layout: Layout, asked: int | None) -> _Places:
    """Returns the number of ranks and the threads of each, for which the cluster has room."""
    total = ray.cluster_resources()
    gpus = recipe.device != "cpu" and total.get("GPU", 0) >= 1
    room, kind = int(total.get("GPU" if gpus else "CPU", 0)), "GPUs" if gpus else "threads"
    if asked is not None and not 1 <= asked <= room:
        raise ConfigError(
            f"--ranks {asked} on a cluster with {room} {kind}", f"1 to {room}", "leave --ranks out for all"
        )
    tensor = layout.tensor_parallel
    shared = [count for count in range(tensor, room + 1, tensor) if not recipe.batch_size % (count // tensor)]
    count = asked or (room if gpus else max(shared, default=1))
    machines = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    threads = max(1, int(sum(machines)) // count)
    while threads > 1 and sum(machine // threads for machine in machines) < count:
        threads -= 1
    return _Places(count, threads, gpus)


def _listen(
    ray: Any,
    running: Any,
    box: Any,
    folder: Path,
    on_progress: Callable[[Progress], None],
    on_stage: OnStage,
    on_note: Callable[[str], None],
) -> TrainResult:
    """Passes on what rank 0 says until Ray Train has ended; returns the result."""
    starts, ended = 0, False
    result: TrainResult | None = None
    while not ended:
        ended = bool(ray.wait([running], timeout=_PAUSE)[0])
        # Behind the end too: what was said last.
        said = taken(ray, box)
        if "error" in said:
            raise error_from_json(said["error"])
        if "start" in said:
            starts += 1
            if starts > 1:
                on_note(f"a rank was lost; all go on from the last checkpoint (restart {starts - 1} of {RESTARTS})")
        for name, message in said.items():
            if name.startswith("note"):
                on_note(message)
        if "stage" in said:
            on_stage(Stage(**said["stage"]))
        if "progress" in said:
            on_progress(Progress(**said["progress"]))
        if "result" in said:
            result = TrainResult(folder, **said["result"])
    try:
        ray.get(running)
    except ray.exceptions.RayError as error:
        # Ray puts tracebacks and addresses before the error itself.
        why = str(getattr(error, "cause", None) or error).strip().splitlines()[-1:]
        raise TrainingError(
            f"Ray Train gave up ({one_line(' '.join(why), 300)})", f"ranks that live, or {RESTARTS} restarts that do",
            "go on from the last checkpoint with --resume",
        ) from None  # fmt: skip
    assert result is not None
    return result


def _end(ray: Any, running: Any) -> None:
    """Ends Ray Train as Ctrl-C would, so that it ends the ranks and gives their places in the cluster back."""
    ended = ray.wait([running], timeout=0)[0]
    with contextlib.suppress(KeyboardInterrupt):
        if not ended:
            ray.cancel(running, recursive=False)
            ended = ray.wait([running], timeout=_PATIENCE)[0]
    if not ended:
        ray.cancel(running, force=True)


def _await_end(folder: Path) -> None:
    """Waits until rank 0 has let go of the run folder, so that the next command finds it free."""
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        try:
            with held(folder):
                return
        except InUseError:
            time.sleep(_PAUSE)


def _remove_empty(made: list[Path]) -> None:
    for path in made:
        with contextlib.suppress(OSError):
            path.rmdir()


def _fit(job: Mapping[str, Any], places: _Places, storage: str, settings: Mapping[str, Any]) -> None:
    """Starts the ranks and waits for them, in a process of the cluster that the caller can end with all of them."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    TorchTrainer(
        rank_on_ray,
        train_loop_config=dict(job),
        # What the ranks tell each other beside the gradients is on the processor.
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if places.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=places.ranks,
            use_gpu=places.gpus,
            resources_per_worker={"CPU": places.threads, "GPU": int(places.gpus)},
        ),
        run_config=RunConfig(
            name="ranks",
            storage_path=storage,
            failure_config=FailureConfig(max_failures=RESTARTS),
            worker_runtime_env=dict(settings),
        ),
    ).fit()


def rank_on_ray(job: Mapping[str, Any]) -> None:
    """Trains as one rank of those that Ray Train has started; rank 0 says how it goes."""
    import ray

    quiet()
    torch.set_num_threads(job["threads"])
    # Names of files are those of the caller where the machines share them.
    with contextlib.suppress(OSError):
        os.chdir(job["cwd"])
    box, notes = job["box"], itertools.count()
    try:
        with joined() as ranks:
            call = job["call"]
            if not job["resume"]:
                # The caller found no run there, so it is this one, which a rank that was lost began.
                begun = ranks.share(lambda: (job["folder"] / "config.json").exists())
                call = functools.partial(call, resume=begun)
            if ranks.is_first:
                ray.get(box.put.remote("start", True))
                call = functools.partial(
                    call,
                    on_progress=lambda step: box.put.remote("progress", dataclasses.asdict(step)),
                    on_stage=lambda stage: box.put.remote("stage", dataclasses.asdict(stage)),
                    on_note=lambda line: box.put.remote(f"note {next(notes)}", line),
                )
            result = call()
            if ranks.is_first:
                ray.get(box.put.remote("result", result.numbers()))
    except (EndedError, InUseError, LostError):
        # Another rank has an error, of which it tells itself; or one was lost, and Ray starts all again.
        raise
    except DiffattnError as error:
        ray.get(box.put.remote("error", error_to_json(error)))
        raise
