"""Encoders, whose tokens see those behind them too: masks of every implementation, and models with other heads."""

import dataclasses
import json

import pytest
import torch
from support.fused_cases import needs_the_kernel
from support.kernel_calls import recorded_calls
from support.packed_cases import IMPLEMENTATIONS, LENGTH, PADDED, WHOLE, positions_of, real_of, spans
from support.small_models import SHAPE, assert_same_logits, tokens
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
    pipeline,
)

import diffattn
from diffattn.data.tokenizer import train_tokenizer
from diffattn.errors import ConfigError, UnsupportedError
from diffattn.layer_kinds import FULL, SLIDING
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.fused import DIFF_FUSED
from diffattn.model.heads.language import DiffTransformerForMaskedLM
from diffattn.model.masks import layers
from diffattn.model.masks.layers import layer_masks
from diffattn.model.modeling import DiffTransformerForCausalLM
from diffattn.probes.lens import attention_maps

WINDOW = 3
MIXED = {"sliding_window": WINDOW, "layer_types": [SLIDING, FULL, SLIDING]}
DIFFERENTIAL = ("diff_v1", "diff_v2")


def encoder(attention: str, implementation: str | None = None, **config) -> DiffTransformerForMaskedLM:
    torch.manual_seed(0)
    fields = {"initializer_range": 0.12, "is_causal": False} | config
    model = DiffTransformerForMaskedLM(DiffTransformerConfig.from_shape(SHAPE, attention, **fields)).eval()
    if implementation:
        model.set_attn_implementation(implementation)
    return model


def stated(model, ids: Tensor) -> Tensor:
    """Logits of rows that are sequences, by masks that are written down here."""
    near = (torch.arange(ids.shape[1])[:, None] - torch.arange(ids.shape[1])).abs() <= WINDOW
    masks = {FULL: torch.ones_like(near)[None, None], SLIDING: near[None, None]}
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    logits = model(ids, attention_mask=masks).logits
    model.set_attn_implementation(before)
    return logits


@pytest.mark.parametrize("fields", [{}, MIXED], ids=["whole", "windows"])
@pytest.mark.parametrize(("attention", "implementation"), IMPLEMENTATIONS)
@torch.no_grad()
def test_each_token_sees_all_of_its_own_sequence(attention, implementation, fields):
    model, ids = encoder(attention, implementation, **fields), tokens(3, LENGTH)
    logits = model(ids).logits
    assert_same_logits(logits, stated(model, ids))
    # The first token depends on those behind it: a causal model of the same weights says something else.
    causal = DiffTransformerForCausalLM(DiffTransformerConfig(**model.config.to_dict() | {"is_causal": True})).eval()
    causal.load_state_dict(model.state_dict())
    assert (causal(ids).logits - logits).abs().max() > 1e-2
    # For one pass the library makes an encoder of it.
    causal.set_attn_implementation(implementation)
    assert_same_logits(causal(ids, is_causal=False).logits, logits)
    for rows in (WHOLE, PADDED):
        real = real_of(rows)
        packed = model(ids, attention_mask=real, position_ids=positions_of(rows)).logits
        for row, parts in enumerate(rows):
            for span in spans(parts):
                assert_same_logits(packed[row, span], stated(model, ids[row : row + 1, span])[0])
    for side in ("left", "right"):
        real = torch.arange(LENGTH) >= torch.tensor([[0], [3], [8]])
        real = real if side == "left" else real.flip(1)
        for mask in (real, real.long(), real[:, None, None]):
            padded = model(ids, attention_mask=mask).logits
            assert padded.isfinite().all()
            for row in range(3):
                assert_same_logits(padded[row, real[row]], stated(model, ids[row : row + 1, real[row]])[0])


