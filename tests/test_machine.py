"""The machine's name and the provenance of a result."""

import platform
from pathlib import Path

import pytest
import torch

from benchmarks.rows import provenance
from diffattn import machine
from diffattn.machine import Provenance, processor_name


def test_a_result_and_a_benchmarks_row_name_the_same_versions_and_machine() -> None:
    here = Provenance.here().to_json()
    assert list(here) == [
        "diffattn", "torch", "transformers", "accelerate", "tokenizers", "python", "machine", "threads",
    ]  # fmt: skip
    assert (here["torch"], here["python"]) == (torch.__version__, platform.python_version())
    row = provenance("benchmarks.none", threads=1)
    assert row["versions"] == {name: here[name] for name in ("python", "torch", "transformers", "diffattn")}
    assert row["machine"]["cpu"].startswith(processor_name())


def test_a_system_without_cpuinfo_names_its_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(self: Path, **options: str) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", absent)
    assert machine.processor_facts() == {}
    assert processor_name() == (platform.processor() or platform.machine())


def test_a_board_whose_processor_has_no_name_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Linux tells it of a Raspberry Pi."""
    files = {
        "/proc/cpuinfo": "processor\t: 0\nCPU part\t: 0xd0b\n\nSerial\t: 48343bbbe3ae743b\n",
        "/proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
    }
    monkeypatch.setattr(Path, "read_text", lambda self, **options: files[str(self)])
    assert processor_name() == "Raspberry Pi 5 Model B Rev 1.0"
