"""Backends that other packages bring: found by name, imported when they are asked for, named where they are broken."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from support.comparison import compare_forward_and_gradients, make_inputs

from diffattn.cli.main import main
from diffattn.errors import ConfigError, UnsupportedError
from diffattn.ops import dispatch
from diffattn.ops.backend import load
from diffattn.ops.dispatch import diff_attention
from diffattn.ops.reference import Call, diff_attention_reference

X = make_inputs(B=1, T=3, S=4, H=2, G=1, D=4, Dv=6)
MODULE = """
from diffattn.ops.backend import Backend
from diffattn.ops.reference import Call, diff_attention_reference

asked = []

def supports(call):
    asked.append(call)
    return "mine: only float32 is supported" if call.v.dtype != call.v.new_empty(0).float().dtype else None

def run(call):
    return diff_attention_reference(*call[:6], causal=call.causal, scale=call.scale, key_padding=call.key_padding)

BACKEND = Backend("mine", "a slide rule", supports, run)
NOT_ONE = {"name": "mine"}
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes a package that brings backends importable in this process, as if it had been installed."""
    monkeypatch.setattr(dispatch, "_loaded", {})
    monkeypatch.delitem(sys.modules, "their_attention", raising=False)

    def made(source: str, *entries: str) -> None:
        (tmp_path / "their_attention.py").write_text(source)
        facts = tmp_path / "their_attention-1.2.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: their-attention\nVersion: 1.2\n")
        (facts / "entry_points.txt").write_text("[diffattn.backends]\n" + "\n".join(entries) + "\n")
        monkeypatch.syspath_prepend(tmp_path)

    yield made
    sys.modules.pop("their_attention", None)


def test_a_backend_of_another_package_serves_by_its_name(install) -> None:
    install(MODULE, "mine = their_attention:BACKEND")
    expected = diff_attention_reference(*X[:6], causal=True)
    assert diff_attention(*X[:6]).shape == expected.shape
    assert "their_attention" not in sys.modules, "it was imported before it was asked for"
    assert diff_attention(*X[:6], backend="mine").equal(expected)
    assert diff_attention(*X[:6], backend="mine").equal(expected)
    assert len(sys.modules["their_attention"].asked) == 2
    with pytest.raises(UnsupportedError, match=r"^mine: only float32 is supported; wanted .*: pass backend=\"auto\""):
        diff_attention(*X.to(torch.float64)[:6], backend="mine")


def test_a_backend_that_says_nothing_of_packed_sequences_is_not_given_any(install) -> None:
    install(MODULE, "mine = their_attention:BACKEND")
    row = make_inputs(B=1, T=4, H=2, G=1, D=4, Dv=6)
    with pytest.raises(UnsupportedError, match=r"^mine: packed sequences \(cu_seqlens\) and windows are not supported"):
        diff_attention(*row[:6], cu_seqlens=torch.tensor([0, 1, 4]), backend="mine")
    assert sys.modules["their_attention"].asked == []


def test_auto_asks_nothing_of_installed_packages(install, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(**chosen: str) -> None:
        raise AssertionError("the installed packages were searched")

    install(MODULE, "mine = their_attention:BACKEND")
    monkeypatch.setattr(importlib.metadata, "entry_points", unreachable)
    for backend in ("auto", "standard", "reference"):
        assert diff_attention(*X[:6], backend=backend).isfinite().all()


def test_an_unknown_name_lists_those_that_are_installed_and_imports_none(install) -> None:
    install(MODULE, "mine = their_attention:BACKEND")
    with pytest.raises(ConfigError, match=r"'fast'; wanted one of auto, .*, standard, reference, mine: "):
        diff_attention(*X[:6], backend="fast")
    assert "their_attention" not in sys.modules


BROKEN = {
    "a module that fails": ("1 / 0", "mine = their_attention:BACKEND", "ZeroDivisionError: division by zero"),
    "a module that is not there": (MODULE, "mine = their_absent:BACKEND", "No module named 'their_absent'"),
    "no such object": (MODULE, "mine = their_attention:ABSENT", "ABSENT"),
    "no backend": (MODULE, "mine = their_attention:NOT_ONE", "of type dict"),
    "another name": (MODULE, "other = their_attention:BACKEND", "named 'other'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_package_is_one_line_that_names_it(case: str, install, capsys: pytest.CaptureFixture[str]) -> None:
    source, entry, words = BROKEN[case]
    install(source, entry)
    name = entry.split()[0]
    with pytest.raises(UnsupportedError) as error:
        diff_attention(*X[:6], backend=name)
    line = str(error.value)
    assert line.startswith(f"backend '{name}' of their-attention 1.2 ")
    assert words in line
    assert "\n" not in line
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["backends"][name]["broken"] == line


def test_doctor_lists_ours_and_theirs_with_what_they_run_on(install, capsys: pytest.CaptureFixture[str]) -> None:
    install(MODULE, "mine = their_attention:BACKEND", "standard = their_attention:BACKEND")
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["backends"]
    assert list(found) == ["fused_cpu", "fused_triton", "standard", "reference", "mine"]
    assert found["standard"] == {"hardware": "every device of PyTorch", "package": None, "broken": None}
    assert found["mine"] == {"hardware": "a slide rule", "package": "their-attention 1.2", "broken": None}
    assert main(["doctor"]) == 0
    said = capsys.readouterr().err
    assert "backend fused_cpu: CPU, on Linux and macOS\n" in said
    assert "backend mine: a slide rule, from their-attention 1.2\n" in said


EXAMPLE = Path(__file__).parents[2] / "examples" / "plugin"


def test_the_example_is_a_backend_of_its_name_and_equals_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    said = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]["entry-points"]["diffattn.backends"]
    ((name, value),) = said.items()
    monkeypatch.syspath_prepend(EXAMPLE)
    backend = load(importlib.metadata.EntryPoint(name, value, "diffattn.backends"))

    def example(*tensors: Any, **options: Any) -> torch.Tensor:
        call = Call(*tensors, **options)
        assert backend.supports(call) is None
        return backend.run(call)

    for options in ({"T": 130, "S": 133}, {"T": 70, "one_key": True}, {"T": 65, "S": 3, "causal": False}):
        compare_forward_and_gradients(example, diff_attention_reference, make_inputs(B=1, H=2, G=1, **options))
    padded = torch.zeros(2, 7, dtype=torch.bool)
    assert backend.supports(Call(*make_inputs(key_padding=padded))).startswith(f"{name}: ")
