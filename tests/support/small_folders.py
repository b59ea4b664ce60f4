"""Checkpoint folders of models of a few thousand parameters, each with a tokenizer."""

import dataclasses
from pathlib import Path

from support.small_models import SHAPE, small_model
from transformers import PreTrainedTokenizerFast

from diffattn.data.tokenizer import train_tokenizer

TOKENS = 300


def small_tokenizer(tokens: int = TOKENS) -> PreTrainedTokenizerFast:
    return train_tokenizer(["low lower lowest löwe 🦁 newer wider\nnew lower low wide 日本語 "] * 3, tokens)


def small_folder(path: Path, attention: str = "diff_v1", *, seed: int = 0, tokens: int = TOKENS, **config) -> Path:
    model = small_model(attention, shape=dataclasses.replace(SHAPE, vocab_size=tokens), seed=seed, **config)
    model.save_pretrained(path)
    small_tokenizer(tokens).save_pretrained(path)
    return path
