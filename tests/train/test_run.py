"""What a run computes and writes, against the definitions; what it refuses; how it ends where numbers stop being."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.small_run import CONTEXT, RECIPE, StoppedError, assert_same_run, at, rows, run, small_model, stop

from diffattn.data.blocks import TrainingOrder, ValidationBlocks
from diffattn.data.packing import PreparedData
from diffattn.model.modeling import DiffTransformerForCausalLM
from diffattn.train.callbacks import read_metrics
from diffattn.train.run import speed, train

# A loss of about 5 in float32 that was summed in another order.
ROUNDING = 5e-6


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder) if "loss" in row]


def all_labels_loss(model: DiffTransformerForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Mean of −log p(next token), written out."""
    p = torch.log_softmax(model(ids).logits.float(), dim=-1)
    return -p[:, :-1].gather(2, ids[:, 1:, None]).mean()


@pytest.mark.parametrize("attention", ["softmax", "diff_v1", "diff_v2"])
def test_the_losses_are_those_of_a_plain_loop(attention: str, data: PreparedData, tmp_path: Path) -> None:
    """AdamW with decay on matrices alone, warmup and linear decay, clipping: the same numbers without the Trainer."""
    recipe = dataclasses.replace(RECIPE, weight_decay=0.5, max_grad_norm=1.3, learning_rate=5e-3)
    result = train(small_model(attention), data, recipe, tmp_path)

    model = small_model(attention)
    order = TrainingOrder(data.train, seed=0, num_samples=10**4)
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [w for w in weights if w.ndim == 2], "weight_decay": 0.5},
            {"params": [w for w in weights if w.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    warmup = 3
    for step, row in enumerate(row for row in rows(tmp_path) if "loss" in row):
        rising, falling = step / warmup, (recipe.steps - step) / (recipe.steps - warmup)
        rate = 5e-3 * min(rising, falling)
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids = torch.stack([order[step * recipe.batch_size + i]["input_ids"] for i in range(recipe.batch_size)])
        loss = all_labels_loss(model, ids)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.3)
        optimizer.step()
        assert row["step"] == step + 1
        assert row["tokens"] == (step + 1) * recipe.batch_size * CONTEXT
        assert row["learning_rate"] == pytest.approx(rate, rel=1e-12)
        assert row["loss"] == pytest.approx(loss.item(), abs=ROUNDING)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)

    blocks = ValidationBlocks(data.validation)
    with torch.no_grad():
        held_out = all_labels_loss(model, torch.stack([blocks[i]["input_ids"] for i in range(len(blocks))])).item()
    assert result.val_loss == pytest.approx(held_out, abs=ROUNDING)
    assert result.bits_per_byte == pytest.approx(held_out / math.log(2) / data.validation_bytes_per_token, abs=ROUNDING)
    trained = load_file(result.model_folder / "model.safetensors")
    assert all(torch.allclose(trained[n], w, atol=1e-4) for n, w in model.named_parameters() if n in trained)


