"""What this machine is called, and where diffattn keeps what it can make again."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def cache_folder() -> Path:
    """``$DIFFATTN_CACHE``, else ``$XDG_CACHE_HOME/diffattn``, else ``~/.cache/diffattn``; it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(os.environ.get("DIFFATTN_CACHE") or Path(base) / "diffattn"))


def processor_name() -> str:
    """As the system prints it, else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
