"""The four public diffllama models: their configurations at small sizes, and the folders that they lie in."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.small_models import assert_same_logits, tokens
from transformers import AutoModelForCausalLM, DiffLlamaConfig, DiffLlamaForCausalLM

from diffattn.convert.convert import convert
from diffattn.errors import CheckpointError

# As the files say it: rotary positions in the former spelling, stretched 32 times over 128k positions.
ROPE = {"rope_theta": 500000.0, "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"}}  # fmt: skip
FILE: dict[str, Any] = {
    "architectures": ["DiffLlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 3,
    "eos_token_id": [1, 2], "hidden_act": "silu", "hidden_size": 64, "initializer_range": 0.15,
    "intermediate_size": 67, "lambda_std_dev": 0.1, "max_position_embeddings": 131072, "model_type": "diffllama",
    "num_attention_heads": 8, "num_hidden_layers": 3, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-05,
    "torch_dtype": "float32", "transformers_version": "4.47.0.dev0", "use_cache": True, "vocab_size": 71, **ROPE,
}  # fmt: skip
# What of it differs from one to the next, with keys that no class of the library reads.
PUBLIC: dict[str, dict[str, Any]] = {
    "DiffLlama-0.3B-handcut": {"tie_word_embeddings": True, "mlp_bias": False, "pretraining_tp": 1},
    "DiffLlama-1B": {"tie_word_embeddings": True, "mlp_bias": False, "num_key_value_heads": 4},
    "DiffLlama-375M": {"tie_word_embeddings": False, "patch_size": 4, "num_key_value_heads": 8},
    "diffllama_300m": {"tie_word_embeddings": False, "mlp_bias": False, "pretraining_tp": 1, "patch_size": 1},
}
IN_CHECKPOINT = ("DiffLlama-375M", "diffllama_300m")
IDS = tokens(2, 29)
NEAR, FAR = torch.arange(29)[None], torch.arange(29)[None] * 4096 + 7000


def public_folder(name: str, folder: Path) -> tuple[Path, DiffLlamaForCausalLM]:
    """The folder of such a model, with its config.json as published, and the model of the library."""
    torch.manual_seed(0)
    # The library changes the rotary positions that it reads, so it gets a copy.
    model = DiffLlamaForCausalLM(DiffLlamaConfig.from_dict(copy.deepcopy(FILE | PUBLIC[name]))).eval()
    inside = folder / "checkpoint-500" if name in IN_CHECKPOINT else folder
    model.save_pretrained(inside)
    (inside / "config.json").write_text(json.dumps(FILE | PUBLIC[name]))
    return inside, model


@torch.no_grad()
@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_configuration_keeps_its_logits_and_its_bits(name: str, tmp_path: Path) -> None:
    source, model = public_folder(name, tmp_path / "source")
    result = convert(source, tmp_path / "made")
    assert result.target == "diff_v1"
    ours, found = AutoModelForCausalLM.from_pretrained(tmp_path / "made", output_loading_info=True)
    assert not any(found.values()), found
    assert ours.config.max_position_embeddings == 131072
    for positions in (NEAR, FAR):
        expected = model(IDS, position_ids=positions).logits
        assert expected.std() > 0.5
        assert_same_logits(ours(IDS, position_ids=positions).logits, expected)
    assert (model(IDS, position_ids=NEAR).logits - model(IDS, position_ids=FAR).logits).abs().max() > 1e-2

    convert(tmp_path / "made", tmp_path / "back", "diffllama")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert ("lm_head.weight" in after) == (not PUBLIC[name]["tie_word_embeddings"])
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    unread = {"mlp_bias", "pretraining_tp", "patch_size", "torch_dtype", "transformers_version", "attention_dropout"}
    assert {key: back.get(key) for key in FILE.keys() - unread} == {key: FILE[key] for key in FILE.keys() - unread} | {
        key: value for key, value in PUBLIC[name].items() if key in FILE
    }


@pytest.mark.parametrize("name", IN_CHECKPOINT)
def test_a_model_that_lies_in_a_checkpoint_of_trainer_is_named(name: str, tmp_path: Path) -> None:
    inside, _ = public_folder(name, tmp_path / "source")
    with pytest.raises(CheckpointError, match="is no model, but there is one inside it") as caught:
        convert(tmp_path / "source", tmp_path / "made")
    assert str(caught.value).endswith(f"take {str(inside)!r}")
    # As Trainer leaves it: pickles beside the weights, which nothing opens.
    for pickle in ("optimizer.pt", "training_args.bin", "rng_state.pth"):
        (inside / pickle).write_bytes(b"cos\nsystem\n.")
    assert convert(inside, tmp_path / "made").target == "diff_v1"


def test_the_last_of_several_checkpoints_is_named(tmp_path: Path) -> None:
    for step in (500, 1000, 990):
        folder = tmp_path / "source" / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(FILE))
    with pytest.raises(CheckpointError, match=r"checkpoint-1000', the last of 3$") as caught:
        convert(tmp_path / "source", tmp_path / "made")
    assert "\n" not in str(caught.value)