class Halves(TrainingOrder):
    """Blocks that are cut in two."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = super().__getitem__(index)["input_ids"].view(2, -1)
        return {"input_ids": ids, "labels": ids}


def test_pieces_of_a_mixture_do_not_see_each_other(data: PreparedData, tmp_path: Path) -> None:
    def halves(order: TrainingOrder, batch_size: int) -> Halves:
        assert batch_size == RECIPE.batch_size * RECIPE.gradient_accumulation
        return Halves(order.blocks, seed=order.seed, num_samples=order.num_samples)

    cut = dataclasses.replace(data, mixture=halves)
    train(small_model("diff_v1"), cut, RECIPE, tmp_path / "cut")
    order = TrainingOrder(data.train, seed=RECIPE.seed, num_samples=RECIPE.batch_size)
    ids = torch.stack([order[index]["input_ids"] for index in range(RECIPE.batch_size)])
    with torch.no_grad():
        wanted = all_labels_loss(small_model("diff_v1"), ids.view(-1, CONTEXT // 2)).item()
    assert losses(tmp_path / "cut")[0] == pytest.approx(wanted, abs=ROUNDING)
    assert rows(tmp_path / "cut")[0]["tokens"] == RECIPE.tokens_per_step(CONTEXT)
    assert losses(tmp_path / "cut")[0] != pytest.approx(all_labels_loss(small_model("diff_v1"), ids).item(), abs=1e-3)


def test_the_columns_and_the_files_of_a_run(whole: Path, data: PreparedData) -> None:
    written = read_metrics(whole / "metrics.jsonl")
    steps = [row for row in written if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, RECIPE.steps + 1))
    assert {tuple(row) for row in steps} == {("step", "tokens", "seconds", "loss", "grad_norm", "learning_rate")}
    held_out = [row for row in written if "loss" not in row]
    assert {tuple(row) for row in held_out} == {("step", "tokens", "seconds", "val_loss", "val_blocks")}
    assert [(row["step"], row["val_blocks"]) for row in held_out] == [
        (4, 8), (8, 8), (11, 8), (11, len(data.validation)),
    ]  # fmt: skip
    assert {path.name for path in whole.iterdir()} == {
        "config.json", "metrics.jsonl", "result.json", "model", "checkpoint-11",
    }  # fmt: skip
    config = json.loads((whole / "config.json").read_text())
    assert config["recipe"] == RECIPE.to_dict()
    assert config["data"] == data.facts
    assert config["model"]["attention"] == "diff_v1"
    model = DiffTransformerForCausalLM.from_pretrained(whole / "model")
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_no_file_is_a_pickle(whole: Path) -> None:
    assert {path.suffix for path in whole.rglob("*") if path.is_file()} == {".json", ".jsonl", ".safetensors"}


def test_a_seed_gives_every_variant_the_same_blocks(data: PreparedData, tmp_path: Path, monkeypatch) -> None:
    recipe = dataclasses.replace(RECIPE, steps=3, evaluations=0)
    drawn: dict[tuple[str, int], list[int]] = {}
    original = TrainingOrder.__getitem__
    for attention, seed in [("softmax", 3), ("diff_v1", 3), ("diff_v2", 3), ("diff_v2", 4)]:
        seen = drawn[attention, seed] = []

        def watched(self: TrainingOrder, index: int, seen: list[int] = seen):
            seen.append(self.block_index(index))
            return original(self, index)

        with monkeypatch.context() as patch:
            patch.setattr(TrainingOrder, "__getitem__", watched)
            train(small_model(attention), data, dataclasses.replace(recipe, seed=seed), tmp_path / f"{attention}{seed}")
    first = drawn["softmax", 3]
    order = TrainingOrder(data.train, seed=3, num_samples=12)
    assert first == [order.block_index(i) for i in range(12)]
    assert drawn["diff_v1", 3] == drawn["diff_v2", 3] == first != drawn["diff_v2", 4]


def test_accumulated_gradients_are_those_of_the_whole_batch(data: PreparedData, tmp_path: Path) -> None:
    one = dataclasses.replace(RECIPE, batch_size=8)
    two = dataclasses.replace(RECIPE, batch_size=2, gradient_accumulation=4)
    for name, recipe in (("one", one), ("two", two)):
        run(data, tmp_path / name, recipe)
    for whole, parts in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert whole.keys() == parts.keys()
        for key, value in whole.items():
            assert parts[key] == pytest.approx(value, rel=1e-4 if key == "grad_norm" else 5e-6), (whole, parts)


def test_without_clipping_the_norm_is_still_reported(data: PreparedData, whole: Path, tmp_path: Path) -> None:
    run(data, tmp_path, dataclasses.replace(RECIPE, max_grad_norm=0.0))
    assert rows(tmp_path)[0]["grad_norm"] == pytest.approx(rows(whole)[0]["grad_norm"])


@pytest.mark.parametrize(
    ("fields", "rates"),
    [
        ({"steps": 1}, [1]),
        ({"steps": 3, "warmup_fraction": 0.0}, [1, 2 / 3, 1 / 3]),
        ({"steps": 4, "warmup_fraction": 0.5}, [0, 1 / 2, 1, 1 / 2]),
        ({"steps": 2, "warmup_fraction": 0.99}, [0, 1]),
    ],
)
def test_the_schedule_of_short_runs(fields: dict, rates: list[float], data: PreparedData, tmp_path: Path) -> None:
    run(data, tmp_path, dataclasses.replace(RECIPE, **fields))
    given = [row["learning_rate"] for row in rows(tmp_path) if "loss" in row]
    assert given == pytest.approx([rate * RECIPE.learning_rate for rate in rates])


def test_bfloat16_computes_in_bfloat16_over_float32_weights_and_resumes_exactly(
    data: PreparedData, whole: Path, tmp_path: Path
) -> None:
    recipe = dataclasses.replace(RECIPE, dtype="bfloat16")
    run(data, tmp_path / "a", recipe)
    with pytest.raises(StoppedError):
        run(data, tmp_path / "b", recipe, on_progress=at(8, stop))
    run(data, tmp_path / "b", recipe, resume=True)
    assert_same_run(tmp_path / "b", tmp_path / "a")
    differences = [abs(a - b) for a, b in zip(losses(tmp_path / "a"), losses(whole), strict=True)]
    assert 1e-4 < max(differences) < 0.05
    weights = load_file(tmp_path / "a" / "model" / "model.safetensors").values()
    assert {weight.dtype for weight in weights} == {torch.float32}


def test_speed_is_the_median_of_the_settled_steps() -> None:
    seconds = [9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 1.0, 2.0, 5.0]
    times = [sum(seconds[: i + 1]) for i in range(len(seconds))]
    table = [{"step": i, "tokens": 100 * (i + 1), "seconds": t, "loss": 0.0} for i, t in enumerate(times)]
    assert speed([*table, {"step": 9, "tokens": 900, "seconds": 0.0, "val_loss": 0.0}]) == pytest.approx(100 / 2)
    assert speed(table[:1]) == pytest.approx(100 / 9)
    assert math.isnan(speed([]))
