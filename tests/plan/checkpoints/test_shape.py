"""Shapes from checkpoints: what is built from a shape and saved gives it back."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from diffattn.config_fields import OURS as OURS_TYPE
from diffattn.errors import CheckpointError, ConfigError
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.plan.answer import plan
from diffattn.plan.checkpoints.kinds import KINDS
from diffattn.plan.checkpoints.shape import read_checkpoint
from diffattn.plan.cost import count_parameters
from diffattn.plan.named_model import load_shape, parse_model
from diffattn.plan.setting import Setting
from diffattn.plan.shape import ModelShape

SHAPE = ModelShape(
    hidden_size=48, num_layers=3, num_heads=8, num_kv_heads=4, head_dim=10, intermediate_size=88, vocab_size=300,
    tie_word_embeddings=False, max_position_embeddings=77, rope_theta=500.0,
)  # fmt: skip


@pytest.mark.parametrize("attention", ["softmax", "diff_v1", "diff_v2", "gated"])
def test_our_own_configurations_come_back(tmp_path: Path, attention: str) -> None:
    for shape in (SHAPE, ModelShape.preset("300K")):
        folder = tmp_path / "model"
        DiffTransformerConfig.from_shape(shape, attention).save_pretrained(folder)
        found = read_checkpoint(folder)
        assert found == (dataclasses.replace(shape, name="model", source="config.json"), attention, {}, ())


TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 40, "vocab_size": 60}  # fmt: skip
BIASES = {"attention_bias": True, "mlp_bias": True}
OURS = [
    {"attention": "softmax", **BIASES, "attention_output_bias": True},
    {"attention": "softmax", "qk_norm": True, "head_norm": True},
    {"attention": "diff_v1", **BIASES, "qk_norm": True},
    {"attention": "diff_v1", "subln_affine": False},
    {"attention": "diff_v1", "head_norm": False, "attention_output_bias": True},
    {"attention": "diff_v2", **BIASES, "qk_norm": True},
    {"attention": "diff_v2", "lambda_form": "one", "head_norm": True},
    {"attention": "gated", "attention_bias": True},
    {"attention": "dex", "attention_bias": True},
    {"attention": "dex", "dex_heads": [[0, 3], [], [1]]},
]
# One of each kind or more, with what its file may switch on.
OTHERS: dict[str, list[dict[str, Any]]] = {
    "llama": [{}, BIASES, {"head_dim": 16, "tie_word_embeddings": True}],
    "mistral": [{}, {"head_dim": 8, "sliding_window": 5}],
    "qwen2": [{}, {"use_sliding_window": True, "max_window_layers": 1}],
    "qwen3": [{"head_dim": 16}, {"head_dim": 8, "attention_bias": True}],
    "smollm3": [{"pad_token_id": 0}, {"pad_token_id": 0, **BIASES}],
    "olmo2": [{}, {"attention_bias": True, "tie_word_embeddings": True}],
    "phi3": [{"pad_token_id": 0}, {"pad_token_id": 0, "tie_word_embeddings": True}],
    "granite": [{}, BIASES],
    "gemma": [{"head_dim": 8}, {"head_dim": 8, "attention_bias": True}],
    "gemma2": [{"head_dim": 8}, {"head_dim": 16, "tie_word_embeddings": False}],
    "gemma3_text": [{"head_dim": 8}, {"head_dim": 8, "attention_bias": True}],
    "ministral": [{"head_dim": 8}, {"head_dim": 16, "sliding_window": 5}],
    "seed_oss": [
        {"head_dim": 8},
        {"head_dim": 6, "attention_bias": False, "attention_out_bias": True, "mlp_bias": True},
    ],
    "cwm": [{"head_dim": 8}, {"head_dim": 8, "mlp_bias": True}],
    "helium": [{"head_dim": 8}, {"head_dim": 8, **BIASES}],
    "ernie4_5": [{"head_dim": 8}, {"head_dim": 16, "use_bias": True}],
    "internlm3": [{"head_dim": 8}, {"head_dim": 8, **BIASES}],
    "iquestcoder": [{"head_dim": 8}, {"head_dim": 8, **BIASES}],
    "diffllama": [{}, {"attention_bias": True}],
}
# Whose class is not built, or is refused, where its file says no head_dim.
NO_DEFAULT = ("ministral", "helium")
# No class of transformers has these: their count is held to their makers' in tests/plan/models.
ELSEWHERE = {"motif"}
CASES = [(OURS_TYPE, more) for more in OURS] + [(kind, more) for kind, all_ in OTHERS.items() for more in all_]


def built(values: dict[str, Any]) -> int:
    """Parameters of the model that transformers builds of a configuration; no memory is taken for them."""
    with torch.device("meta"):
        config = AutoConfig.for_model(**values)
        return AutoModelForCausalLM.from_config(config).num_parameters()


def planned(folder: Path) -> int:
    """Parameters that a plan of the folder alone says."""
    return plan(str(folder), setting=Setting(context=64)).model.estimate.parameters.total


def test_every_kind_is_held_to_a_built_model() -> None:
    assert {OURS_TYPE, *OTHERS, *ELSEWHERE} == set(KINDS)


@pytest.mark.parametrize(("kind", "more"), CASES)
def test_parameters_are_those_of_the_built_model(tmp_path: Path, kind: str, more: dict[str, Any]) -> None:
    AutoConfig.for_model(kind, **TINY, **more).save_pretrained(tmp_path)
    found = read_checkpoint(tmp_path)
    expected = built({"model_type": kind, **TINY, **more})
    assert count_parameters(found.shape, found.attention).total == expected
    assert planned(tmp_path) == expected
    assert parse_model(str(tmp_path)).built == found.shape


@pytest.mark.parametrize("kind", [kind for kind in OTHERS if kind not in ("diffllama", *NO_DEFAULT)])
@pytest.mark.parametrize("heads", [None, 0])
def test_what_a_file_does_not_say_is_the_default_of_its_kind(tmp_path: Path, kind: str, heads: int | None) -> None:
    """As a file by hand or of an older version: the sizes alone, and key/value heads that are null or not there."""
    sizes = TINY | {"hidden_size": 256, "num_attention_heads": 32, "num_key_value_heads": None, "pad_token_id": 0}
    if heads is not None or kind.startswith(("gemma", "mistral", "cwm")):
        # These may not be null.
        del sizes["num_key_value_heads"]
    values = {"model_type": kind, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert planned(tmp_path) == built(values)


@pytest.mark.parametrize("attention", ["softmax", "diff_v1", "diff_v2", "gated", "dex"])
def test_what_our_file_does_not_say_is_our_default(tmp_path: Path, attention: str) -> None:
    sizes = {key: value for key, value in TINY.items() if key != "num_key_value_heads"}
    values = {"model_type": OURS_TYPE, "attention": attention, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert planned(tmp_path) == built(values)


@pytest.mark.parametrize(
    ("more", "window"),
    [
        ({"model_type": "mistral"}, (3, 4096)),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "phi3", "sliding_window": 2047}, (3, 2047)),
        ({"model_type": "phi3"}, None),
        ({"model_type": "llama", "sliding_window": 7}, None),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": False}, None),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}, (2, 8)),
        ({"model_type": "qwen3", "sliding_window": 8, "use_sliding_window": True, "head_dim": 8}, None),
        ({"model_type": "smollm3", "sliding_window": 8, "use_sliding_window": True, "pad_token_id": 0,
          "no_rope_layer_interval": 2}, (1, 8)),
        ({"model_type": "gemma2", "head_dim": 8}, (2, 4096)),
        ({"model_type": "ministral", "sliding_window": 9}, (3, 9)),
        ({"model_type": "cwm", "head_dim": 8, "num_hidden_layers": 9}, (6, 8192)),
        ({"model_type": "gemma3_text", "head_dim": 8, "num_hidden_layers": 13}, (11, 4096)),
    ],
)  # fmt: skip
def test_layers_with_a_window_are_those_of_transformers(
    tmp_path: Path, more: dict[str, Any], window: tuple[int, int] | None
) -> None:
    values = {**TINY, **more}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert getattr(read_checkpoint(tmp_path).shape, "window", None) == window
    config = AutoConfig.for_model(**values)
    if hasattr(config, "layer_types"):
        assert config.layer_types.count("sliding_attention") == (window or (0,))[0]
        config.save_pretrained(tmp_path)
        assert getattr(read_checkpoint(tmp_path).shape, "window", None) == window


def test_diffllama_is_v1_and_others_are_softmax(tmp_path: Path) -> None:
    for kind, attention in (("llama", "softmax"), ("diffllama", "diff_v1")):
        config = AutoConfig.for_model(kind, **TINY)
        config.save_pretrained(tmp_path)
        shape, variant, *_ = read_checkpoint(tmp_path / "config.json")
        assert variant == attention
        assert (shape.num_heads, shape.num_kv_heads, shape.head_dim) == (4, 2, 8)
        assert shape.tie_word_embeddings is config.tie_word_embeddings


# Their files have the five sizes, so that they were once planned as if they were a Llama.
FOREIGN = ("bert", "bamba", "cohere", "stablelm", "jamba", "llama4_text", "opt", "zamba2", "nemotron_h", "gemma3n_text",
           "diff_llama", "deci", "LLAMA", "", 3, ["llama"], None)  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_kinds_are_refused_by_name(tmp_path: Path, kind: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"model_type": kind}))
    with pytest.raises(ConfigError, match="wanted one of diff_transformer, llama, mistral") as caught:
        read_checkpoint(tmp_path)
    assert (repr(kind) if kind is not None else "no model_type") in str(caught.value)
    with pytest.raises(ConfigError, match="wanted one of diff_transformer"):
        plan(f"diff_v1:{tmp_path}")
    with pytest.raises(ConfigError, match="wanted one of diff_transformer"):
        load_shape(tmp_path)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"auto_map": {"AutoConfig": "configuration_x.XConfig"}}, r"code of its own \(auto_map\), which is never run"),
        ({"attn_family": "diff_attn"}, "attn_family='diff_attn', which may change what is counted"),
        ({"my_part": [1]}, r"my_part=\[1\], which may change what is counted"),
        ({"model_type": "gemma", "use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"] * 2}, "layer_types of 2 layers with num_hidden_"),
        ({"model_type": "gemma2", "layer_types": ["mamba"] * 3}, "layer_types="),
        ({"model_type": "Motif", "hidden_act": "silu"}, "hidden_act='silu'; wanted hidden_act='poly_norm'"),
        ({"model_type": "motif", "num_noise_heads": 0}, "num_noise_heads=0"),
        ({"model_type": "motif", "use_bias": "x"}, "use_bias='x'"),
        ({"model_type": "motif", "k_ratio": 2}, "k_ratio=2; wanted k_ratio=1"),
        ({"model_type": "motif", "num_noise_heads": 3}, "num_noise_heads=3 of num_attention_heads=4"),
        ({"model_type": "motif", "num_noise_heads": 4}, "num_noise_heads=4 of num_attention_heads=4"),
        ({"model_type": "motif", "num_noise_heads": "2"}, "num_noise_heads='2'"),
        ({"model_type": "motif", "num_noise_heads": 2, "num_key_value_heads": 3}, "with num_key_value_heads=3"),
        ({"model_type": "motif", "head_dim": 16}, "head_dim=16 and num_attention_heads=4 with hidden_size=32"),
        ({"model_type": "motif", "hidden_size": 33, "num_noise_heads": 2}, "head_dim=None and num_attention_heads=4"),
        ({"model_type": "motif", "num_attention_heads": 1, "num_key_value_heads": 1}, "num_heads=1 for diff_v1"),
        ({"model_type": "motif", "num_key_value_heads": 1}, "num_kv_heads=1 for diff_v1"),
        ({"architectures": ["MotifForCausalLM"]}, "architectures MotifForCausalLM; wanted LlamaForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "wanted LlamaForCausalLM"),
        ({"architectures": "LlamaForCausalLM"}, "architectures 'LlamaForCausalLM'"),
        ({"num_local_experts": 8}, "num_local_experts; wanted a plain llama"),
        ({"kv_lora_rank": 64}, "kv_lora_rank; wanted a plain llama"),
        ({"text_config": {"hidden_size": 3}}, "text_config; wanted a plain llama"),
        ({"use_diff_attention": True}, "use_diff_attention; wanted a plain llama"),
        ({"mamba_d_state": 16}, "mamba_d_state; wanted a plain llama"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers; wanted a plain llama"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config; wanted weights as they were before"),
        ({"hidden_size": "4096"}, "hidden_size='4096'"),
        ({"hidden_size": 4096.0}, "hidden_size=4096.0"),
        ({"hidden_size": float("nan")}, "hidden_size=nan"),
        ({"hidden_size": -64}, "hidden_size=-64"),
        ({"hidden_size": 0}, "hidden_size=0"),
        ({"hidden_size": 10**12}, "hidden_size=1000000000000;"),
        ({"num_hidden_layers": 10**400}, "num_hidden_layers=1e"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True"),
        ({"vocab_size": None}, "vocab_size=None"),
        ({"intermediate_size": [40, 40, 40]}, "intermediate_size="),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0"),
        ({"num_key_value_heads": 3}, "num_kv_heads=3"),
        ({"head_dim": "8"}, "head_dim='8'"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, "num_heads=3"),
        ({"attention_bias": "false"}, "attention_bias='false'; wanted a truth value"),
        ({"mlp_bias": 1}, "mlp_bias=1; wanted a truth value"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'"),
        ({"rope_theta": float("inf")}, "rope_theta=inf"),
        ({"rope_theta": 0}, "rope_theta=0"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta='x'"),
        ({"max_position_embeddings": -1}, "max_position_embeddings=-1"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window=0"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": None}, "max_window_layers=None"),
        ({"model_type": "diff_transformer", "attention": "linear"}, "attention='linear'"),
        ({"model_type": "diff_transformer", "attention": "dex", "dex_heads": 3}, "dex_heads=3"),
        ({"model_type": "diff_transformer", "qk_norm": "x"}, "qk_norm='x'"),
    ],
)
def test_a_field_that_cannot_be_planned_is_named(tmp_path: Path, more: dict[str, Any], words: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"model_type": "llama"} | more))
    with pytest.raises(ConfigError, match=words) as caught:
        read_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[" * 100_000, "nested too deeply"),
        ('{"hidden_size": 1' + "0" * 5000 + "}", "cannot be read"),
        ("[]", "holds a list; wanted a decoder's config.json"),
        ("null", "holds a NoneType"),
        ('{"hidden_size": 3}', "lacks num_hidden_layers"),
        ('{"model_type": "gpt2", "n_embd": 3}', "n_head=None"),
        ('{"model_type": "mixtral"}', "hidden_size=None"),
    ],
)
def test_a_bad_configuration_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        read_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_count_is_held_against_the_weights(tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama", **TINY, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    assert planned(tmp_path) == model.num_parameters()
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 4}))
    wrong = built(TINY | {"model_type": "llama", "num_hidden_layers": 4, "tie_word_embeddings": True})
    words = f"says {wrong:,} parameters and the weights beside it are {model.num_parameters():,}"
    with pytest.raises(ConfigError, match=words):
        read_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not one")
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(tmp_path)


def test_sharded_weights_are_counted_and_half_a_download_is_not(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **TINY, head_dim=8))
    model.save_pretrained(tmp_path, max_shard_size="10kB")
    assert not (tmp_path / "model.safetensors").exists()
    assert planned(tmp_path) == model.num_parameters()
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 4}))
    with pytest.raises(ConfigError, match="wanted two that agree"):
        read_checkpoint(tmp_path)
    next(tmp_path.glob("*.safetensors")).unlink()
    assert planned(tmp_path) > model.num_parameters()


def test_what_no_model_reads_is_not_held_against_the_count(tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama", **TINY, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path)
    weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, tmp_path / "model.safetensors")
    assert "lm_head.weight" in weights
    found = read_checkpoint(tmp_path)
    assert found.left_out == {"buffers": 4, "a copy of the tied embedding": 60 * 32}
    assert any("not planned: buffers (4)" in note for note in plan(str(tmp_path)).notes)


def test_our_own_saved_models_agree_with_their_weights(tmp_path: Path) -> None:
    for attention in ("diff_v1", "diff_v2", "dex"):
        model = AutoModelForCausalLM.from_config(DiffTransformerConfig(**TINY, attention=attention))
        model.save_pretrained(tmp_path / attention)
        assert planned(tmp_path / attention) == model.num_parameters()


@pytest.mark.parametrize("kind", OTHERS)
def test_a_field_that_is_not_known_is_refused_and_one_that_is_off_is_not(tmp_path: Path, kind: str) -> None:
    AutoConfig.for_model(kind, **TINY | OTHERS[kind][0]).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    count = planned(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values | {"further_part": None, "other_part": False}))
    assert planned(tmp_path) == count
    (tmp_path / "config.json").write_text(json.dumps(values | {"further_part": 7}))
    with pytest.raises(ConfigError, match="further_part=7, which may change what is counted"):
        read_checkpoint(tmp_path)
