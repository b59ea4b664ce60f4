import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.small_folders import small_folder

from diffattn.errors import CheckpointError
from diffattn.model.trained import TRAINING, Trained, read_claim, read_trained, write_trained

LITTLE = Trained(
    attention="diff_v1", parameters=3_000_000, vocab_size=4096, steps=30, tokens=15_360, val_loss=7.21, continued=False
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_folder(tmp_path_factory.mktemp("model"))


def test_what_is_written_is_read(folder: Path) -> None:
    assert read_trained(folder) is None
    write_trained(folder, LITTLE)
    assert read_trained(folder) == read_trained(str(folder)) == LITTLE
    (folder / TRAINING).unlink()


def test_it_says_nothing_of_other_weights(folder: Path, tmp_path: Path) -> None:
    write_trained(folder, LITTLE)
    other = small_folder(tmp_path, seed=1)
    (other / TRAINING).write_bytes((folder / TRAINING).read_bytes())
    assert read_trained(other) is None
    (folder / TRAINING).unlink()


def test_what_is_said_is_read_before_a_weight_is(folder: Path, tmp_path: Path) -> None:
    write_trained(folder, LITTLE)
    (folder / TRAINING).rename(tmp_path / TRAINING)
    claim = read_claim(tmp_path)
    assert claim is not None
    assert claim.trained == claim.of_weights(folder) == LITTLE


def test_only_a_model_that_saw_little_is_excused() -> None:
    assert LITTLE.little
    assert LITTLE.advice is not None
    assert "no fault of the program" in LITTLE.advice
    assert "60 M tokens" in LITTLE.advice
    assert replace(LITTLE, tokens=60_000_000).advice is None
    # What a model knew before is not known here.
    assert replace(LITTLE, continued=True).advice is None
    assert "30 more steps" in replace(LITTLE, continued=True).facts


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "null", "{}", "{", "[" * 100_000, '{"steps": 1}', "\udcff",
        *(json.dumps({**vars(LITTLE), **changes}) for changes in (
            {"steps": "30"}, {"tokens": -1}, {"val_loss": None}, {"val_loss": float("nan")}, {"parameters": True},
            {"attention": 3}, {"continued": 1}, {"vocab_size": 0}, {"steps": 10**400}, {"more": 1},
        )),
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_line(content: str, folder: Path) -> None:
    (folder / TRAINING).write_text(content, errors="surrogateescape")
    with pytest.raises(CheckpointError, match="delete it, the model works without") as error:
        read_trained(folder)
    assert "\n" not in str(error.value)
    (folder / TRAINING).unlink()
