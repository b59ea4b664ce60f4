"""Starts TensorBoard, trackio and W&B for a run, each with its files in the run folder and without a question."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback

from diffattn.errors import one_line
from diffattn.files import command
from diffattn.train.callbacks import MetricsRow

PROJECT = "diffattn"
"""The project in which trackers list the runs, unless ``WANDB_PROJECT`` names another."""
# Without them W&B waits longer for a server that does not answer, at the start, and for ever at the end.
_INIT_SECONDS, _FINISH_SECONDS = 30.0, 30.0
SHOWN = 120
"""The letters that are shown of another program's message, which may be of any length."""


def run_name(folder: Path) -> str:
    """Returns the name of a run in its trackers: the last two parts of its folder.

    >>> run_name(Path("/home/me/runs/first"))
    'runs-first'
    """
    return "-".join(part for part in folder.absolute().parts[-2:] if part != os.sep)


def _start_tensorboard(folder: Path, kept: Sequence[MetricsRow]) -> tuple[TrainerCallback, str]:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    # Steps behind the checkpoint that a run goes on from are made again; TensorBoard forgets what it had of them.
    purge = {"purge_step": kept[-1]["step"] + 1} if kept else {}
    writer = SummaryWriter(str(folder / "tensorboard"), **purge)
    return TensorBoardCallback(writer), command(["tensorboard", "--logdir", str(folder)])


def _start_trackio(folder: Path, kept: Sequence[MetricsRow]) -> tuple[TrainerCallback, str]:
    with _trackio_folder(folder):
        import trackio
        from transformers.integrations import TrackioCallback

    where = command(["trackio", "show", "--project", PROJECT])
    return TrackioCallback(), f"TRACKIO_DIR={command([str(trackio.TRACKIO_DIR)])} {where}"


@contextlib.contextmanager
def _trackio_folder(folder: Path) -> Iterator[None]:
    """Lets trackio, which reads its folder as it is imported and never again, take one in the run folder."""
    if os.environ.get("TRACKIO_DIR"):
        yield
        return
    os.environ["TRACKIO_DIR"] = str((folder / "trackio").absolute())
    try:
        yield
    finally:
        del os.environ["TRACKIO_DIR"]


def _start_wandb(folder: Path, kept: Sequence[MetricsRow]) -> tuple[TrainerCallback, str]:
    import wandb
    from transformers.integrations import WandbCallback

    mode = os.environ.get("WANDB_MODE") or wandb.setup().settings.mode
    if mode == "disabled":
        return WandbCallback(), "WANDB_MODE is disabled, so nothing is kept"
    # A run goes on under the id that its files have: run-TIME-ID, or run-TIME-ID-1 for the second in a second.
    runs = sorted(path.name.partition("run-")[2] for path in folder.glob("wandb/*run-*-*"))
    its_id = runs[-1].split("-")[1] if runs else None
    reason = mode
    if mode == "online":
        try:
            if wandb.login(prompt=False, verify=False):
                return WandbCallback(), str(_wandb_run(folder, "online", its_id).url)
            reason = "nobody is logged in, which wandb login does"
        except Exception as error:
            reason = one_line(error, SHOWN)
            wandb.teardown()
    kept_in = Path(_wandb_run(folder, "offline", its_id).dir).parent
    return WandbCallback(), f"{reason}; send them later with {command(['wandb', 'sync', str(kept_in)])}"


def _wandb_run(folder: Path, mode: Literal["online", "offline"], its_id: str | None) -> Any:
    import wandb

    return wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=run_name(folder),
        dir=os.environ.get("WANDB_DIR", str(folder)),
        mode=mode,
        id=its_id,
        resume="allow",
        settings=wandb.Settings(
            silent=True,
            console="off",
            init_timeout=_INIT_SECONDS,
            finish_timeout=_FINISH_SECONDS,
        ),
    )


def finish_wandb(failed: bool) -> None:
    """Ends the run of W&B, which its callback leaves to the end of the process."""
    import wandb

    wandb.finish(exit_code=int(failed))


STARTS: dict[str, Callable[[Path, Sequence[MetricsRow]], tuple[TrainerCallback, str]]] = {
    "tensorboard": _start_tensorboard,
    "trackio": _start_trackio,
    "wandb": _start_wandb,
}
"""The functions that start a tracker for a run folder and its rows so far, and return a callback and where to look."""
