"""A model that is there, trained on: its tokens, the loss before the first step, DEX, resuming, what is refused."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.small_run import (
    RECIPE,
    SHAPE,
    StoppedError,
    assert_same_run,
    at,
    checkpoint_steps,
    rows,
    small_model,
    stop,
)
from torch import nn
from transformers import PreTrainedTokenizerFast

from diffattn.cli.main import main
from diffattn.convert.llama import to_dex, to_diff_v2
from diffattn.data.blocks import ValidationBlocks
from diffattn.data.packing import PreparedData, prepare_data
from diffattn.errors import CheckpointError, ConfigError
from diffattn.model.configuration import DiffTransformerConfig, lambda_init_schedule
from diffattn.model.modeling import DiffTransformerForCausalLM
from diffattn.train import run as running
from diffattn.train.callbacks import DexAnnealing
from diffattn.train.continued import CONTEXT, continue_training
from diffattn.train.recipe import Recipe
from diffattn.train.run import train

ATTENTIONS = ("softmax", "diff_v2", "dex")
# Below float32's own error in a loss of about 6.
ROUNDING = 5e-6


@torch.no_grad()
def held_out(model: nn.Module, data: PreparedData, blocks: int) -> float:
    """Mean of −log p(next token) over the first held-out blocks, written out."""
    ids = torch.stack([ValidationBlocks(data.validation)[i]["input_ids"] for i in range(blocks)])
    p = torch.log_softmax(model(ids).logits, dim=-1)
    return -p[:, :-1].gather(2, ids[:, 1:, None]).mean().item()


def write_model(folder: Path, model: DiffTransformerForCausalLM, data: PreparedData) -> Path:
    model.save_pretrained(folder)
    data.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def models(data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A softmax model and what it is converted to, each with its tokenizer."""
    folder, softmax = tmp_path_factory.mktemp("models"), small_model("softmax", seed=5)
    config, weights = softmax.config.to_diff_dict(), softmax.state_dict()
    found = {"softmax": write_model(folder / "softmax", softmax, data)}
    for name, convert in (("diff_v2", to_diff_v2), ("dex", to_dex)):
        made, tensors = convert(config, weights)
        model = DiffTransformerForCausalLM(DiffTransformerConfig.from_dict(made))
        model.load_state_dict(tensors, strict=False)
        found[name] = write_model(folder / name, model, data)
    return found


