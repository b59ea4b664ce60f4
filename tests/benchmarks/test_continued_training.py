"""The benchmark of continued training on a tiny model: rows, pairs, and what is not run again."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import continued_training as benchmark
from diffattn.data.tokenizer import train_tokenizer

WORDS = "the state of the union is strong and the people of the states know it well\n"


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    # The text's cache alone: the compiled kernel's stays where it is.
    monkeypatch.setattr("diffattn.cache.cache_folder", lambda: tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 32}  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained("tiny")
    train_tokenizer([WORDS], 300).save_pretrained("tiny")
    Path("text.txt").write_text("".join(f"{i} {WORDS}<|endoftext|>\n" for i in range(300)))
    return ["--model", "tiny", "--work", "work", "--out", "rows.jsonl", "--text", "text.txt", "--steps", "4",
            "--context", "16", "--blocks", "3", "--evaluations", "2", "--learning-rate", "1e-2",
            "--dtype", "float32", "--threads", "1"]  # fmt: skip


def test_rows_of_the_three_models_and_nothing_twice(arguments: list[str], monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["continued_training", *arguments, "--seeds", "0"])
    benchmark.main()
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    assert [(row["attention"], row["step"]) for row in rows] == [
        (attention, step) for attention in benchmark.ATTENTIONS for step in (0, 2, 4, 4)
    ]
    assert [row["val_blocks"] for row in rows[:4]][:3] == [3, 3, 3]
    assert rows[3]["val_blocks"] > 3
    first = [row["val_loss"] for row in rows if row["step"] == 0]
    assert first == pytest.approx([first[0]] * 3, abs=1e-5)
    last = [row["val_loss"] for row in rows if row["step"] == 4]
    assert len(set(last)) == 6
    assert max(last) < first[0]
    assert {row["model"] for row in rows} == {"tiny"}
    assert all({"command", "versions", "machine", "gate", "weights", "text_digest"} <= row.keys() for row in rows)

    before = Path("rows.jsonl").read_text()
    monkeypatch.setattr(sys, "argv", ["continued_training", *arguments, "--seeds", "0", "1"])
    original = benchmark.run
    asked = []
    monkeypatch.setattr(benchmark, "run", lambda case, *a, **o: asked.append(case.name) or original(case, *a, **o))
    capsys.readouterr()
    benchmark.main()
    assert asked == [f"{attention}-seed1-4x4x16-0.01" for attention in benchmark.ATTENTIONS]
    assert Path("rows.jsonl").read_text().startswith(before)
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    paired = benchmark.differences(rows)
    assert len(paired["dex", 4, 3]) == 2
    assert paired["softmax", 4, 3] == [0.0, 0.0]
    assert "| diff_v2 | 0 | 3 | 2 |" in capsys.readouterr().out


def test_a_run_that_was_cut_goes_on(arguments: list[str], monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["continued_training", *arguments, "--seeds", "0", "--attentions", "dex"])
    with monkeypatch.context() as patch:
        patch.setattr("diffattn.train.run._finish", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            benchmark.main()
    assert not Path("rows.jsonl").exists()
    benchmark.main()
    assert [json.loads(line)["step"] for line in Path("rows.jsonl").read_text().splitlines()] == [0, 2, 4, 4]
