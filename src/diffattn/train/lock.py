"""Locks a run folder for one process; the system releases the lock when the process ends, however it ends.

This is no ``filelock``: a training may fork workers, run on NFS or on a file system without locks, and has to name the
process that holds the folder. POSIX record locks do the first two, and the name stands in the file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from diffattn.errors import ConfigError, one_line
from diffattn.files import LOCK, NO_LOCKS, PARTIAL, PROBE, explained
from diffattn.train.callbacks import warn

_HELD_ELSEWHERE = (errno.EACCES, errno.EAGAIN)
# The process and the thread that hold each lock file. A forked process inherits this table, but no lock.
_owners: dict[Path, tuple[int, int]] = {}
_guard = threading.Lock()


# What the second process of a probe does; it ends with 1 if it gets the lock that the first one holds.
_PROBE = """
import errno, fcntl, sys
try:
    getattr(fcntl, sys.argv[2])(open(sys.argv[1], "a"), fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError as error:
    sys.exit(0 if error.errno in (errno.EACCES, errno.EAGAIN) else f"{error.strerror}")
sys.exit(1)
"""
# Of the second process, which opens one file.
_PATIENCE = 20.0


class InUseError(ConfigError):
    """A run folder in which another process or thread trains."""

    by: str = "another process"
    """Who trains there, such as ``process 12 on host``."""


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Locks an existing run folder; the same thread may lock it again inside the block.

    Raises:
        InUseError: another thread or process holds it, on this host or on another that shares the file system.
    """
    file_path, me = folder.resolve() / LOCK, (os.getpid(), threading.get_ident())
    with _guard:
        owner = _owners.get(file_path)
        if owner is not None and owner[0] == me[0] and owner != me:
            raise _in_use(folder, f"process {me[0]} on {socket.gethostname()}")
        if owner != me:
            file = _locked(file_path, folder)
            _owners[file_path] = me
    if owner == me:
        yield
        return
    try:
        yield
    finally:
        with _guard:
            del _owners[file_path]
            # Remove the file before releasing the lock: a process that has opened it sees that it is in no folder.
            with contextlib.suppress(OSError):
                file_path.unlink()
            file.close()


def _locked(path: Path, folder: Path) -> IO[bytes]:
    """Opens and locks the lock file, and writes the name of this process into it."""
    while True:
        try:
            with explained(path):
                # Unbuffered, so that closing it writes nothing more.
                file = path.open("a+b", buffering=0)
        except OSError as error:
            raise ConfigError(
                f"cannot write {path} ({error.strerror})",
                "a folder that can be written",
                "make it writable, or choose another folder with --out",
            ) from None
        try:
            # POSIX record locks end with this process, a forked process does not inherit them, and NFS has them.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD_ELSEWHERE:
                file.seek(0)
                said = re.fullmatch(r"process \d+ on \S+", file.read(300).decode(errors="replace").strip())
                file.close()
                raise _in_use(folder, said[0] if said else "another process") from None
            if error.errno not in NO_LOCKS:
                file.close()
                raise
            warn(f"{folder}: its file system has no locks, so take care that nobody else trains in it")
        try:
            # The process that held the lock may have removed the file in between.
            mine = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except FileNotFoundError:
            mine = False
        if not mine:
            file.close()
            continue
        # If the disk is full, the lock holds without a name.
        with contextlib.suppress(OSError):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        return file


def _in_use(folder: Path, who: str) -> InUseError:
    error = InUseError(
        f"{folder} is being trained by {who}", "a folder that no process trains in", "wait, or choose another --out"
    )
    error.by = who
    return error


def check_locks(folder: Path) -> None:
    """Raises where locks do not hold, which processes that share a folder rely on: takes one and asks for it elsewhere.

    Raises:
        ConfigError: the file system of the folder has no locks, or a second process gets one that this process holds.
    """
    with tempfile.NamedTemporaryFile(dir=folder, prefix=PROBE, suffix=PARTIAL) as file:
        # Runs are locked in the first way, the file of rows in the second.
        for kind in ("lockf", "flock"):
            reason = _why_not_held(file, kind)
            if reason is not None:
                raise ConfigError(
                    f"{folder} is on a file system whose locks do not hold ({reason})",
                    "one with locks, or two processes could train one run at once",
                    "choose another folder with --out, or share the work by --on ray, which needs no locks",
                )


def _why_not_held(file: IO[bytes], kind: str) -> str | None:
    """Returns None if a lock of a file is respected by a second process, else what happened instead."""
    try:
        getattr(fcntl, kind)(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return f"{kind}: {error.strerror}"
    second = [sys.executable, "-I", "-S", "-c", _PROBE, file.name, kind]
    try:
        ended = subprocess.run(second, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        return f"{kind}: no answer within {_PATIENCE:.0f} s"
    if not ended.returncode:
        return None
    said = one_line(ended.stderr, 200)
    return f"{kind}: {said}" if said else f"{kind}: a second process got a lock that was held"
