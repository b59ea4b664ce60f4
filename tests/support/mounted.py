"""A file system of its own for a test, of which it says how large it is and how it is mounted."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def file_system(folder: Path, size: str) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """The folder, and a function that mounts it again with other options; skips the test where nobody may mount."""
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("mounting a file system needs root and mount")
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder, lambda options: subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True) and None
    # An error that is being reported may still hold a file open.
    subprocess.run(["umount", "--lazy", folder], check=True)