@pytest.fixture(autouse=True)
def _cache(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The text's alone: the compiled kernel's stays where it is.
    monkeypatch.setattr("diffattn.cache.cache_folder", lambda: text / "cache")


@pytest.fixture
def go(text: Path) -> Callable[..., running.TrainResult]:
    """Continue from a folder with the small recipe."""

    def go(source: Path, out: Path, recipe: Recipe = RECIPE, **options) -> running.TrainResult:
        return continue_training(source, recipe, out, text=str(text / "text"), **options)

    return go


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_row_before_the_first_step_and_then_the_run_of_the_model(
    attention: str, models: dict[str, Path], text: Path, go, tmp_path: Path
) -> None:
    """The text is in the tokens of the folder's tokenizer; the losses are those of training that model."""
    result = go(models[attention], tmp_path / "continued")
    model = DiffTransformerForCausalLM.from_pretrained(models[attention])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(models[attention])
    data = prepare_data(text / "text", tokenizer=tokenizer, context=SHAPE.max_position_embeddings)
    first, *others = rows(tmp_path / "continued")
    assert (first["step"], first["tokens"], first["val_blocks"]) == (0, 0, RECIPE.evaluation_blocks)
    assert first["val_loss"] == pytest.approx(held_out(model, data, RECIPE.evaluation_blocks), abs=ROUNDING)
    train(model, data, RECIPE, tmp_path / "direct")
    assert others == rows(tmp_path / "direct")
    assert result.val_loss < first["val_loss"] - 0.1


def test_the_curves_of_a_model_and_of_what_it_became_begin_at_one_point(models, go, tmp_path: Path) -> None:
    curves = {}
    for attention in ATTENTIONS:
        go(models[attention], tmp_path / attention)
        curves[attention] = [row["val_loss"] for row in rows(tmp_path / attention) if "val_loss" in row]
    for attention in ATTENTIONS[1:]:
        assert curves[attention][0] == pytest.approx(curves["softmax"][0], abs=ROUNDING)
        assert abs(curves[attention][-1] - curves["softmax"][-1]) > 1e-4
    first = [next(row["loss"] for row in rows(tmp_path / attention) if "loss" in row) for attention in ATTENTIONS]
    assert first == pytest.approx([first[0]] * 3, abs=ROUNDING)


def annealed(folder: Path) -> list[float]:
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    return [value.item() for name, value in tensors.items() if name.endswith("dex.annealed")]


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_lambda_of_dex_moves_to_what_is_learned(fraction: float, models, go, tmp_path: Path, monkeypatch) -> None:
    seen: list[tuple[str, float]] = []

    def watched(event: str):
        original = getattr(running.RunCallback, event)

        def watch(self, args, state, control, **kwargs):
            values = {layer.self_attn.dex.annealed.item() for layer in kwargs["model"].model.layers}
            assert len(values) == 1
            seen.append((event, state.global_step, *values))
            return original(self, args, state, control, **kwargs)

        monkeypatch.setattr(running.RunCallback, event, watch)

    for event in ("on_pre_optimizer_step", "on_evaluate"):
        watched(event)
    recipe = dataclasses.replace(RECIPE, anneal_fraction=fraction, keep_checkpoints=9, gradient_accumulation=2)
    result = go(models["dex"], tmp_path, recipe)

    def expected(step: int) -> float:
        return min(1.0, step / (fraction * 11)) if fraction else 1.0

    assert [step for event, step, _ in seen if event == "on_pre_optimizer_step"] == list(range(11))
    assert [step for event, step, _ in seen if event == "on_evaluate"] == [0, 4, 8, 11, 11]
    for event, step, value in seen:
        # What the model brought is measured as it is.
        assert value == pytest.approx(0.0 if (event, step) == ("on_evaluate", 0) else expected(step), abs=1e-7)
    assert annealed(result.model_folder) == [1.0] * SHAPE.num_layers
    weights = load_file(result.model_folder / "model.safetensors")
    for layer in range(SHAPE.num_layers):
        assert weights[f"model.layers.{layer}.self_attn.dex.weight"].abs().max() > 1e-4
        lam = weights[f"model.layers.{layer}.self_attn.dex.lam"]
        assert ((lam - lambda_init_schedule(layer)).abs() > 1e-6).all()


def test_a_dex_model_that_is_trained_again_keeps_its_lambda(models, go, tmp_path: Path) -> None:
    once = go(models["dex"], tmp_path / "once")
    go(once.model_folder, tmp_path / "twice")
    measured = [row["val_loss"] for row in rows(tmp_path / "twice") if "val_loss" in row]
    some = next(row for row in rows(tmp_path / "once") if row["step"] == RECIPE.steps and "val_loss" in row)
    assert measured[0] == pytest.approx(some["val_loss"], abs=ROUNDING)
    model = small_model("softmax")
    assert DexAnnealing(model, steps=10, fraction=0.5).layers == []
    half = DiffTransformerForCausalLM.from_pretrained(models["dex"])
    half.model.layers[0].self_attn.dex.annealed.fill_(0.5)
    callback = DexAnnealing(half, steps=10, fraction=0.5)
    callback._set(3)
    assert [layer.annealed.item() for layer in callback.layers] == pytest.approx([0.8, 0.6])


@pytest.mark.parametrize("attention", ["diff_v2", "dex"])
def test_a_run_that_was_cut_goes_on_exactly(attention: str, models, go, tmp_path: Path) -> None:
    go(models[attention], tmp_path / "whole")
    cut = tmp_path / "cut"
    with pytest.raises(StoppedError):
        go(models[attention], cut, on_progress=at(8, stop))
    assert checkpoint_steps(cut) == [3, 6]
    if attention == "dex":
        assert annealed(cut / "checkpoint-3") == pytest.approx([3 / 5.5] * SHAPE.num_layers)
    moved = tmp_path / "moved"
    shutil.copytree(models[attention], moved)
    go(moved, cut, resume=True)
    assert_same_run(cut, tmp_path / "whole")
    assert annealed(cut / "model") == annealed(tmp_path / "whole" / "model")


def test_a_run_that_was_cut_before_its_first_checkpoint(models, go, tmp_path: Path) -> None:
    go(models["dex"], tmp_path / "whole")
    with pytest.raises(StoppedError):
        go(models["dex"], tmp_path / "cut", on_progress=at(1, stop))
    go(models["dex"], tmp_path / "cut", resume=True)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    assert [row["step"] for row in rows(tmp_path / "cut") if "val_loss" in row] == [0, 4, 8, 11, 11]


def test_weights_of_another_precision_are_trained_in_float32(models, data: PreparedData, go, tmp_path: Path) -> None:
    model = DiffTransformerForCausalLM.from_pretrained(models["dex"], dtype=torch.bfloat16)
    folder = write_model(tmp_path / "half", model, data)
    stored = load_file(folder / "model.safetensors")
    assert {tensor.dtype for name, tensor in stored.items() if ".dex." not in name} == {torch.bfloat16}
    result = go(folder, tmp_path / "run", dataclasses.replace(RECIPE, steps=2, evaluations=1))
    assert {tensor.dtype for tensor in load_file(result.model_folder / "model.safetensors").values()} == {torch.float32}


def test_the_run_says_where_it_came_from_and_takes_no_other(models, go, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(StoppedError):
        go(models["softmax"], out, on_progress=at(4, stop))
    source = json.loads((out / "config.json").read_text())["source"]
    assert source["folder"] == str(models["softmax"].resolve())
    other = tmp_path / "other"
    shutil.copytree(models["softmax"], other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] *= 1.5
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="was started with source digest"):
        go(other, out, resume=True)
    with pytest.raises(ConfigError, match="was started with model"):
        go(models["diff_v2"], out, resume=True)


def test_a_run_of_a_shape_is_not_continued_from_a_folder(models, stopped: Path, go) -> None:
    with pytest.raises(
        ConfigError,
        match="was started without a model to start from; wanted the same start: resume it with the same --from",
    ):
        go(models["softmax"], stopped, resume=True)


def damaged(name: str, folder: Path) -> None:
    """Something is wrong with the folder of a model."""
    config = json.loads((folder / "config.json").read_text())
    if name.startswith("no "):
        (folder / name.removeprefix("no ")).unlink()
    elif name == "another model":
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    elif name == "an unknown attention":
        (folder / "config.json").write_text(json.dumps(config | {"attention": "diff_v9"}))
    elif name == "fewer rows":
        (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 299}))
    elif name == "other widths":
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 65}))
    elif name == "a layer more":
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    elif name == "a layer less":
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    elif name == "half a tokenizer":
        (folder / "tokenizer.json").write_text('{"version": "1.0", "model"')
    elif name == "half a file":
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("no config.json", CheckpointError, ["holds no config.json"]),
        ("no tokenizer.json", CheckpointError, ["holds no tokenizer", "wanted tokenizer.json beside the weights"]),
        ("no model.safetensors", CheckpointError, ["holds no model.safetensors"]),
        ("another model", ConfigError, ["holds a llama model", "diffattn convert", "--from"]),
        ("an unknown attention", ConfigError, ["attention='diff_v9'"]),
        ("fewer rows", ConfigError, ["ids up to 299, the model 299 rows"]),
        ("other widths", CheckpointError, ["do not fit config.json", "mlp"]),
        ("a layer more", CheckpointError, ["lack model.layers.2."]),
        ("a layer less", CheckpointError, ["hold model.layers.1.", "does not have"]),
        ("half a tokenizer", CheckpointError, ["the tokenizer of", "cannot be read"]),
        ("half a file", CheckpointError, ["model.safetensors", "damaged"]),
    ],
)
def test_a_folder_that_cannot_be_continued_is_one_line(
    name: str, error: type, words: list[str], models, go, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models["softmax"], folder)
    damaged(name, folder)
    with pytest.raises(error) as raised:
        go(folder, tmp_path / "runs" / "one")
    assert "\n" not in str(raised.value)
    for word in words:
        assert word in str(raised.value)
    assert not (tmp_path / "runs").exists()


