"""The table of public checkpoints in docs/convert.md: every cell is what happens."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support.motif_loop import motif_logits
from support.public_checkpoints import public_folder
from support.served import KEY, SENTENCES, running
from transformers import AutoModelForCausalLM, AutoTokenizer

from diffattn.convert.convert import convert
from diffattn.convert.options import TARGETS
from diffattn.errors import ConfigError, UnsupportedError
from diffattn.export.onnx import export_onnx
from diffattn.generate.decoding import Decoding
from diffattn.generate.generation import generate
from diffattn.plan.named_model import parse_model
from diffattn.serve.engines import check_folder

PROMPT, COUNT = SENTENCES[1][:20], 8


class Row(NamedTuple):
    name: str
    targets: tuple[str, ...]
    """The kinds that it becomes; none where it is refused."""
    plan: str
    generate: str
    serve: str
    export: str


def table() -> dict[str, Row]:
    text = Path("docs/convert.md").read_text(encoding="utf-8")
    lines = text.split("| checkpoint | convert | plan | generate | serve | export |\n")[1].split("\n\n")[0].splitlines()
    rows = {}
    for line in lines[1:]:
        name, kinds, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        targets = () if kinds == "refused" else tuple(kind.strip(" `") for kind in kinds.split(","))
        rows[name] = Row(name, targets, *cells)
    return rows


ROWS = table()
CONVERTED = [(name, target) for name, row in ROWS.items() for target in row.targets]


def greedy(folder: Path) -> list[int]:
    """The tokens that the published model writes, by the library's own class or by the loop over Motif's layout."""
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")["input_ids"]
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] == "Motif":
        from safetensors.torch import load_file

        weights = load_file(folder / "model.safetensors")
        for _ in range(COUNT):
            ids = torch.cat((ids, motif_logits(config, weights, ids)[:, -1].argmax(-1, keepdim=True)), dim=1)
        return ids[0, -COUNT:].tolist()
    model = AutoModelForCausalLM.from_pretrained(folder)
    mask = torch.ones_like(ids)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": COUNT}
    return model.generate(ids, attention_mask=mask, **options)[0, -COUNT:].tolist()


def written(tokens: list[int], folder: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # The end of a text ends it, and is no part of it.
    end = tokens.index(0) if 0 in tokens else len(tokens)
    return tokenizer.decode(tokens[:end])


@pytest.mark.parametrize("name", ROWS)
def test_the_planner_has_what_the_table_says(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    assert row.plan in ("yes", "refused")
    if row.plan == "yes":
        assert parse_model(name).built.num_layers > 0
        return
    with pytest.raises((ConfigError, UnsupportedError)):
        parse_model(str(public_folder(name, tmp_path / "source", refused=True)))


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if not row.targets])
def test_a_refused_checkpoint_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    source = public_folder(name, tmp_path / "source", refused=True)
    with pytest.raises(UnsupportedError) as caught:
        convert(source, tmp_path / "made", "softmax")
    assert "\n" not in str(caught.value)
    assert ROWS[name][3:] == ("–", "–", "–")


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.targets])
def test_a_converted_checkpoint_writes_the_text_of_the_published_one(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    assert row.generate == "yes"
    assert set(row.targets) <= set(TARGETS)
    source = public_folder(name, tmp_path / "source")
    expected = written(greedy(source), source)
    assert len(expected) > 5
    assert convert(source, tmp_path / "made", row.targets[0]).target == row.targets[0]
    assert generate(tmp_path / "made", PROMPT, Decoding(max_new_tokens=COUNT, temperature=0)).text == expected
    assert check_folder(tmp_path / "made") == 256


@pytest.mark.full
@pytest.mark.parametrize(("name", "target"), CONVERTED)
def test_it_is_generated_and_served_with_the_same_text(name: str, target: str, tmp_path: Path) -> None:
    assert ROWS[name].serve == "yes"
    source = public_folder(name, tmp_path / "source")
    convert(source, tmp_path / "made", target)
    expected = written(greedy(source), source)
    assert generate(tmp_path / "made", PROMPT, Decoding(max_new_tokens=COUNT, temperature=0)).text == expected
    with running(tmp_path / "made", "--engine", "transformers") as served:
        answer = served.client(KEY).completions.create(model="made", prompt=PROMPT, max_tokens=COUNT, temperature=0)
    assert answer.choices[0].text == expected


@pytest.mark.full
@pytest.mark.parametrize(("name", "target"), CONVERTED)
def test_it_is_exported_and_writes_the_same_tokens(name: str, target: str, tmp_path: Path) -> None:
    assert ROWS[name].export == "yes"
    convert(public_folder(name, tmp_path / "source"), tmp_path / "made", target)
    report = export_onnx(tmp_path / "made", check=True).check
    assert report is not None
    assert report.passed
    assert report.identical_texts == report.texts
