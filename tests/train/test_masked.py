"""Learning from hidden tokens: what is asked for, what stands in its place, and runs of encoders."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from support.small_comparison import write_text
from support.small_run import CONTEXT, RECIPE, SHAPE, StoppedError, assert_same_run, at, rows, stop
from transformers import AutoModelForMaskedLM, pipeline

from diffattn.data.packing import prepare_data
from diffattn.data.tokenizer import train_tokenizer
from diffattn.errors import ConfigError
from diffattn.model.pairing import build_pair
from diffattn.train.continued import continue_training
from diffattn.train.masked import HELD_OUT, MASK, MaskedSamples, with_mask
from diffattn.train.recipe import CAUSAL, MASKED, Recipe
from diffattn.train.run import train
from diffattn.train.single import train_shape
from diffattn.train.trainer import RankPart

MLM = dataclasses.replace(RECIPE, objective=MASKED)
LENGTH = 40


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffattn.cache.cache_folder", lambda: tmp_path / "cache")


@pytest.fixture(scope="module")
def tokenizer():
    made = train_tokenizer([], 257)
    made.add_special_tokens({"mask_token": MASK})
    return made


def samples(count: int, length: int = LENGTH) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(1, 257, (length,), generator=draw)} for _ in range(count)]


def test_so_many_tokens_are_asked_for_and_most_of_them_are_hidden(tokenizer):
    plain = samples(4000)
    masked = MaskedSamples(plain, tokenizer, seed=3)
    ids, labels = (torch.stack([masked[index][name] for index in range(4000)]) for name in ("input_ids", "labels"))
    original = torch.stack([each["input_ids"] for each in plain])
    asked = labels != -100
    # 15% of each block, so that the mean over a batch is that of its blocks.
    assert (asked.sum(1) == 6).all()
    assert torch.equal(labels[asked], original[asked])
    assert torch.equal(ids[~asked], original[~asked])
    hidden, same = ids[asked] == tokenizer.mask_token_id, ids[asked] == original[asked]
    # Of 24,000 draws, with a standard deviation of a quarter of a percent; a replaced token may be the same by chance.
    assert hidden.float().mean() == pytest.approx(0.8, abs=0.01)
    assert same.float().mean() == pytest.approx(0.1, abs=0.01)
    replaced = ids[asked & (ids != tokenizer.mask_token_id) & (ids != original)]
    assert len(replaced.unique()) > 250
    # Every place is as likely as every other.
    assert asked.float().mean(0).sub(0.15).abs().max() < 0.03
    # A tenth is kept: with another seed or sample, other tokens are asked for.
    assert not torch.equal(labels[0] != -100, labels[1] != -100)
    assert not torch.equal(MaskedSamples(plain, tokenizer, seed=4)[0]["labels"], labels[0])


def test_a_sample_depends_on_its_number_and_the_seed_alone(tokenizer):
    plain = samples(8)
    whole = MaskedSamples(plain, tokenizer, seed=3)
    again = MaskedSamples(plain, tokenizer, seed=3)[5]
    assert all(torch.equal(whole[5][name], again[name]) for name in again)
    parts = [RankPart(whole, 4, part, 2) for part in (0, 1)]
    found = [parts[0][0], parts[0][1], parts[1][0], parts[1][1]]
    assert all(torch.equal(found[index]["labels"], whole[index]["labels"]) for index in range(4))
    # In pieces, as a mixture has them, it is the same block.
    pieces = MaskedSamples([{"input_ids": each["input_ids"].view(4, -1)} for each in plain], tokenizer, seed=3)
    assert pieces[2]["labels"].shape == (4, LENGTH // 4)
    assert torch.equal(pieces[2]["labels"].flatten(), whole[2]["labels"])


def test_tokens_between_documents_are_not_asked_for(tokenizer):
    ids = torch.randint(1, 257, (LENGTH,))
    ids[::2] = tokenizer.eos_token_id
    masked = MaskedSamples([{"input_ids": ids}] * 50, tokenizer, seed=0)
    assert not any((masked[index]["labels"][::2] != -100).any() for index in range(50))
    # Where there is nothing else they are: a loss needs a token.
    only = MaskedSamples([{"input_ids": torch.full((3,), tokenizer.eos_token_id)}], tokenizer, seed=0)
    assert (only[0]["labels"] != -100).sum() == 1


def data_of(folder: Path):
    text = folder / "text"
    if not text.exists():
        write_text(folder)
    return with_mask(prepare_data(text, vocab_size=SHAPE.vocab_size - 1, context=CONTEXT), SHAPE.vocab_size)


def encoder(attention: str, seed: int = 0):
    return build_pair(SHAPE, attention, seed=seed, is_causal=False).model


@pytest.mark.parametrize("attention", ["softmax", "diff_v1"])
def test_a_run_that_was_cut_off_has_the_losses_of_a_whole_one(attention, tmp_path):
    data = data_of(tmp_path)
    whole = train(encoder(attention), data, MLM, tmp_path / "whole")
    with pytest.raises(StoppedError):
        train(encoder(attention), data, MLM, tmp_path / "cut", on_progress=at(7, stop))
    train(encoder(attention), data, MLM, tmp_path / "cut", resume=True)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    assert whole.bits_per_byte is None
    # The held-out loss is that of fixed tokens, computed here from the saved model.
    model = AutoModelForMaskedLM.from_pretrained(whole.model_folder)
    held_out = MaskedSamples(
        [{"input_ids": torch.from_numpy(data.validation[index])} for index in range(len(data.validation))],
        data.tokenizer, seed=HELD_OUT,
    )  # fmt: skip
    losses = []
    for index in range(len(data.validation)):
        sample = held_out[index]
        with torch.no_grad():
            log_p = model(sample["input_ids"][None]).logits[0].log_softmax(-1)
        asked = sample["labels"] != -100
        losses.append(-log_p[asked].gather(1, sample["labels"][asked, None]).mean().item())
    assert whole.val_loss == pytest.approx(float(np.mean(losses)), abs=1e-4)


def test_a_trained_encoder_fills_in_masks_and_has_a_pad_token(tmp_path):
    result = train_shape(SHAPE, "diff_v2", MLM, tmp_path / "run", text=write_text(tmp_path), context=CONTEXT)
    model = AutoModelForMaskedLM.from_pretrained(result.model_folder)
    assert (model.config.is_causal, model.config.pad_token_id) == (False, 0)
    fill = pipeline("fill-mask", model=str(result.model_folder), device="cpu")
    assert fill.tokenizer.mask_token_id == SHAPE.vocab_size - 1
    found = fill(f"The state of the {MASK} is strong.")
    assert len(found) == 5
    first = rows(tmp_path / "run")[0]["loss"]
    assert first > result.val_loss > 0
    # The run goes on by its own options.
    again = train_shape(
        SHAPE, "diff_v2", MLM, tmp_path / "run", text=str(tmp_path / "text"), context=CONTEXT, resume=True
    )
    assert again == result


def test_what_does_not_fit_the_objective_is_refused_in_one_line(tmp_path):
    data = data_of(tmp_path)
    with pytest.raises(ConfigError, match="objective is 'clm', and the model has is_causal=False; wanted clm for"):
        train(encoder("diff_v1"), data, RECIPE, tmp_path / "out")
    with pytest.raises(ConfigError, match="objective is 'mlm', and the model has is_causal=True; wanted clm for"):
        train(build_pair(SHAPE, "diff_v1").model, data, MLM, tmp_path / "out")
    with pytest.raises(ConfigError, match="objective is 'mlm' with --from; wanted a new model of a shape"):
        continue_training(tmp_path, MLM, tmp_path / "out")
    with pytest.raises(ConfigError, match="objective is 'bert'; wanted one of clm, mlm"):
        Recipe(objective="bert")
    full = prepare_data(tmp_path / "text", vocab_size=SHAPE.vocab_size, context=CONTEXT)
    with pytest.raises(ConfigError, match="no mask token, and a token for each of the 300 rows of the model; wanted"):
        with_mask(full, SHAPE.vocab_size)
    assert not (tmp_path / "out").exists()


def test_a_run_without_hidden_tokens_is_written_as_before():
    assert "objective" not in RECIPE.to_dict()
    assert Recipe(**RECIPE.to_dict()).objective == CAUSAL
    assert Recipe(**MLM.to_dict()) == MLM
