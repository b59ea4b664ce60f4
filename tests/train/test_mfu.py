"""MFU: the model FLOPs of what is trained in a second over the peak of all GPUs, where a card's peak is known."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.distributed
from support.small_run import CONTEXT, RECIPE, SHAPE, run

from diffattn.data.packing import PreparedData
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.modeling import DiffTransformerForCausalLM
from diffattn.plan.cost import flops_per_token
from diffattn.train import callbacks
from diffattn.train.callbacks import Progress, peak_tokens_per_second, read_metrics
from diffattn.variants import ATTENTIONS, VARIANTS


def peak(
    card: str,
    monkeypatch: pytest.MonkeyPatch,
    *,
    attention: str = "diff_v2",
    device: str = "cuda",
    dtype: str = "bfloat16",
) -> float | None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: card)
    recipe = dataclasses.replace(RECIPE, dtype=dtype)
    # A recipe refuses a GPU that is not there.
    object.__setattr__(recipe, "device", device)
    return peak_tokens_per_second(DiffTransformerConfig.from_shape(SHAPE, attention), recipe, CONTEXT)


def test_the_peak_is_the_rate_of_the_card_over_the_model_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    model = DiffTransformerForCausalLM(DiffTransformerConfig.from_shape(SHAPE, "diff_v2"))
    flops = flops_per_token(model.config.shape(), "diff_v2", context=CONTEXT).model
    # At least six FLOPs for each weight of a product.
    assert flops > 6 * sum(weight.numel() for name, weight in model.named_parameters() if "_proj" in name)
    assert peak("NVIDIA H100 80GB HBM3", monkeypatch) == 989e12 / flops
    assert peak("NVIDIA A100-SXM4-80GB", monkeypatch, dtype="float32") == 19.5e12 / flops


def test_the_peak_is_that_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = peak("NVIDIA H200", monkeypatch)
    assert alone is not None
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 8)
    assert peak("NVIDIA H200", monkeypatch) == 8 * alone


def test_an_unknown_machine_has_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak("NVIDIA H100 PCIe", monkeypatch) is None
    assert peak("NVIDIA H100 80GB HBM3", monkeypatch, device="cpu") is None


@pytest.mark.parametrize("attention", list(ATTENTIONS))
def test_every_variant_whose_flops_are_counted_has_a_peak(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (peak("NVIDIA H200", monkeypatch, attention=attention) is not None) == (attention in VARIANTS)


def test_rows_and_progress_have_it_where_the_peak_is_known(
    data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Progress] = []
    monkeypatch.setattr("diffattn.train.run.peak_tokens_per_second", lambda *of_the_run: 1e7)
    run(data, tmp_path, on_progress=seen.append)
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row]
    took = [after["seconds"] - before["seconds"] for before, after in itertools.pairwise(rows)]
    tokens = RECIPE.tokens_per_step(CONTEXT)
    # The seconds of a row are rounded to 0.1 ms.
    for row, seconds in zip(rows[1:], took, strict=True):
        assert row["mfu"] == pytest.approx(tokens / seconds / 1e7, rel=0.1)
    for step in seen:
        assert step.mfu == pytest.approx(step.tokens_per_second / 1e7)


def test_rows_of_an_unknown_machine_have_none(whole: Path) -> None:
    assert all("mfu" not in json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines())


def test_a_row_whose_mfu_is_no_number_is_none_of_ours() -> None:
    row = {"step": 1, "tokens": 1, "seconds": 1.0, "loss": 1.0, "mfu": 0.5}
    assert len(callbacks.parse_metrics(json.dumps(row).encode() + b"\n")) == 1
    assert callbacks.parse_metrics(json.dumps(row | {"mfu": "fast"}).encode() + b"\n") == []
