"""Trains a ladder in several processes of this machine, which take its runs as processes that share a folder do.

Each process has its own session, so that Ctrl-C reaches the caller alone, who ends them: SIGTERM lets a run save its
steps. A process whose caller died notices that its standard input has ended, and ends in the same way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from diffattn.errors import TrainingError, error_from_json
from diffattn.scaling.messages import options_to_json, progress_from_json
from diffattn.scaling.options import LadderOptions, WorkOptions
from diffattn.scaling.runs import LadderProgress
from diffattn.train.callbacks import Interruption

_STOPPED = 130
_WORKER = ("-m", "diffattn.scaling.worker")


def train_in_processes(
    options: LadderOptions,
    work: WorkOptions,
    folder: Path,
    command: str,
    on_progress: Callable[[LadderProgress], None],
    *,
    at_most: int,
) -> None:
    """Returns once the processes find no more runs; their text has to be prepared already, or each prepares it.

    Args:
        options, work, folder, command, on_progress: those of :func:`diffattn.scaling.ladder.run_ladder`.
        at_most: the number of runs that are left, and so of processes that have something to do.

    Raises:
        DiffattnError: the first error of one of them; the others have saved their steps and ended.
        TrainingError: one of them died.
        KeyboardInterrupt: Ctrl-C or SIGTERM; all have saved their steps and ended.
    """
    count = min(work.processes, at_most)
    threads = work.threads or max(1, torch.get_num_threads() // work.processes)
    job = json.dumps({"options": options_to_json(options), "folder": str(folder), "command": command})
    said: queue.SimpleQueue[tuple[_Process, dict[str, Any] | None]] = queue.SimpleQueue()
    started: list[_Process] = []
    running = 0
    try:
        with Interruption():
            for number in range(count):
                started.append(_Process(job, _environment(options, threads, number), said))
                running += 1
            while running:
                process, message = said.get()
                if message is None:
                    running -= 1
                    process.check()
                elif (error := message.get("error")) is not None:
                    raise error_from_json(error)
                else:
                    progress = progress_from_json(message)
                    if progress.seconds_left is not None:
                        progress = dataclasses.replace(progress, seconds_left=progress.seconds_left / count)
                    on_progress(progress)
    finally:
        _end(started)


def _end(started: Sequence[_Process]) -> None:
    """Ends the processes that still run and waits for all: they save their steps; a second Ctrl-C kills them."""
    for process in started:
        process.signal(signal.SIGTERM)
    try:
        for process in started:
            process.wait()
    except KeyboardInterrupt:
        for process in started:
            process.signal(signal.SIGKILL)
            process.wait()


def _environment(options: LadderOptions, threads: int, number: int) -> Mapping[str, str]:
    """Returns the variables of a process: its threads, and one GPU, since more would share the blocks of one run."""
    names = {"OMP_NUM_THREADS": str(threads)}
    if options.device != "cpu" and (count := torch.cuda.device_count()):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        cards = visible.split(",")
        names["CUDA_VISIBLE_DEVICES"] = cards[number % len(cards)]
    return {**os.environ, **names}


class _Process:
    """One process, and the thread that reads what it says."""

    def __init__(self, job: str, environment: Mapping[str, str], said: queue.SimpleQueue[Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *_WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment, start_new_session=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, args=(said,), daemon=True)
        self._reader.start()
        assert self._process.stdin is not None
        # One that died at once is found by its end.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(job + "\n")
            self._process.stdin.flush()

    def _read(self, said: queue.SimpleQueue[Any]) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            # One that was killed may leave half a line.
            with contextlib.suppress(ValueError):
                said.put((self, json.loads(line)))
        self._process.wait()
        said.put((self, None))

    def check(self) -> None:
        """Raises if it died without a word."""
        status = self._process.returncode
        if status == 0:
            return
        if status == _STOPPED:
            raise KeyboardInterrupt
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
        raise TrainingError(
            f"process {self._process.pid} of --processes {how}", "a process that trains until its runs are done",
            "run it again to go on, with fewer processes if the memory was full; what was trained is kept",
        )  # fmt: skip

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self) -> None:
        """Waits until it has ended; then no thread or pipe of it is left."""
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
