"""Reaches a Ray cluster, or starts Ray on this machine for as long as it is needed; imports ray only when it is asked.

Ray's collection of usage data and its web page stay off, and so do its logs: what workers have to say comes as results.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO, cast

from diffattn.errors import ConfigError, UnsupportedError, one_line

# Nothing large passes through Ray's memory: this is near the least that it takes.
_STORE_BYTES = 100 * 2**20
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Today's default, said so that Ray does not warn of another one in future.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    # Its workers would let everything else on the machine go before them.
    "RAY_worker_niceness": "0",
}
"""The variables of Ray that hold wherever diffattn starts it."""


@contextlib.contextmanager
def cluster(on_note: Callable[[str], None]) -> Iterator[Any]:
    """Yields the module ``ray``, connected: to what RAY_ADDRESS names, to a cluster that runs here, or to a new one.

    A new one ends with the block, and nothing of it is left; a connection that exists already stays.

    Raises:
        UnsupportedError: Ray is not installed, or does not answer.
    """
    os.environ.update(SETTINGS)
    try:
        import ray
    except ImportError:
        raise UnsupportedError(
            "--on ray, and Ray is not installed", "the package ray", "pip install 'diffattn[ray]'"
        ) from None
    if ray.is_initialized():
        yield ray
        return
    shown, ended_by = sys.stdout, signal.getsignal(signal.SIGTERM)
    sys.stdout = cast(TextIO, _OfThisThread(shown))
    with contextlib.ExitStack() as left:
        try:
            started = _connect(ray, left)
            total = ray.cluster_resources()
            where = "started on this machine" if started else f"at {ray.get_runtime_context().gcs_address}"
            sizes = [f"{len(ray.nodes())} machines"] * (not started) + [f"{total.get('CPU', 0):g} threads"]
            sizes += [f"{total.get('GPU', 0):g} GPUs"] * ("GPU" in total)
            on_note(f"Ray {ray.__version__} {where}: {', '.join(sizes)}")
            yield ray
        finally:
            # Ray says what it thinks of workers that end before their tasks.
            with contextlib.suppress(Exception):
                ray.shutdown()
            sys.stdout = shown
            # Ray takes SIGTERM for itself.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, ended_by)


class _OfThisThread:
    """Standard output without what threads of Ray print there: dozens of lines for each worker that died."""

    def __init__(self, shown: TextIO) -> None:
        self._shown = shown
        self._thread = threading.get_ident()

    def write(self, text: str) -> int:
        return self._shown.write(text) if threading.get_ident() == self._thread else len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shown, name)


def _connect(ray: Any, left: contextlib.ExitStack) -> bool:
    """Connects; returns whether Ray was started for it, whose folder ``left`` removes then."""
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    address = os.environ.get("RAY_ADDRESS")
    nobody = UnsupportedError(
        f"RAY_ADDRESS is {address!r}, where no Ray answers", "the address of a cluster", "correct it, or unset it"
    )
    if address and not _answers(address):
        raise nobody
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.suppress(ConnectionError):
                ray.init(address=address or "auto", **common)
                return False
            if not address:
                # Ray's directories have long names, and those of sockets may have about 100 characters at most.
                folder = left.enter_context(
                    tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True)
                )
                ray.init(
                    address="local", include_dashboard=False, object_store_memory=_STORE_BYTES, _temp_dir=folder,
                    **common,
                )  # fmt: skip
                return True
    except (RuntimeError, ValueError, OSError) as error:
        given = f"--on ray, and Ray cannot be {'reached' if address else 'started'} ({one_line(error, 200)})"
        raise UnsupportedError(given, "a Ray cluster, or Ray on this machine", "see what ray status says") from None
    raise nobody


def _answers(address: str) -> bool:
    """Returns whether somebody listens at HOST:PORT, for which Ray itself waits for minutes; other words are Ray's."""
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "/" in host:
        return True
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=10):
            return True
    except OSError:
        return False


def resources(ray: Any, threads: int, gpus: float | None, *, wants_gpu: bool) -> Mapping[str, float]:
    """Returns what a task takes, as Ray's ``options`` have it, once a machine of the cluster is known to have as much.

    Args:
        ray: the module, connected.
        threads: the processor threads of the task.
        gpus: its GPUs, or the share of one. Default: one, if the cluster has any.
        wants_gpu: whether the task would use a GPU.

    Raises:
        ConfigError: no machine of the cluster has so much.
    """
    if gpus is None:
        gpus = 1 if wants_gpu and ray.cluster_resources().get("GPU") else 0
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(machine.get("CPU", 0) >= threads and machine.get("GPU", 0) >= gpus for machine in machines):
        largest = max(machine.get("CPU", 0) for machine in machines)
        cards = max(machine.get("GPU", 0) for machine in machines)
        raise ConfigError(
            f"{threads} threads and {gpus:g} GPUs for a task",
            f"what one machine of the cluster has, such as {largest:g} threads and {cards:g} GPUs",
            "ask for fewer",
        )
    return {"num_cpus": threads, "num_gpus": gpus}


def at_once(ray: Any, takes: Mapping[str, Any]) -> int:
    """Returns how many tasks with these resources the cluster runs at once."""
    total, asked = ray.cluster_resources(), {"CPU": takes["num_cpus"], "GPU": takes["num_gpus"]}
    return max(1, min(int(total.get(name, 0) / each) for name, each in asked.items() if each))


def variables(threads: int) -> dict[str, str]:
    """Returns the environment of a task, which has to stand before torch is imported."""
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", **SETTINGS}


class Mailbox:
    """Keeps the latest that each task has said, until the caller takes it: an actor of the cluster."""

    def __init__(self) -> None:
        self._said: dict[str, Any] = {}

    def put(self, name: str, message: Any) -> None:
        """Replaces what a task said before."""
        self._said[name] = message

    def take(self) -> dict[str, Any]:
        """Returns what was said since the last call."""
        said, self._said = self._said, {}
        return said


def taken(ray: Any, box: Any) -> dict[str, Any]:
    """Returns what was put into a mailbox; nothing while its machine is lost and it starts on another one."""
    try:
        said: dict[str, Any] = ray.get(box.take.remote())
    except ray.exceptions.RayError:
        return {}
    return said


def mailbox(ray: Any) -> Any:
    """Starts a mailbox on the machine of the caller, which another machine's end does not reach."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here, max_restarts=-1).remote()
