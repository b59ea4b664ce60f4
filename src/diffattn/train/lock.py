"""One process to a run folder: a lock that the system lets go of when the process ends, however it ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from diffattn.errors import ConfigError
from diffattn.files import LOCK, explained
from diffattn.train.callbacks import warn

_HELD_ELSEWHERE = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
# By lock file, the process and the thread that has it. The process, since a forked one inherits this table and no lock.
_owners: dict[Path, tuple[int, int]] = {}
_guard = threading.Lock()


class InUseError(ConfigError):
    """Somebody else trains in the folder."""


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Have a run folder, which exists, for oneself; the same thread may ask again inside.

    Raises:
        InUseError: another process has it, on this host or on another that shares the file system, or another thread.
    """
    place, me = folder.resolve() / LOCK, (os.getpid(), threading.get_ident())
    with _guard:
        owner = _owners.get(place)
        if owner is not None and owner[0] == me[0] and owner != me:
            raise _in_use(folder, f"process {me[0]} on {socket.gethostname()}")
        if owner != me:
            file = _locked(place, folder)
            _owners[place] = me
    if owner == me:
        yield
        return
    try:
        yield
    finally:
        with _guard:
            del _owners[place]
            # Before the lock goes: whoever opened the file in between sees that it is no longer the one in the folder.
            with contextlib.suppress(OSError):
                place.unlink()
            file.close()


def _locked(place: Path, folder: Path) -> IO[bytes]:
    """The lock file, locked, with the name of this process in it."""
    while True:
        try:
            with explained(place):
                # Unbuffered, so that closing it writes nothing more.
                file = place.open("a+b", buffering=0)
        except OSError as error:
            raise ConfigError(
                f"cannot write {place}: {error.strerror}; make it writable, or choose another folder with --out"
            ) from None
        try:
            # POSIX locks: they end with this process and are not passed on to what it forked, and NFS serves them.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD_ELSEWHERE:
                file.seek(0)
                said = re.fullmatch(r"process \d+ on \S+", file.read(300).decode(errors="replace").strip())
                file.close()
                raise _in_use(folder, said[0] if said else "another process") from None
            if error.errno not in _NO_LOCKS:
                file.close()
                raise
            warn(f"{folder}: its file system has no locks, so take care that nobody else trains in it")
        try:
            # Who had the lock may have removed the file in between.
            mine = os.path.samestat(os.fstat(file.fileno()), place.stat())
        except FileNotFoundError:
            mine = False
        if not mine:
            file.close()
            continue
        # The lock holds without a name too, where the disk is full.
        with contextlib.suppress(OSError):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        return file


def _in_use(folder: Path, who: str) -> InUseError:
    return InUseError(f"{folder} is being trained by {who}; wait until it ends, or choose another --out")
