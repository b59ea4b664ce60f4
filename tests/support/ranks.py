"""Runs a function on several ranks of this machine, each in a process of its own, as torchrun would start them.

The processes are forked from one that has imported torch and the package, so that a rank starts in a fraction of a
second. A function has to lie in a module that they can import, such as one of ``support``.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

_PRELOADED = ["torch", "torch.distributed.fsdp", "torch.distributed.tensor", "transformers", "diffattn.train.single"]


@dataclass(frozen=True)
class Outcome:
    """What a rank did: what its function returned, or the lines of its error; and how its process ended."""

    value: Any = None
    error: str | None = None
    exitcode: int | None = None


def run_ranks(function: Callable[..., Any], count: int, *arguments: Any, seconds: float = 120) -> list[Any]:
    """Calls ``function(*arguments)`` on ``count`` ranks at once and returns what each returned, in order of the ranks.

    The environment of each has ``RANK``, ``LOCAL_RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and so on, and one thread.

    Raises:
        AssertionError: a rank raised or died, or they did not end in time; all are killed then.
    """
    outcomes = outcomes_of_ranks(function, count, *arguments, seconds=seconds)
    failed = [f"rank {rank}: {outcome}" for rank, outcome in enumerate(outcomes) if outcome.exitcode != 0]
    assert not failed, "\n".join(outcome.error or f"exit {outcome.exitcode}" for outcome in outcomes)
    return [outcome.value for outcome in outcomes]


def outcomes_of_ranks(function: Callable[..., Any], count: int, *arguments: Any, seconds: float = 120) -> list[Outcome]:
    """Does as ``run_ranks``, and returns how each rank ended, whatever it was.

    As torchrun does, it ends the other ranks when one fails: SIGTERM first, and SIGKILL 10 seconds later.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    port = free_port()
    pipes, processes = [], []
    for rank in range(count):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(theirs, rank, count, port, function, arguments), daemon=False)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        _await(processes, seconds)
        return [_outcome(pipe, process.exitcode) for pipe, process in zip(pipes, processes, strict=True)]
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def free_port() -> int:
    """Returns a port of this machine on which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _await(processes: list[Any], seconds: float) -> None:
    """Waits until all ranks have ended; ends the others when one has failed, or when the time is over."""
    alive = {process.sentinel: process for process in processes}
    while alive:
        ended = wait(list(alive), timeout=seconds)
        failed = not ended
        for sentinel in ended:
            process = alive.pop(sentinel)  # type: ignore[call-overload]
            process.join()
            failed = failed or process.exitcode != 0
        if failed:
            for number, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
                for process in alive.values():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid, number)
                for process in alive.values():
                    process.join(patience)
                alive = {sentinel: process for sentinel, process in alive.items() if process.is_alive()}
            return


def _outcome(pipe: Connection, exitcode: int | None) -> Outcome:
    value, error = None, None
    with contextlib.suppress(EOFError):
        if pipe.poll():
            value, error = pipe.recv()
    pipe.close()
    return Outcome(value, error, exitcode)


def _run(
    pipe: Connection, rank: int, count: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    """Is the main function of a rank's process."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0,
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}  # fmt: skip
    os.environ |= {name: str(value) for name, value in names.items()}
    import torch

    torch.set_num_threads(1)
    try:
        pipe.send((function(*arguments), None))
    except SystemExit as ending:
        pipe.send((ending.code, None))
        raise
    except BaseException:
        pipe.send((None, traceback.format_exc()))
        raise SystemExit(1) from None
    finally:
        pipe.close()
        if torch.distributed.is_initialized():
            with contextlib.suppress(Exception):
                torch.distributed.destroy_process_group()
