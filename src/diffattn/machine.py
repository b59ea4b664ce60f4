"""The name of this machine, its versions, and the folders for files that diffattn can make again."""

from __future__ import annotations

import os
import platform
import stat
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any


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


def processor_name() -> str:
    """The processor's name as the system prints it, or else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions() -> dict[str, Any]:
    """The versions of the libraries and the machine that a result was measured with."""
    import torch

    names = ("diffattn", "torch", "transformers", "accelerate", "tokenizers")
    return {
        **{name: version(name) for name in names},
        "python": platform.python_version(),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name(),
        "threads": torch.get_num_threads(),
    }
