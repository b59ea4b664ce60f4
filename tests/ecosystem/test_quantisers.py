"""torchao and bitsandbytes on a CPU: each variant loses as little as Llama, and keeps its λ and gates as they were."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ecosystem import LLAMA, MODELS, ids, logits, small, tool
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from diffattn.variants import own_modules

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore")]

# Beside Llama's own loss: most of it is the feed-forward network's, which all have; V2 has more heads to lose in.
MORE = 1.6


def torchao_int8() -> TorchAoConfig:
    return TorchAoConfig(tool("torchao.quantization").Int8WeightOnlyConfig())


def bitsandbytes_int8() -> BitsAndBytesConfig:
    tool("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True)


def bitsandbytes_nf4() -> BitsAndBytesConfig:
    tool("bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


QUANTISERS = (torchao_int8, bitsandbytes_int8, bitsandbytes_nf4)
quantisers = pytest.mark.parametrize("make", QUANTISERS, ids=lambda make: make.__name__)


def quantised(folder: Path, kind: str, config: Any, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    small(kind).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


def changed(model: PreTrainedModel) -> set[str]:
    """The matrices that are no longer plain parameters."""
    return {
        name for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter
    }  # fmt: skip


def loss_of(model: PreTrainedModel, kind: str) -> float:
    exact = logits(small(kind))
    return float((logits(model).float() - exact).norm() / exact.norm())


@quantisers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_is_quantised_as_llama_is(kind: str, make: Callable, dtype: torch.dtype, tmp_path: Path) -> None:
    model = quantised(tmp_path / "mine", kind, make(), dtype)
    llama = quantised(tmp_path / "llama", LLAMA, make(), dtype)
    assert changed(model) == changed(llama)
    assert len(changed(llama)) == 7 * llama.config.num_hidden_layers
    whole = small(kind).state_dict()
    for name, parameter in model.named_parameters():
        if name.split(".self_attn.")[-1].partition(".")[0] in own_modules():
            assert torch.equal(parameter, whole[name].to(parameter.dtype)), name
            assert parameter.dtype in (dtype, torch.float32), name
    assert loss_of(model, kind) < MORE * loss_of(llama, LLAMA)


@quantisers
@pytest.mark.parametrize("kind", MODELS)
def test_a_quantised_folder_is_read_again(kind: str, make: Callable, tmp_path: Path) -> None:
    model = quantised(tmp_path / "whole", kind, make())
    # Before its first pass: on processors with AVX512-BF16 bitsandbytes then puts 4-bit weights into another order.
    model.save_pretrained(tmp_path / "quantised")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised")
    assert changed(again) == changed(model)
    assert torch.equal(logits(again), logits(model))
    made = [each.generate(ids(), max_new_tokens=8, do_sample=False, pad_token_id=0).tolist() for each in (model, again)]
    assert made[0] == made[1]


@quantisers
@pytest.mark.parametrize("kind", MODELS)
def test_an_adapter_is_trained_over_quantised_weights(kind: str, make: Callable, tmp_path: Path) -> None:
    peft = tool("peft")
    model = peft.prepare_model_for_kbit_training(quantised(tmp_path, kind, make()))
    model = peft.get_peft_model(model, peft.LoraConfig(r=4))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(6):
        loss = model(ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
