"""The name of this machine, its versions, and the folders for files that diffattn can make again."""

from __future__ import annotations

import os
import platform
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path


def cache_folder() -> Path:
    """The cache folder: ``$DIFFATTN_CACHE``, else ``$XDG_CACHE_HOME/diffattn``, else ``~/.cache/diffattn``.

    It need not exist. For a user without a home it is :func:`temporary_folder`.
    """
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = Path(os.path.expanduser(os.environ.get("DIFFATTN_CACHE") or Path(base) / "diffattn"))
    return temporary_folder() if path.parts[:1] == ("~",) else path


def temporary_folder() -> Path:
    """The folder ``diffattn-UID`` in the system's temporary folder, used where the cache folder cannot be written."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return Path(tempfile.gettempdir()) / f"diffattn-{user}"


def is_private(folder: Path) -> bool:
    """Returns whether no other user of this machine can write into a folder or replace it; a link is never private."""
    if not hasattr(os, "getuid"):
        return False
    try:
        own, above = folder.lstat(), folder.parent.stat()
    except OSError:
        return False
    others = stat.S_IWGRP | stat.S_IWOTH
    if not stat.S_ISDIR(own.st_mode) or own.st_uid != os.getuid() or own.st_mode & others:
        return False
    # In a folder that everybody may write into, this bit lets only the owner of an entry rename it.
    return above.st_uid in (0, os.getuid()) and (not above.st_mode & others or bool(above.st_mode & stat.S_ISVTX))


def cores() -> int:
    """Returns the number of processor cores that this process may use."""
    # macOS binds no process to cores, and Python there has no function that asks.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_facts() -> dict[str, str]:
    """The facts about the first processor by Linux's names, such as ``model name``; empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def processor_name() -> str:
    """The processor's name as the system prints it, or else the board's, or else the architecture."""
    facts = processor_facts()
    if "model name" in facts:
        return facts["model name"]
    # Of Arm's processors Linux tells numbers alone; the board, such as a Raspberry Pi, has a name.
    return _board() or (platform.machine() if facts else platform.processor() or platform.machine())


def _board() -> str:
    try:
        return Path("/proc/device-tree/model").read_text(encoding="utf-8").strip("\0 \n")
    except (OSError, ValueError):
        return ""


@dataclass(frozen=True)
class Provenance:
    """The versions and the machine that a result was measured with."""

    packages: Mapping[str, str]
    """The version of each package that can change a result."""
    python: str
    """The version of Python."""
    machine: str
    """The name of the GPU, or else of the processor."""
    threads: int
    """The threads that torch uses for one operation."""

    @classmethod
    def here(cls) -> Provenance:
        """Returns the provenance of what this process measures."""
        import torch

        return cls(
            {name: version(name) for name in ("diffattn", "torch", "transformers", "accelerate", "tokenizers")},
            platform.python_version(),
            torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name(),
            torch.get_num_threads(),
        )

    def to_json(self) -> dict[str, str | int]:
        """Returns the ``versions`` of a result."""
        return {**self.packages, "python": self.python, "machine": self.machine, "threads": self.threads}
