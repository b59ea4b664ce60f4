"""The study of gates on a tiny model: its rows, what it starts from, and what is not run again."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gate_study
from diffattn.scaling.options import LadderOptions

ROOT = Path(__file__).parents[2]
LADDER = LadderOptions(
    sizes=("15k",), tokens="8k", vocab_size=300, context=200, needles=0.9, batch_size=4, dtype="float32"
)
ARGUMENTS = ["--text", "text", "--out", "rows.jsonl", "--runs", "runs", "--size", "15k", "--tokens", "8k",
             "--vocab-size", "300", "--context", "200", "--batch-size", "4"]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # The text's cache alone: the compiled kernel's stays where it is.
    monkeypatch.setattr("diffattn.cache.cache_folder", lambda: tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    Path("text").write_text(
        "<|endoftext|>\n".join(f"The people of state {i} are many. They know it well!\n" * 3 for i in range(300))
    )
    monkeypatch.setattr(gate_study, "_SAMPLES", 1)
    return tmp_path


def test_the_page_has_the_tables_of_the_rows():
    page = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    tables = gate_study.tables(read(ROOT / "benchmarks" / "results" / "gated.jsonl"))
    assert len(tables) > 1
    for words, table in tables.items():
        assert f"{words}:\n\n{table}\n" in page


def test_the_page_has_the_gates_and_the_losses_of_the_rows():
    rows = [row for row in read(ROOT / "benchmarks" / "results" / "gated.jsonl") if row["context"] == 128]
    plain = {row["attention"]: row for row in rows if (row["times"], row["start"], row["seed"]) == (1, "as built", 0)}
    first, *_, last = plain["gated"]["probes"]
    ratios = [probe["gradients"]["g_proj"] / probe["gradients"]["q_proj"] for probe in plain["gated"]["probes"]]
    low = {name: min(layer[name] for layer in last["gates"]) for name in last["gates"][0]}
    high = {name: max(layer[name] for layer in last["gates"]) for name in last["gates"][0]}
    assert all(abs(layer["mean"] - 0.5) < 0.02 for layer in first["gates"])
    losses = {kind: [f"{loss:.2f}" for _, loss in row["training_loss"][:3]] for kind, row in plain.items()}
    said = [
        f"the means of the four layers are {low['mean']:.2f} to {high['mean']:.2f}",
        f"{low['below_0.1']:.0%} to {high['below_0.1']:.0%} of the gates are below 0.1",
        f"the spread over tokens is {low['std_over_tokens']:.2f} to {high['std_over_tokens']:.2f}",
        f"The gradient of W_g is {min(ratios):.2g} to {max(ratios):.2g} times that of W_Q",
        f"gated {', '.join(losses['gated'])}, softmax {', '.join(losses['softmax'])}",
    ]
    page = " ".join((ROOT / "docs" / "findings.md").read_text(encoding="utf-8").split())
    assert [words for words in said if words not in page] == []


def run(monkeypatch: pytest.MonkeyPatch, *more: str) -> list[dict]:
    monkeypatch.setattr(sys, "argv", ["gate_study", *ARGUMENTS, *more])
    gate_study.main()
    return read(Path("rows.jsonl"))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_row_says_what_was_run_and_what_came_of_it(folder, monkeypatch, capsys):
    rows = run(monkeypatch, "--cases", "softmax:2", f"gated:0.5:{gate_study.OPEN}:1")
    assert [(row["attention"], row["times"], row["start"], row["seed"]) for row in rows] == [
        ("softmax", 2.0, "as built", 0),
        ("gated", 0.5, gate_study.OPEN, 1),
    ]
    assert rows[0]["learning_rate"] == 4 * rows[1]["learning_rate"]
    for row in rows:
        assert {
            "size",
            "for_tokens",
            "vocab_size",
            "context",
            "needles",
            "data_digest",
            "clipped",
            "val_loss",
        } < row.keys()
        assert {"command", "versions", "machine"} < row.keys()
        assert [(needles, asked, of) for needles, asked, _, of in row["retrieval"]] == [(1, 1, 5), (2, 1, 5)]
        assert [piece for piece, _ in row["training_loss"]] == [16, 32, 64, 128, 256, 512, 200]
        assert [probe["step"] for probe in row["probes"]] == list(range(1, 11))
        assert all({"nats_per_digit", "digits_right", "nats_per_repeat"} < probe.keys() for probe in row["probes"])
    assert "gates" not in rows[0]["probes"][0]
    first = rows[1]["probes"][0]
    assert len(first["gates"]) == LADDER.shapes()[0].num_layers
    assert all(layer["mean"] > 0.75 for layer in first["gates"])
    # Of what is trained in float32 there is no other gradient.
    assert first["bfloat16_cosine"] == 1
    assert first["gradients"]["g_proj"] > 0

    monkeypatch.setattr(gate_study, "train", lambda *_, **__: pytest.fail("trained again"))
    assert run(monkeypatch, "--cases", "softmax:2") == rows
    capsys.readouterr()
    run(monkeypatch, "--table")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "## 15k parameters, 8k tokens, context 200, vocabulary 300, needles 0.9, float32"
    assert [line.split(" | ")[2] for line in lines[4:6]] == ["as built", gate_study.OPEN]


def test_a_start_changes_the_gates_or_what_follows_them_and_nothing_else():
    plain, opened, doubled = (
        gate_study.built(gate_study.Case("gated", 1.0, start), LADDER)
        for start in ("as built", gate_study.OPEN, gate_study.DOUBLE)
    )
    for (name, mine), (_, theirs), (_, twice) in zip(
        plain.named_parameters(), opened.named_parameters(), doubled.named_parameters(), strict=True
    ):
        assert torch.equal(mine, theirs)
        assert torch.equal(mine * (2 if "o_proj" in name else 1), twice)
    x = torch.randn(2, LADDER.shapes()[0].hidden_size)
    before, after = (model.model.layers[0].self_attn.g_proj(x) for model in (plain, opened))
    assert torch.equal(before + 2, after)


@pytest.mark.parametrize("text", ["gatd:1", "gated", "gated:much", "gated:1:closed", f"softmax:1:{gate_study.OPEN}"])
def test_a_case_that_is_none_is_refused_in_a_line(text):
    with pytest.raises(SystemExit, match="wanted a variant of"):
        gate_study.Case.of(text)
