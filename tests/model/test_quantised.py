"""Quantisers of the library leave alone what makes λ or a gate, and a folder that they wrote is theirs to check."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.small_models import small_model
from transformers import AutoModelForCausalLM
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from diffattn.errors import CheckpointError
from diffattn.model.modeling import DiffTransformerForCausalLM
from diffattn.model.tensors import check_folder
from diffattn.variants import ATTENTIONS, own_modules


@pytest.mark.parametrize("skipped", [None, ["lm_head"]])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_quantisers_convert_the_same_matrices_of_every_variant(attention: str, skipped: list[str] | None) -> None:
    model = small_model(attention)
    kept = HfQuantizer.get_modules_to_not_convert(model, skipped, model._keep_in_fp32_modules)
    # torchao asks with the names of parameters, the others with those of modules.
    names = {name: should_convert_module(name, kept) for name, _ in model.named_parameters()}
    names |= {name: should_convert_module(name, kept) for name, _ in model.named_modules()}
    inside = [name for name in names if ".self_attn." in name or ".mlp." in name]
    own = {name for name in inside if name.split(".self_attn.")[-1].split(".")[0] in own_modules()}
    assert bool(own) == bool(ATTENTIONS[attention].tensors)
    assert {name for name in inside if not names[name]} == own
    assert not names["lm_head"]


@pytest.mark.parametrize("attention", ["diff_v2", "gated"])
def test_what_quantisers_leave_alone_is_float16_in_a_float16_model(attention: str, tmp_path: Path) -> None:
    small_model(attention).save_pretrained(tmp_path)
    model = DiffTransformerForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_weights_of_other_shapes_are_refused_unless_a_quantiser_wrote_them(tmp_path: Path) -> None:
    small_model("diff_v1").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].reshape(-1, 1)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=name):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "torchao"}}))
    check_folder(tmp_path)
