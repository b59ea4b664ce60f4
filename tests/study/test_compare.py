import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_comparison import write_shape, write_text

from diffattn.errors import ConfigError, DataError
from diffattn.model.modeling import DiffTransformerForCausalLM
from diffattn.ops.cpu import build
from diffattn.plan.cost import flops_per_token
from diffattn.study import compare as module
from diffattn.study.compare import compare
from diffattn.study.options import CompareOptions
from diffattn.train.callbacks import read_metrics
from diffattn.train.masked import HELD_OUT, MaskedSamples

MEASURES = {
    "parameters", "attention_parameters", "val_loss", "bits_per_byte", "train_tokens_per_second", "train_peak_bytes",
    "cache_bytes_per_token", "model_flops_per_token", "executed_flops_per_token", "checkpoint_bytes", "load_seconds",
    "first_token_seconds",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffattn.cache.cache_folder", lambda: tmp_path / "cache")


def options(folder: Path, **changes: Any) -> CompareOptions:
    defaults = {"shape": write_shape(folder), "text": write_text(folder), "steps": 6, "dtype": "float32"}
    return CompareOptions(**(defaults | changes))


def rows_without_time(run: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if key != "seconds"} for row in read_metrics(run / "metrics.jsonl")
    ]


def test_result_has_what_is_promised(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = compare(options(tmp_path), out=out, command="the command")
    assert json.dumps(result.to_json(), indent=1) == (out / "result.json").read_text().strip()
    result = json.loads((out / "result.json").read_text())
    assert list(result["variants"]) == ["softmax", "diff_v1", "diff_v2"]
    for name, row in result["variants"].items():
        assert set(row) >= MEASURES
        assert len(row["val_loss"]) == len(row["bits_per_byte"]) == 2
        model = DiffTransformerForCausalLM.from_pretrained(out / f"{name}-seed0" / "model")
        assert row["parameters"] == sum(parameter.numel() for parameter in model.parameters())
        attention = [value for key, value in model.named_parameters() if "self_attn" in key]
        assert row["attention_parameters"] == sum(parameter.numel() for parameter in attention)
        assert row["checkpoint_bytes"] == (out / f"{name}-seed0/model/model.safetensors").stat().st_size
        for measured in ("train_tokens_per_second", "load_seconds", "first_token_seconds"):
            assert row[measured] > 0
    softmax, v1, v2 = result["variants"].values()
    # λ (4 vectors of 8) and the gain (16) in each of 2 layers.
    assert v1["parameters"] - softmax["parameters"] == 2 * (4 * 8 + 2 * 8)
    assert abs(v2["parameters"] / softmax["parameters"] - 1) < 0.005
    assert v1["cache_bytes_per_token"] == v2["cache_bytes_per_token"] == softmax["cache_bytes_per_token"]
    assert softmax["attention_backend"] == "standard"
    for name, row in (("diff_v1", v1), ("diff_v2", v2)):
        assert row["attention_backend"] == ("fused_cpu" if build.unavailable(torch.float32) is None else "standard")
        shape = DiffTransformerForCausalLM.from_pretrained(out / f"{name}-seed0" / "model").config.shape()
        flops = flops_per_token(shape, name, context=result["recipe"]["context"], backend=row["attention_backend"])
        assert row["executed_flops_per_token"] == flops.executed
    assert set(result["pairs"]) == {"diff_v1", "diff_v2"}
    for pair in result["pairs"].values():
        assert pair["val_loss_difference"]["low"] <= pair["val_loss_difference"]["high"]
        assert any(word in pair["verdict"] for word in ("lower", "higher", "no difference seen"))
    assert {"recipe", "versions", "data"} <= set(result)
    page = (out / "report.html").read_text()
    assert result["pairs"]["diff_v2"]["verdict"] in page
    assert "the command" in page
    assert (out / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_variants_of_a_seed_see_the_same_blocks_in_the_same_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[torch.Tensor]] = []
    build = module.build_pair

    def watched(*args: Any, **kwargs: Any) -> Any:
        pair = build(*args, **kwargs)
        blocks: list[torch.Tensor] = []
        seen.append(blocks)
        pair.model.model.embed_tokens.register_forward_pre_hook(
            lambda module, inputs: blocks.append(inputs[0].clone()) if module.training else None
        )
        return pair

    monkeypatch.setattr(module, "build_pair", watched)
    compare(options(tmp_path, steps=4), out=tmp_path / "out")
    runs = [torch.cat(blocks) for blocks in seen[3:]]  # the first three measure a step
    assert len(runs) == 6
    for seed in range(2):
        for variant in range(1, 3):
            assert torch.equal(runs[3 * seed], runs[3 * seed + variant])
    assert not torch.equal(runs[0], runs[3])


def test_an_interrupted_comparison_resumes_to_the_same_losses(tmp_path: Path) -> None:
    settings = options(tmp_path, variants=("softmax", "diff_v1"), seeds=1)
    whole = compare(settings, out=tmp_path / "whole")

    def interrupt(attention: str, seed: int, progress: Any) -> None:
        if attention == "diff_v1" and progress.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(settings, out=tmp_path / "cut", on_progress=interrupt)
    assert not (tmp_path / "cut/result.json").exists()
    resumed = compare(None, out=tmp_path / "cut", resume=True)
    for name in ("softmax", "diff_v1"):
        assert resumed.variants[name].val_loss == whole.variants[name].val_loss
        assert rows_without_time(tmp_path / f"cut/{name}-seed0") == rows_without_time(tmp_path / f"whole/{name}-seed0")


def test_match_shape_keeps_the_widths_and_reports_the_surplus(tmp_path: Path) -> None:
    result = compare(options(tmp_path, match="shape", seeds=1, steps=2), out=tmp_path / "out")
    assert result.variants["diff_v2"].intermediate_size == 64
    ratio = result.pairs["diff_v2"].parameters_ratio
    assert ratio > 1.01
    assert f"with {ratio - 1:+.1%} parameters" in result.pairs["diff_v2"].verdict


def test_minutes_decide_the_steps(tmp_path: Path) -> None:
    notes: list[str] = []
    compare(
        options(tmp_path, steps=None, minutes=0.01, variants=("softmax",), seeds=1), out=tmp_path / "out",
        on_note=notes.append,
    )  # fmt: skip
    assert any("1 runs of 1 steps" in note and "0.01 minutes" in note for note in notes)


def test_maps_of_the_page_are_the_models_own(tmp_path: Path) -> None:
    from diffattn.probes.lens import attention_maps

    compare(options(tmp_path, seeds=1, steps=2), out=tmp_path / "out")
    ids = torch.arange(5, 17)[None]
    for name in ("softmax", "diff_v1", "diff_v2"):
        model = DiffTransformerForCausalLM.from_pretrained(tmp_path / f"out/{name}-seed0/model")
        maps = attention_maps(model, ids, layer=1, head=1)
        map_pos = torch.tensor(maps.map_pos)
        torch.testing.assert_close(map_pos.sum(-1), torch.ones(12))
        assert map_pos.triu(1).abs().max() == 0
        assert model.config._attn_implementation == ("sdpa" if name == "softmax" else "diff_fused")
        if name != "softmax":
            # Rows of the subtracted map sum to 1 − λ.
            lam = torch.tensor(maps.lam).expand(12)
            torch.testing.assert_close(torch.tensor(maps.map_diff).sum(-1), 1 - lam)
            torch.testing.assert_close(torch.tensor(maps.lam_map_neg).sum(-1), lam)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"variants": ("softmax", "diff_v9")}, ["diff_v9", "diff_v1"]),
        ({"variants": ("softmax", "softmax")}, ["at least one, each once"]),
        ({"seeds": 0}, ["seeds is 0", "from 1 to 1,000"]),
        ({"steps": -3}, ["steps is -3", "at least 1"]),
        ({"steps": 3, "minutes": 2.0}, ["steps is 3", "minutes is 2.0", "leave one out"]),
        ({"steps": None, "minutes": 0.0}, ["minutes is 0.0"]),
        ({"match": "size"}, ["match is 'size'"]),
        ({"batch_size": 0}, ["batch_size is 0"]),
        ({"learning_rate": float("nan")}, ["learning_rate is nan"]),
    ],
)
def test_options_that_cannot_work_are_refused(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        options(tmp_path, **changes)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


def test_nothing_is_written_for_bad_text_or_shape(tmp_path: Path) -> None:
    good = options(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        compare(CompareOptions(shape=good.shape, text=str(tmp_path / "absent.txt"), steps=2), out=tmp_path / "out")
    with pytest.raises(ConfigError, match="context is 64"):
        compare(CompareOptions(shape=good.shape, text=good.text, context=64), out=tmp_path / "out")
    odd = write_shape(tmp_path, num_heads=3, num_kv_heads=3, hidden_size=48)
    with pytest.raises(ConfigError, match="num_heads=3 for diff_v1; wanted a multiple of 2"):
        compare(CompareOptions(shape=odd, text=good.text), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_and_changed_options_are_refused(tmp_path: Path) -> None:
    settings = options(tmp_path, variants=("softmax",), seeds=1, steps=2)
    compare(settings, out=tmp_path / "out")
    with pytest.raises(ConfigError, match="is not empty"):
        compare(settings, out=tmp_path / "out")
    with pytest.raises(ConfigError, match="was started with steps = 2, and 3 is given"):
        compare(CompareOptions(steps=3), out=tmp_path / "out", resume=True)
    with pytest.raises(ConfigError, match="no comparison to resume"):
        compare(settings, out=tmp_path / "absent", resume=True)


def test_encoders_are_compared_on_the_same_hidden_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForMaskedLM

    asked: list[list[Any]] = []

    class Recorded(MaskedSamples):
        def __init__(self, samples: Any, tokenizer: Any, *, seed: int) -> None:
            super().__init__(samples, tokenizer, seed=seed)
            if seed != HELD_OUT:
                asked.append([])

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            sample = super().__getitem__(index)
            asked[-1].append((self.seed, index, sample["input_ids"].tolist(), sample["labels"].tolist()))
            return sample

    monkeypatch.setattr("diffattn.train.run.MaskedSamples", Recorded)
    out = tmp_path / "out"
    result = compare(options(tmp_path, objective="mlm", seeds=1, steps=4), out=out)
    claims = [json.loads((out / f"{name}-seed0/config.json").read_text()) for name in result.variants]
    assert [claim["recipe"]["objective"] for claim in claims] == ["mlm"] * 3
    assert claims[0]["data"] == claims[1]["data"] == claims[2]["data"]
    for name, row in result.variants.items():
        assert (row.bits_per_byte, row.cache_bytes_per_token) == (None, None)
        assert row.first_token_seconds > 0
        model = AutoModelForMaskedLM.from_pretrained(out / f"{name}-seed0/model")
        assert not model.config.is_causal
        assert row.parameters == model.num_parameters()
        shape = model.config.shape()
        flops = flops_per_token(shape, name, context=32, backend=row.attention_backend, causal=False)
        assert (row.model_flops_per_token, row.executed_flops_per_token) == (flops.model, flops.executed)
        assert flops.model > flops_per_token(shape, name, context=32).model
    assert len(asked) == 3
    assert asked[0] == asked[1] == asked[2]
    page = (out / "report.html").read_text()
    assert "grey is the future" not in page
    assert "Bits per byte" not in page
    again = compare(None, out=out, resume=True)
    assert again.variants["diff_v1"].val_loss == result.variants["diff_v1"].val_loss


def test_an_unknown_objective_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="objective is 'bert'; wanted one of clm, mlm"):
        options(tmp_path, objective="bert")
