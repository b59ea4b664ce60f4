"""A run that takes half a second: a model of 20 thousand parameters on text of a few words."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.small_comparison import write_text

from diffattn.data.packing import PreparedData, prepare_data
from diffattn.model.modeling import DiffTransformerForCausalLM
from diffattn.model.pairing import build_pair
from diffattn.plan.shape import ModelShape
from diffattn.train.callbacks import Progress, read_metrics
from diffattn.train.recipe import Recipe
from diffattn.train.run import TrainResult, train

SHAPE = ModelShape(
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=64,
    vocab_size=300,
    max_position_embeddings=32,
)
CONTEXT = 32
# Evaluations at 4, 8 and 11, checkpoints at 3, 6, 9 and 11: apart, together at the end, and none of them dividing 11.
RECIPE = Recipe(
    steps=11,
    batch_size=4,
    evaluations=3,
    evaluation_blocks=8,
    checkpoints=4,
    warmup_fraction=0.2,
    device="cpu",
    dtype="float32",
)
# What must be equal to the last bit; the seconds cannot be.
EXACT = ("step", "tokens", "loss", "grad_norm", "learning_rate", "val_loss", "val_blocks")


class StoppedError(Exception):
    """Ends a run, as an error of any kind would."""


def stop() -> None:
    raise StoppedError


def at(step: int, action: Callable[[], object]) -> Callable[[Progress], None]:
    """For ``on_progress``: do something when a step is done and its row is written."""

    def on_progress(progress: Progress) -> None:
        if progress.step == step:
            action()

    return on_progress


def prepare(folder: Path) -> PreparedData:
    """The text, and its tokens in a cache beside it; a second call finds both."""
    text = folder / "text"
    if not text.exists():
        write_text(folder)
    return prepare_data(text, vocab_size=SHAPE.vocab_size, context=CONTEXT, cache_dir=folder / "cache")


def small_model(attention: str = "diff_v1", *, seed: int = 0) -> DiffTransformerForCausalLM:
    return build_pair(SHAPE, attention, seed=seed).model


def run(data: PreparedData, out: Path, recipe: Recipe = RECIPE, **options: Any) -> TrainResult:
    return train(small_model(seed=recipe.seed), data, recipe, out, **options)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [{key: row[key] for key in EXACT if key in row} for row in read_metrics(folder / "metrics.jsonl")]


def without_seals(folder: Path) -> None:
    """Make of a run folder what a version wrote that sealed nothing but checkpoints."""
    for name in ("config.json", "result.json"):
        if (folder / name).exists():
            content = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps({k: v for k, v in content.items() if k not in ("seal", "files")}))
    for manifest in folder.glob("checkpoint-*/manifest.json"):
        named = json.loads(manifest.read_text())
        manifest.write_text(json.dumps({name: facts for name, facts in named.items() if not name.startswith("../")}))


def checkpoint_steps(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*") if path.suffix != ".partial")


def partials(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*.partial")]


def assert_same_run(actual: Path, expected: Path) -> None:
    """Two finished runs: every row, the trained weights and the result to the last bit, and nothing half-written."""
    assert rows(actual) == rows(expected)
    weights = "model/model.safetensors"
    assert (actual / weights).read_bytes() == (expected / weights).read_bytes()
    losses = [json.loads((folder / "result.json").read_text())["val_loss"] for folder in (actual, expected)]
    assert losses[0] == losses[1]
    seconds = [row["seconds"] for row in read_metrics(actual / "metrics.jsonl")]
    assert seconds == sorted(seconds)
    assert partials(actual) == []
    assert checkpoint_steps(actual) == checkpoint_steps(expected)