@needs_the_kernel
@pytest.mark.parametrize("attention", DIFFERENTIAL)
def test_the_kernel_serves_encoders_with_their_gradients(attention, monkeypatch):
    model, ids, real = encoder(attention, **MIXED), tokens(3, LENGTH), real_of(PADDED)
    gradients, served = [], recorded_calls(monkeypatch)
    for implementation in (DIFF_FUSED, "sdpa"):
        model.set_attn_implementation(implementation)
        for mask in (None, real):
            loss = model(ids, attention_mask=mask, labels=torch.where(real, ids, -100)).loss
            gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert served == ["kernel"] * 2 * SHAPE.num_layers
    for actual, expected in zip(gradients[0] + gradients[1], gradients[2] + gradients[3], strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * max(0.1, expected.abs().max().item()))


def test_flash_attention_is_told_the_window_on_both_sides(monkeypatch):
    """Its package serves GPUs alone; what it would be given is decided before."""
    for causal, told in ((True, WINDOW), (False, WINDOW + 1)):
        config = DiffTransformerConfig.from_shape(SHAPE, "softmax", is_causal=causal, **MIXED)
        base = AutoModel.from_config(config, attn_implementation="sdpa")
        # It sees one token less to each side than it is told.
        assert [layer.self_attn.sliding_window for layer in base.layers] == [told, None, told]
        assert [layer.self_attn.is_causal for layer in base.layers] == [causal] * 3
        monkeypatch.setattr(layers, "is_flash_attention_requested", lambda config: True)
        monkeypatch.setattr(config, "_attn_implementation", "flash_attention_2", raising=False)
        x, real = torch.zeros(2, 5, 1), torch.tensor([[True] * 5, [False, True, True, True, True]])
        config._attn_implementation_internal = "flash_attention_2"
        assert layer_masks(config, x, real[:1], None, None, {}) == {FULL: None, SLIDING: None}
        given = layer_masks(config, x, real, None, None, {})
        assert all(torch.equal(mask, real) for mask in given.values())


@torch.no_grad()
def test_maps_of_an_encoder_are_whole():
    for attention in ("softmax", *DIFFERENTIAL):
        maps = attention_maps(encoder(attention), tokens(1, 6), layer=1, head=2)
        assert torch.tensor(maps.map_pos).triu(1).abs().sum() > 0.1


@pytest.mark.parametrize("attention", ["softmax", *DIFFERENTIAL])
def test_an_encoder_writes_no_text_and_says_so_in_one_line(attention, tmp_path):
    model = encoder(attention)
    model.save_pretrained(tmp_path)
    train_tokenizer([], 257).save_pretrained(tmp_path)
    for call in (
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path),
        lambda: DiffTransformerForCausalLM(model.config),
    ):
        with pytest.raises(ConfigError, match="is_causal=False with DiffTransformerForCausalLM; wanted is_causal=True"):
            call()
    with pytest.raises(UnsupportedError, match=r"is_causal is false in .*, which writes no text; wanted a decoder"):
        diffattn.load(tmp_path)
    with pytest.raises(ConfigError, match="past_key_values with is_causal=False; wanted an encoder without a cache"):
        model.model(tokens(1, 3), past_key_values=DynamicCache(config=model.config))
    assert model.model(tokens(1, 3), use_cache=True).past_key_values is None
    with pytest.raises(ConfigError, match="is_causal=True with DiffTransformerForMaskedLM; wanted is_causal=False"):
        DiffTransformerForMaskedLM(DiffTransformerConfig.from_shape(SHAPE, attention))


@torch.no_grad()
def test_an_encoder_is_made_of_a_decoder_and_survives_a_file(tmp_path):
    decoder = DiffTransformerForCausalLM(DiffTransformerConfig.from_shape(SHAPE, "diff_v1"))
    decoder.save_pretrained(tmp_path / "decoder")
    made = AutoModelForMaskedLM.from_pretrained(tmp_path / "decoder", is_causal=False)
    assert all(torch.equal(*pair) for pair in zip(made.parameters(), decoder.parameters(), strict=True))
    made.save_pretrained(tmp_path / "encoder")
    saved = json.loads((tmp_path / "encoder" / "config.json").read_text())
    assert (saved["is_causal"], saved["architectures"]) == (False, ["DiffTransformerForMaskedLM"])
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "encoder")
    assert torch.equal(again(tokens(1, 7)).logits, made(tokens(1, 7)).logits)


