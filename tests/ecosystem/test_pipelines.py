"""``pipeline(...)`` of transformers from a plain folder, each task beside Llama, where Llama has it."""

from pathlib import Path

import pytest
import torch
from support.ecosystem import MODELS, SHAPE, small
from support.small_folders import small_tokenizer
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    pipeline,
)

from diffattn.model.configuration import DiffTransformerConfig
from diffattn.variants import VARIANTS

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore")]

PROMPTS = ["new lower", "wide"]


def folder(path: Path, model) -> str:
    model.save_pretrained(path)
    made = small_tokenizer(SHAPE.vocab_size)
    made.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    made.add_special_tokens({"mask_token": "<|endoftext|>"})
    made.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("kind", MODELS)
def test_text_is_generated_alone_in_a_batch_and_from_messages(kind: str, tmp_path: Path) -> None:
    model = small(kind, pad_token_id=0)
    pipe = pipeline("text-generation", folder(tmp_path, model), batch_size=2)
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    together = [each[0]["generated_text"] for each in pipe(PROMPTS, **options)]
    encoded = [pipe.tokenizer(each, return_tensors="pt") for each in PROMPTS]
    alone = [
        pipe.tokenizer.decode(
            model.generate(**each, max_new_tokens=6, do_sample=False)[0, each["input_ids"].shape[1] :],
            skip_special_tokens=True,
        )
        for each in encoded
    ]
    assert together == alone
    said = pipe([[{"role": "user", "content": each}] for each in PROMPTS], **options)
    assert [each[0]["generated_text"] for each in said] == alone


@pytest.mark.parametrize("kind", MODELS)
def test_features_are_those_of_the_decoder(kind: str, tmp_path: Path) -> None:
    model = small(kind, pad_token_id=0)
    pipe = pipeline("feature-extraction", folder(tmp_path, model))
    ids = pipe.tokenizer("new lower", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        wanted = model.model(ids).last_hidden_state
    torch.testing.assert_close(torch.tensor(pipe("new lower")), wanted)


@pytest.mark.parametrize(
    ("task", "auto"),
    [
        ("text-classification", AutoModelForSequenceClassification),
        ("token-classification", AutoModelForTokenClassification),
    ],
)
@pytest.mark.parametrize("kind", MODELS)
def test_labels_are_found(kind: str, task: str, auto, tmp_path: Path) -> None:
    config = small(kind, pad_token_id=0).config
    torch.manual_seed(3)
    found = pipeline(task, folder(tmp_path, auto.from_config(config)))(PROMPTS)
    assert len(found) == 2
    for each in [row for rows in found for row in (rows if isinstance(rows, list) else [rows])]:
        assert 0 < each["score"] < 1


@pytest.mark.parametrize("attention", VARIANTS)
def test_an_encoder_fills_a_mask(attention: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = DiffTransformerConfig.from_shape(SHAPE, attention, is_causal=False, pad_token_id=0)
    pipe = pipeline("fill-mask", folder(tmp_path, AutoModelForMaskedLM.from_config(config)))
    found = pipe(f"new lower {pipe.tokenizer.mask_token} wide", top_k=3)
    assert len(found) == 3
    assert found[0]["score"] >= found[1]["score"] >= found[2]["score"] > 0