def test_options_that_do_not_fit_the_model(models, go, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="context is 33; wanted 2 to 32, the model's max_position_embeddings"):
        go(models["softmax"], tmp_path / "run", context=33)
    with pytest.raises(ConfigError, match="holds no run to resume"):
        go(models["softmax"], tmp_path / "run", resume=True)
    with pytest.raises(ConfigError, match=r"anneal_fraction is 1\.5; wanted 0 to 1"):
        dataclasses.replace(RECIPE, anneal_fraction=1.5)
    assert not (tmp_path / "run").exists()
    assert CONTEXT == 512


def test_the_command_line(models, text: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "--from", str(models["dex"]), "--text", str(text / "text"), "--steps", "4", "--out", "run"]
    assert main([*arguments, "--anneal-fraction", "0.25", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["val_loss"] == rows(Path("run"))[-1]["val_loss"]
    recipe = json.loads(Path("run/config.json").read_text())["recipe"]
    assert (recipe["learning_rate"], recipe["anneal_fraction"]) == (1e-4, 0.25)
    # A resumed run need not be told again where it came from.
    resumed = ["train", "--resume", "--out", "run", "--text", str(text / "text"), "--steps", "4"]
    assert main([*resumed, "--anneal-fraction", "0.25"]) == 0
    capsys.readouterr()
    for more, words in (
        (["--shape", "300K"], ["--shape 300K beside --from", "leave --shape out"]),
        (["--attention", "softmax", "--match", "shape"], ["--attention softmax --match shape beside --from"]),
        (["--learning-rate", "0"], ["learning_rate is 0.0"]),
        (["--context", "64"], ["context is 64"]),
    ):
        assert main([*arguments[:-1], "other", *more]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        for word in words:
            assert word in line
        assert not Path("other").exists()
