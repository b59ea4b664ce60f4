"""Rows of machines that somebody posted: what is read, and what is refused in one line."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from support.machine_rows import machine_row

from diffattn.errors import ConfigError
from diffattn.results.machine import MachineRow
from diffattn.sealed import sealed

Values = dict[str, Any]


def changed(change: Callable[[Values], object]) -> Values:
    """A row with something else in it, under a seal of its own."""
    values = json.loads(json.dumps(machine_row().to_json()))
    del values["seal"]
    change(values)
    return sealed(values)


def test_a_row_is_read_as_it_was_written() -> None:
    row = machine_row()
    assert MachineRow.from_json(json.loads(json.dumps(row.to_json()))) == row
    without = machine_row(onnxruntime=None, celsius=())
    assert MachineRow.from_json(json.loads(json.dumps(without.to_json()))) == without


@pytest.mark.parametrize("lost", ["seal", "speeds"])
def test_what_was_changed_is_refused(lost: str) -> None:
    values = dict(machine_row().to_json())
    del values[lost]
    with pytest.raises(ConfigError, match="changed after it was measured"):
        MachineRow.from_json(values)


BAD: dict[str, tuple[Callable[[Values], object], str]] = {
    "another benchmark": (lambda row: row.update(benchmark="onnx"), "a row of benchmark 'onnx', form 1"),
    "another form": (lambda row: row.update(form=2), "benchmark 'machine', form 2; wanted one of .* form 1"),
    "no key": (lambda row: row.pop("threads"), "the row with 'threads'; wanted the keys benchmark, form"),
    "one more key": (lambda row: row.update(host="mine"), "the row with 'host'"),
    "another order": (lambda row: row.update(name=row.pop("name")), "another order of keys"),
    "no number": (lambda row: row["rates"].update(read="fast"), "the row's rates's read is 'fast'; wanted a number"),
    "not finite": (lambda row: row.update(seconds=float("inf")), "the row's seconds is inf"),
    "no number at all": (lambda row: row.update(seconds=float("nan")), "the row's seconds is nan"),
    "below 0": (lambda row: row.update(load=-1.0), "the row's load is -1.0"),
    "a truth": (lambda row: row.update(cores=True), "the row's cores is True; wanted a whole number"),
    "a part of a core": (lambda row: row.update(cores=1.5), "the row's cores is 1.5"),
    "a long name": (lambda row: row.update(name="a" * 201), "the row's name is 'a+…; wanted a text of at most 200"),
    "a name with a line break": (lambda row: row.update(name="a\nb"), r"the row's name is 'a\\nb'"),
    "no list": (lambda row: row.update(speeds={}), "the row's speeds is {}"),
    "a long list": (lambda row: row.update(celsius=[1.0] * 101), r"the row's celsius is \[1.0"),
    "no object in a list": (lambda row: row.update(speeds=[3]), "the row's speeds number 1 is 3"),
    "no day": (lambda row: row.update(date="yesterday"), "a row of date 'yesterday'"),
    "an unknown variant": (lambda row: row["speeds"][0].update(attention="linear"), "attention='linear'"),
    "an unknown engine": (lambda row: row["speeds"][0].update(engine="abacus"), "engine='abacus'"),
    "other bits": (lambda row: row["speeds"][0].update(bits=3), "bits=3"),
    "an unknown phase": (lambda row: row["attention"][0].update(phase="rest"), "phase='rest'"),
    "a share that is none": (lambda row: row["speeds"][0].update(reached=0.9), "a speed of 50 that is 0.9 of 100"),
    "rounds out of order": (
        lambda row: row["speeds"][0]["tokens_per_second"].update(p20=51.0),
        "rounds from 51 over 50 to 55",
    ),
    "no time": (lambda row: row["attention"][0]["seconds"].update(p20=0.0), "rounds from 0 over"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_nobody_can_have_measured_is_refused_in_one_line(case: str) -> None:
    change, words = BAD[case]
    with pytest.raises(ConfigError) as caught:
        MachineRow.from_json(changed(change))
    said = str(caught.value)
    assert re.search(words, said), said
    assert "\n" not in said
    assert "run diffattn doctor --benchmark" in said


@pytest.mark.parametrize("values", [None, [], "row", 3])
def test_what_is_no_object_is_refused(values: object) -> None:
    with pytest.raises(ConfigError, match="wanted a JSON object"):
        MachineRow.from_json(values)
