"""Runs a command that ends when the process that asked for it ends, however that one ended.

    python -I -S guard.py COMMAND ARGUMENT …      stdin: a pipe whose other end is held by that process alone

A process that is killed ends nothing by itself, and ninja puts each compiler into a process group of its own, which no
signal to a group reaches; but the system closes the pipe, and ninja ends its compilers when it is asked to. This is a
process of its own, in a session of its own, so that what kills the first does not kill it too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

# From <sys/prctl.h> of Linux: this option sets the signal that a process gets when its parent ends.
_SET_PARENT_DEATH_SIGNAL = 1
# The seconds that ninja has to end its compilers.
_SECONDS = 5.0


def main(command: list[str]) -> int:
    """The exit status of the command."""
    linux = sys.platform == "linux"
    run = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_end_with_parent if linux else None)
    threading.Thread(target=_watch, args=(run,), daemon=True).start()
    status = run.wait()
    return status if status >= 0 else 128 - status


def _watch(run: subprocess.Popen[bytes]) -> None:
    while os.read(0, 1):
        pass
    run.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        run.wait(_SECONDS)
    run.kill()


def _end_with_parent() -> None:
    """Ends the compilers if this process is killed as well."""
    import ctypes

    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
