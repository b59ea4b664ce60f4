"""Modules of diffattn on a machine that has torch alone: the package's `__init__` wants newer and other packages."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parents[1] / "src" / "diffattn"


def bare_module(name: str) -> Any:
    """``diffattn.name``, imported from this repository without running the `__init__` of diffattn."""
    if "diffattn" not in sys.modules:
        package = types.ModuleType("diffattn")
        package.__path__ = [str(SOURCE)]
        sys.modules["diffattn"] = package
    return importlib.import_module(f"diffattn.{name}")
