"""The cache: folders of files that can be made again, each made by one process while others wait for it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from diffattn.errors import ConfigError
from diffattn.machine import cache_folder
from diffattn.progress import OnStage, Stage

SHORT_LIVED = ".survey"
"""The end of the names of entries that are removed if they were not used for long."""
# The age from which such an entry, or an unfinished one, counts as left behind.
STALE_SECONDS = 30 * 86_400
_PARTIAL = ".partial"


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """The folder that token files are kept in: ``cache_dir``, or else the one that the environment names."""
    return Path(os.path.expanduser(cache_dir)) if cache_dir else cache_folder()


@contextmanager
def cache_explained(root: Path) -> Iterator[None]:
    """Turns an ``OSError`` of the block into a ``ConfigError`` about the cache folder."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"cache folder {root} cannot be written ({error.strerror or error})",
            "a folder that can be written",
            "name another: DIFFATTN_CACHE=/path/to/folder",
        ) from None


@dataclass(frozen=True)
class Cache:
    """The folder of the cache, and who is told what is done in it."""

    root: Path
    on_stage: OnStage
    on_note: Callable[[str], None]

    @contextmanager
    def entry(self, *content: object, end: str = "") -> Iterator[Path]:
        """Yields the folder of an entry, which no other process makes meanwhile; its name is a hash of its content."""
        import filelock

        name = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32] + end
        locks = self.root / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(locks / name)
        with ExitStack() as stack:
            # Without locks two processes do the same work and write the same files.
            with suppress(NotImplementedError):
                try:
                    lock.acquire(timeout=0)
                except filelock.Timeout:
                    self.on_note("another process prepares the same text; waiting until it is done")
                    self.on_stage(Stage("waiting for another process that prepares the same text"))
                    lock.acquire()
                stack.callback(lock.release)
            yield self.root / name

    @contextmanager
    def unfinished(self, folder: Path, *, empty: bool = True) -> Iterator[Path]:
        """Yields a folder to fill, which becomes ``folder``; what a killed process left stays unless ``empty``."""
        for left in self.root.iterdir():
            # These cost disk space alone, so that the old ones may wait until something new is made.
            if left.name.endswith((_PARTIAL, SHORT_LIVED)) and time.time() - left.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
        partial = folder.with_name(folder.name + _PARTIAL)
        if empty:
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(exist_ok=True)
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(partial, folder)