HEADS = {
    AutoModelForSequenceClassification: {"labels": torch.tensor([0, 2])},
    AutoModelForTokenClassification: {"labels": torch.zeros(2, 9, dtype=torch.long)},
    AutoModelForQuestionAnswering: {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
}


@pytest.mark.parametrize("auto", HEADS, ids=lambda auto: auto.__name__)
@pytest.mark.parametrize("causal", [True, False], ids=["decoder", "encoder"])
@pytest.mark.parametrize("attention", ["softmax", *DIFFERENTIAL])
def test_the_librarys_classes_learn_and_are_loaded_again(attention, causal, auto, tmp_path):
    config = DiffTransformerConfig.from_shape(SHAPE, attention, is_causal=causal, pad_token_id=0, num_labels=3)
    language = (DiffTransformerForCausalLM if causal else DiffTransformerForMaskedLM)(config)
    language.save_pretrained(tmp_path / "language")
    model = auto.from_pretrained(tmp_path / "language", num_labels=3)
    assert model.model.config._attn_implementation == ("sdpa" if attention == "softmax" else DIFF_FUSED)
    for name, weight in language.model.named_parameters():
        assert torch.equal(weight, model.model.get_parameter(name))
    ids = torch.nn.functional.pad(tokens(2, 7), (0, 2))
    mask = (ids != 0).long()
    given = {"input_ids": ids, "attention_mask": mask, **HEADS[auto]}
    loss = model(**given).loss
    loss.backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())
    with torch.no_grad():
        for weight in model.parameters():
            weight -= 0.1 * weight.grad / (weight.grad.norm() + 1e-9)
        assert model.eval()(**given).loss < loss
        # Padding on either side changes nothing.
        outputs = model(ids, attention_mask=mask)
        name = "start_logits" if auto is AutoModelForQuestionAnswering else "logits"
        alone = model(ids[:, :7])[name]
        assert_same_logits(outputs[name][:, : alone.shape[1]], alone)
    model.save_pretrained(tmp_path / "head")
    again = auto.from_pretrained(tmp_path / "head").eval()
    assert torch.equal(again(ids, attention_mask=mask)[name], outputs[name])


def test_several_texts_without_a_pad_token_are_refused_by_the_library():
    config = DiffTransformerConfig.from_shape(SHAPE, "diff_v1")
    model = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(ValueError, match="no padding token is defined"):
        model(tokens(2, 5))


def test_pipelines_run_the_models_by_their_heads(tmp_path):
    tokenizer = train_tokenizer(["a cat sat on a mat"] * 9, 280)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    shape = dataclasses.replace(SHAPE, vocab_size=len(tokenizer))
    fields = {"pad_token_id": tokenizer.pad_token_id, "num_labels": 2}
    for attention in DIFFERENTIAL:
        causal = DiffTransformerConfig.from_shape(shape, attention, **fields)
        both = DiffTransformerConfig.from_shape(shape, attention, is_causal=False, **fields)
        cases = {
            "text-generation": (AutoModelForCausalLM, causal, "a cat"),
            "fill-mask": (AutoModelForMaskedLM, both, "a cat <mask> on a mat"),
            "text-classification": (AutoModelForSequenceClassification, both, ["a cat", "on a mat"]),
            "token-classification": (AutoModelForTokenClassification, causal, "a cat"),
            "feature-extraction": (AutoModel, both, "a cat"),
        }
        for task, (auto, config, text) in cases.items():
            folder = tmp_path / attention / task
            auto.from_config(config).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            options = {"batch_size": 2} if isinstance(text, list) else {}
            found = pipeline(task, model=str(folder), device="cpu", **options)(text)
            if task == "fill-mask":
                assert len(found) == 5
                assert 0 < sum(each["score"] for each in found) < 1
            else:
                assert len(found) == len(text) if isinstance(text, list) else found
