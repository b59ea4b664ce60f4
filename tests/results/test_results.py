"""The types of results: every field is explained, and what was read from a file is written back as it was."""

import ast
import dataclasses
import importlib
import json
from pathlib import Path

import pytest

import diffattn.results
from diffattn.results.ablation import ArmPair
from diffattn.results.base import Result
from diffattn.results.interval import Interval
from diffattn.results.ladder import LadderRow
from diffattn.results.lens import LensResult
from diffattn.results.maps import AttentionMaps
from diffattn.results.study import ModelPoint

FOLDER = Path(diffattn.results.__file__).parent
ROWS = Path(__file__).parents[2] / "benchmarks" / "results"
INTERVAL = Interval(-0.5, -0.75, -0.25)


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda file: file.stem)
def test_every_field_of_every_result_is_explained(file: Path) -> None:
    for record in (node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)):
        for field, behind in zip(record.body, [*record.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                said = isinstance(behind, ast.Expr) and isinstance(behind.value, ast.Constant)
                assert said, f"{record.name}.{ast.unparse(field.target)}"


def test_every_result_is_frozen() -> None:
    for file in FOLDER.glob("[a-z]*.py"):
        importlib.import_module(f"diffattn.results.{file.stem}")
    pending, found = [Result], []
    while pending:
        found += (more := pending.pop().__subclasses__())
        pending += more
    assert len(found) > 20
    # dataclasses refuses a subclass that is not frozen; one that is no dataclass would lose its fields in JSON.
    assert all("__dataclass_fields__" in vars(kind) for kind in found)
    with pytest.raises(dataclasses.FrozenInstanceError):
        INTERVAL.low = 0.0  # type: ignore[misc]


@pytest.mark.parametrize("name", ["ladder", "study", "ablation"])
def test_the_committed_rows_are_written_back_as_they_were_read(name: str) -> None:
    lines = (ROWS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines
    for line in lines:
        assert json.dumps(LadderRow.from_json(json.loads(line)).to_json()) == line


def test_a_row_without_a_field_is_refused_by_name() -> None:
    row = json.loads((ROWS / "ladder.jsonl").read_text(encoding="utf-8").splitlines()[0])
    del row["val_loss"]
    with pytest.raises(ValueError, match="it has no val_loss"):
        LadderRow.from_json(row)


@pytest.mark.parametrize(
    ("low", "high", "excluded"), [(-0.3, -0.1, True), (0.1, 0.3, True), (-0.1, 0.3, False), (0.0, 0.4, False)]
)
def test_an_interval_excludes_zero_only_where_zero_is_outside(low: float, high: float, excluded: bool) -> None:
    assert Interval(0.1, low, high).excludes_zero is excluded


def test_what_a_model_lacks_is_no_key() -> None:
    first = ModelPoint(mean=1.0, low=None, high=None, values=1, difference=None, is_first=True)
    other = ModelPoint(mean=1.0, low=0.5, high=1.5, values=3, difference=INTERVAL, is_first=False)
    assert list(first.to_json()) == ["mean", "low", "high", "values"]
    assert other.to_json() == {
        "mean": 1.0,
        "low": 0.5,
        "high": 1.5,
        "values": 3,
        "difference": {"mean": -0.5, "low": -0.75, "high": -0.25},
    }
    assert AttentionMaps(map_pos=[[1.0]]).to_json() == {"map_pos": [[1.0]]}
    assert "picture" not in LensResult(tokens=["a"], answer=None, models=[], command="").to_json()


def test_a_pair_of_an_ablation_names_its_baseline_first() -> None:
    pair = ArmPair(val_loss_difference=INTERVAL, verdict="lower", parameters_ratio=1.0, base="diff_v1", seeds=(0, 1))
    assert list(pair.to_json()) == ["baseline", "seeds", "val_loss_difference", "parameters_ratio", "verdict"]
    assert pair.baseline == pair.to_json()["baseline"] == "diff_v1"
