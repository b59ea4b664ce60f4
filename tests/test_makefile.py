"""`make setup` says what it does; a failed installation is a failed target."""

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools import install

ROOT = Path(__file__).parents[1]
# What pip says, in short.
PIP = """Obtaining file:///somewhere
Collecting first>=1.0
  Downloading first-1.0-py3-none-any.whl (9.5 MB)
Collecting torch==2.13.0
  Downloading torch-2.13.0-cp311-cp311-linux_x86_64.whl (883.5 MB)
Collecting cuda
  Downloading cuda-1-cp311-cp311-linux_x86_64.whl (1.2 GB)
""" + "".join(f"Collecting more{number}\n  Downloading more{number}.whl.metadata (13 kB)\n" for number in range(18))
WRITING = "Installing collected packages: " + ", ".join(map(str, range(21))) + "\nSuccessfully installed first-1.0\n"


def setup(folder: Path, ends: str) -> subprocess.CompletedProcess[str]:
    """`make setup` with an interpreter that only tells what pip would."""
    shutil.copy(ROOT / "Makefile", folder)
    (folder / "tools").mkdir()
    shutil.copy(ROOT / "tools/install.py", folder / "tools")
    for name in ("pyproject.toml", "constraints.txt"):
        (folder / name).write_text("")
    (folder / "said").write_text(PIP + WRITING)
    python = folder / "python"
    python.write_text(
        f"""#!/bin/sh
case "$*" in
--version) echo Python 3.11.9;;
*tools/install.py*) exec {sys.executable} "$@";;
*"pip install"*) cat said; {ends};;
*venv*) mkdir -p .venv/bin; cp "$0" .venv/bin/python;;
esac
"""
    )
    python.chmod(0o755)
    # Not those of the make that runs the tests.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    }
    return subprocess.run(
        ["make", "setup", f"PYTHON={python}"], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (named,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    listed = subprocess.run(["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True)
    said = dict(line.removeprefix("make ").split(None, 1) for line in listed.stdout.splitlines())
    assert set(said) == set(named.split()) - {"help"}


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_every_step_of_the_set_up_is_said(tmp_path: Path) -> None:
    done = setup(tmp_path, "exit 0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "make: making .venv, an environment of its own for Python 3.11.9",
        "make: installing what constraints.txt pins: torch and about 220 other packages, some minutes",
        "  getting torch-2.13.0-cp311-cp311-linux_x86_64.whl (883.5 MB)",
        "  getting cuda-1-cp311-cp311-linux_x86_64.whl (1.2 GB)",
        "  20 packages found",
        "  writing 21 packages",
        "make: .venv is ready",
    ]
    assert (tmp_path / ".venv/ready").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_an_installation_that_fails_is_no_ready_environment(tmp_path: Path) -> None:
    done = setup(tmp_path, 'echo "ERROR: No matching distribution found for torch" >&2; exit 1')
    assert done.returncode != 0
    assert "ERROR: No matching distribution found for torch" in done.stderr
    assert not (tmp_path / ".venv/ready").exists()
    assert "is ready" not in done.stdout


def test_a_long_wait_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(install, "PATIENCE", 0.05)
    released = threading.Event()

    def lines() -> Iterator[str]:
        yield "  Downloading torch-2.13.0.whl (883.5 MB)\n"
        released.wait(30)

    class Pip:
        stdout = lines()

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(install.subprocess, "Popen", lambda *words, **options: Pip())
    watched = threading.Timer(0.3, released.set)
    watched.start()
    assert install.main(["python", "torch"]) == 0
    watched.join()
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "  getting torch-2.13.0.whl (883.5 MB)"
    assert said[1] == "  still getting torch-2.13.0.whl (883.5 MB), 0 s"
