"""Models beside llama.cpp: the GGUF file of a softmax model, the requests of a child, and rows that are kept."""

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from support.comparison import compare
from support.small_folders import small_folder
from support.small_models import SHAPE, small_model

from benchmarks import consumer, consumer_tables
from benchmarks.consumer_engines import PIECE, LlamaCpp, Session, Torch
from benchmarks.consumer_forms import Form, forms, held_out, llama_options
from benchmarks.llama_gguf import gguf_tensors, neighbours, write_gguf
from diffattn.convert.llama import to_llama

# llama.cpp's quantisers want rows of whole blocks of 32, and its attention an even number of channels.
LLAMA = replace(SHAPE, hidden_size=64, intermediate_size=96, vocab_size=300)


def turned(x: np.ndarray, pairs: list[tuple[int, int]], place: int) -> np.ndarray:
    """A vector (d) whose pairs of channels are turned by the angles of a place."""
    out = x.copy()
    for index, (a, b) in enumerate(pairs):
        angle = place * 10000 ** (-2 * index / len(x))
        out[a] = x[a] * math.cos(angle) - x[b] * math.sin(angle)
        out[b] = x[a] * math.sin(angle) + x[b] * math.cos(angle)
    return out


def test_rows_of_queries_and_keys_change_places_so_that_neighbouring_channels_turn_together() -> None:
    random = np.random.default_rng(0)
    width, heads, inputs = 10, 3, 7
    query, key = (random.normal(size=(heads * width, inputs)).astype(np.float32) for _ in range(2))
    x, y = random.normal(size=(2, inputs))
    halves = [(i, i + width // 2) for i in range(width // 2)]
    beside = [(2 * i, 2 * i + 1) for i in range(width // 2)]

    def scores(query: np.ndarray, key: np.ndarray, pairs: list[tuple[int, int]]) -> np.ndarray:
        q, k = (query @ x).reshape(heads, width), (key @ y).reshape(heads, width)
        return np.array([turned(q[h], pairs, 11) @ turned(k[h], pairs, 3) for h in range(heads)])

    expected = scores(query, key, halves)
    np.testing.assert_allclose(scores(neighbours(query, heads), neighbours(key, heads), beside), expected, rtol=1e-5)
    assert np.abs(scores(query, key, beside) - expected).max() > 0.1


@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_of_the_model_has_its_place_in_the_file(tied: bool) -> None:
    model = small_model("softmax", shape=LLAMA, tie_word_embeddings=tied)
    config, tensors = to_llama(model.config.to_dict(), model.state_dict())
    named = gguf_tensors(config, {name: tensor.numpy() for name, tensor in tensors.items()})
    tops = {"token_embd.weight", "output_norm.weight"} | (set() if tied else {"output.weight"})
    layer = {"attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"}
    expected = {f"blk.{index}.{name}.weight" for index in range(LLAMA.num_layers) for name in layer}
    assert set(named) - {"output.weight"} == (tops | expected) - {"output.weight"}
    assert ("output.weight" in named) <= (not tied)
    assert named["blk.1.attn_k.weight"].shape == (LLAMA.num_kv_heads * LLAMA.head_dim, LLAMA.hidden_size)


def test_llama_cpp_gives_the_logits_of_the_softmax_model(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp is installed by make consumer alone")
    folder = small_folder(tmp_path / "softmax", "softmax", hidden_size=64, intermediate_size=96)
    write_gguf(folder, tmp_path / "softmax.gguf")
    ids = np.random.default_rng(0).integers(300, size=70)
    model = Torch(folder, 1)
    eager = torch.from_numpy(model.read(ids, every=True))
    exact = model.model.double()(torch.from_numpy(ids[None])).logits[0]
    engine = LlamaCpp(tmp_path / "softmax.gguf", 1, flash=False, cache=llama_cpp.GGML_TYPE_F32)
    compare(torch.from_numpy(engine.read(ids, every=True)), exact, eager, factor=4)
    # Behind a cache, and after what was written is given up.
    engine.begin()
    engine.read(ids[:40], every=False)
    engine.keep()
    for _ in range(2):
        compare(torch.from_numpy(engine.read(ids[40:], every=True)), exact[40:], eager[40:], factor=4)
        engine.back()


def test_llama_cpp_takes_flash_attention_where_registers_divide_a_head(tmp_path: Path) -> None:
    for width, options in ((10, ["--no-flash"]), (16, [])):
        folder = tmp_path / str(width)
        small_model("softmax", shape=replace(LLAMA, head_dim=width)).save_pretrained(folder)
        assert llama_options({"softmax": folder}) == options


class Counting:
    """An engine whose logits say what it was asked: token t + 1 is the likeliest behind token t."""

    def __init__(self) -> None:
        self.held: list[int] = []
        self.longest = 0

    def read(self, ids: np.ndarray, every: bool) -> np.ndarray:
        self.held += ids.tolist()
        self.longest = max(self.longest, len(ids))
        logits = np.zeros((len(ids), 50), np.float32)
        logits[np.arange(len(ids)), (ids + 1) % 50] = 3.0
        return logits if every else logits[-1:]

    def begin(self) -> None:
        self.held = []

    def keep(self) -> None:
        self.kept = len(self.held)

    def back(self) -> None:
        self.held = self.held[: self.kept]


def test_a_child_decodes_behind_the_same_tokens_in_every_round() -> None:
    session = Session(engine := Counting())
    prompt = [7] * PIECE + [9, 10, 11]
    session.prefill(prompt)
    assert engine.longest == PIECE
    for _ in range(2):
        assert session.decode(4)[1] == [12, 13, 14, 15]
        assert engine.held == prompt


def test_losses_are_those_of_the_scored_tokens() -> None:
    certain = math.log(math.exp(3) + 49) - 3
    session = Session(Counting())
    assert session.losses([4, 5, 6, 9], 1) == pytest.approx([certain, certain, certain + 3])
    assert session.losses([4, 5, 6, 9], 3) == pytest.approx([certain + 3])


def test_losses_and_texts_of_a_model_are_its_own(tmp_path: Path) -> None:
    engine = Torch(small_folder(tmp_path / "v2", "diff_v2"), 1)
    ids = np.random.default_rng(0).integers(300, size=30)
    given = torch.from_numpy(ids[None])
    with torch.no_grad():
        logits = engine.model(given).logits[0]
        text = engine.model.generate(given, max_new_tokens=6, do_sample=False)[0, 30:].tolist()
    expected = torch.nn.functional.cross_entropy(logits[9:-1], given[0, 10:], reduction="none")
    session = Session(engine)
    np.testing.assert_allclose(session.losses(ids.tolist(), 10), expected.numpy(), atol=1e-5)
    session.prefill(ids.tolist())
    assert session.decode(6)[1] == session.decode(6)[1] == text


def test_forms_that_take_turns_have_equal_bits_and_llama_cpp_among_them() -> None:
    for bits in (32, 16, 8, 4):
        group = forms(["softmax", "diff_v2"], bits, shipped=True)
        assert {form.bits for form in group} == {bits}
        assert group[0].engine == "llama.cpp"
        assert {form.attention for form in group if form.engine == "llama.cpp"} == {"softmax"}
        assert {form.attention for form in group} == {"softmax", "diff_v2"}
        assert len(set(group)) == len(group)


def test_tokens_are_those_of_held_out_documents(tmp_path: Path) -> None:
    from diffattn.data.text import read_corpus, split_by_document
    from diffattn.model.loading import load_tokenizer

    folder = small_folder(tmp_path / "softmax", "softmax")
    rows = [json.dumps({"text": f"lower {index} wider " * 50}) for index in range(100)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    ids = held_out(str(tmp_path / "rows.jsonl"), folder, 100)
    documents = split_by_document(read_corpus(tmp_path / "rows.jsonl")).validation
    assert load_tokenizer(folder).decode(ids) == documents[0].text[: len(load_tokenizer(folder).decode(ids))]
    with pytest.raises(SystemExit, match="at least 100000 are wanted: choose a longer text"):
        held_out(str(tmp_path / "rows.jsonl"), folder, 100_000)


class Answering:
    """A child that answers at once; the loss of a token depends on the engine and the bits of the path."""

    started: ClassVar[list[str]] = []

    def __init__(self, engine: str, path: Path, threads: int, *options: str) -> None:
        self.started.append(engine)
        self.nats = 2.0 + 0.1 * ("int4" in str(path) or "Q4" in str(path))
        self.start = {"load_seconds": 0.1, "first_token_seconds": 0.2, "process_to_token_seconds": 0.3}
        if engine == "memory":
            self.start = {"read_bytes_per_second": 1e9}

    def ask(self, name: str, *given: Any) -> Any:
        if name == "losses":
            ids, scored = given
            return [self.nats + 0.001 * (token % 7) for token in ids[scored:]]
        return {"prefill": 0.5, "decode": (0.25, [1]), "peak": 1000}[name]

    def end(self) -> None:
        pass


def test_rows_that_are_there_are_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small_folder(tmp_path / "softmax", "softmax")
    monkeypatch.setattr(consumer, "Child", Answering)
    monkeypatch.setattr(consumer, "version", lambda name: "1")
    monkeypatch.setattr(consumer, "held_out", lambda text, source, tokens: np.arange(tokens) % 300)
    paths = lambda models, group, at: {form: Path(form.format) for form in group}  # noqa: E731
    monkeypatch.setattr(consumer, "prepare", paths)
    out = tmp_path / "rows.jsonl"
    arguments = argparse.Namespace(
        models=[str(folder)], name="small", measure=["perplexity", "speed"], bits=[32, 4], text="sotu", tokens=600,
        context=None, rounds=2, starts=1, steps=8, threads=1, llama_bench=None, folder=tmp_path, out=out,
    )  # fmt: skip
    consumer.run(arguments)
    rows = consumer.rows_of(out)
    assert len(rows) == 2 * (len(forms(["softmax"], 32, False)) + len(forms(["softmax"], 4, False)))
    worse = {row["format"]: row["perplexity_ratio_to_float32"] for row in rows if row["measure"] == "perplexity"}
    assert worse["F32"]["mean"] == 1.0
    assert worse["int4"]["mean"] == pytest.approx(math.exp(0.1), rel=1e-4)
    assert worse["int4"]["low"] <= worse["int4"]["mean"] <= worse["int4"]["high"]
    speed = next(row for row in rows if row["measure"] == "speed" and row["format"] == "int4")
    assert speed["tokens_per_second"]["decoding 2048"]["median"] == 32.0
    assert set(speed["ratio_to"]) == {"softmax llama.cpp Q4_0", "softmax llama.cpp Q4_1"}
    share = speed["bytes_per_token"]["2048"] * 32.0 / 1e9
    assert speed["share_of_read_bandwidth"]["2048"] == pytest.approx(share, abs=1e-4)

    Answering.started.clear()
    consumer.run(arguments)
    assert consumer.rows_of(out) == rows
    # One that was lost is measured again alone, beside the float32 row that is there.
    lost = [row for row in rows if not (row["measure"] == "perplexity" and row["format"] == "int4")]
    out.write_text("".join(json.dumps(row) + "\n" for row in lost))
    consumer.run(arguments)
    assert Answering.started == ["onnxruntime"]
    again = consumer.rows_of(out)[-1]
    assert Form("softmax", "onnxruntime", 4, "int4") == Form(
        *(again[k] for k in ("attention", "engine", "bits", "format"))
    )
    assert again["perplexity_ratio_to_float32"] == worse["int4"]


def measured(worse: float, times: float) -> list[dict[str, Any]]:
    """The two rows of an int4 model."""
    form = {"model": "30M", "attention": "diff_v2", "engine": "onnxruntime", "bits": 4, "format": "int4"}
    phases = {"prefill": {"median": 1234.5}, "decoding 128": {"median": 99.06}, "decoding 2048": {"median": 49.0}}
    ratios = {"decoding 128": {"median": 0.93}, "decoding 2048": {"median": times}}
    return [
        {"measure": "perplexity", **form,
         "perplexity_ratio_to_float32": {"mean": worse, "low": worse - 0.01, "high": worse + 0.01}},
        {"measure": "speed", **form, "tokens_per_second": phases, "first_token_seconds": {"median": 0.234},
         "file_bytes": 24e6, "peak_bytes": 111e6, "share_of_read_bandwidth": {"128": 0.21, "2048": 0.17},
         "ratio_to": {"softmax llama.cpp Q4_0": ratios}},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("worse", "times", "verdict"), [(1.03, 0.8, "kept"), (1.031, 0.8, "not kept"), (1.03, 0.79, "not kept")]
)
def test_four_bits_are_advised_where_both_limits_are_kept(
    worse: float, times: float, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer_tables, "RESULTS", tmp_path / "rows.jsonl")
    rows = [*measured(2.0, 0.1), *measured(worse, times)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert consumer_tables.verdicts() == (
        f"- 30M, V2, int4: perplexity {worse - 1:+.1%} (wanted: at most +3%), 0.93 and {times:.2f} times llama.cpp's "
        f"Q4_0 behind 128 and 2,048 (wanted: 0.8): {verdict}."
    )
    assert consumer_tables.table().splitlines()[2:] == [
        f"| 30M, V2 | onnxruntime int4 | {worse:.3f} ({worse - 0.01:.3f} to {worse + 0.01:.3f}) | 24 | 111 | 0.23 "
        "| 1,234 | 99.1 | 49.0 | 21% / 17% |"
    ]
