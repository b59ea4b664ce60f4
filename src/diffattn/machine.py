"""What this machine is called, and where diffattn keeps what it can make again."""

from __future__ import annotations

import os
import platform
import stat
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """``$DIFFATTN_CACHE``, else ``$XDG_CACHE_HOME/diffattn``, else ``~/.cache/diffattn``; it need not exist.

    For a user without a home it is :func:`temporary_folder`.
    """
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = Path(os.path.expanduser(os.environ.get("DIFFATTN_CACHE") or Path(base) / "diffattn"))
    return temporary_folder() if path.parts[:1] == ("~",) else path


def temporary_folder() -> Path:
    """``diffattn-UID`` in the system's temporary folder, for where the cache folder cannot be written."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return Path(tempfile.gettempdir()) / f"diffattn-{user}"


def is_private(folder: Path) -> bool:
    """Whether no other user of this machine can write into a folder or put another in its place; a link is not."""
    if not hasattr(os, "getuid"):
        return False
    try:
        own, above = folder.lstat(), folder.parent.stat()
    except OSError:
        return False
    others = stat.S_IWGRP | stat.S_IWOTH
    if not stat.S_ISDIR(own.st_mode) or own.st_uid != os.getuid() or own.st_mode & others:
        return False
    # Of a folder that all may write into, none but the owner of an entry may rename it where this bit is set.
    return above.st_uid in (0, os.getuid()) and (not above.st_mode & others or bool(above.st_mode & stat.S_ISVTX))


def processor_name() -> str:
    """As the system prints it, else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions() -> dict[str, Any]:
    """What ran, and on what."""
    import torch

    names = ("diffattn", "torch", "transformers", "accelerate", "tokenizers")
    return {
        **{name: version(name) for name in names},
        "python": platform.python_version(),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name(),
        "threads": torch.get_num_threads(),
    }
