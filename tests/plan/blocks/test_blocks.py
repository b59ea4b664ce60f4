"""Models whose layers differ: parameters held to the classes of transformers, pairs and caches to a plain count."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from diffattn.cli.main import main
from diffattn.errors import ConfigError
from diffattn.plan.answer import plan
from diffattn.plan.blocks.block import Block, BlockShape
from diffattn.plan.blocks.estimate import estimate_model, inference_need
from diffattn.plan.checkpoints.kinds import BLOCKS
from diffattn.plan.checkpoints.shape import read_checkpoint, shape_of
from diffattn.plan.cluster.answer import plan_cluster
from diffattn.plan.models.public import public_models
from diffattn.plan.setting import Setting

TINY = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 40, "vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 60, "n_positions": 17, "bos_token_id": 1,
        "eos_token_id": 2}  # fmt: skip
NEOX = TINY | {"num_key_value_heads": 4}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
MLA = {"kv_lora_rank": 8, "q_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6,
       "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "first_k_dense_replace": 1,
       "num_key_value_heads": 4, "n_group": 2, "topk_group": 1}  # fmt: skip
DELTA = {"linear_key_head_dim": 4, "linear_value_head_dim": 6, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
         "head_dim": 8, "shared_expert_intermediate_size": 20}  # fmt: skip
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 8}
# One of each kind or more, with what its file may switch on.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", GPT2),
    ("gpt2", GPT2 | {"n_inner": 24, "tie_word_embeddings": False}),
    ("gpt_neox", NEOX),
    ("gpt_neox", NEOX | {"attention_bias": False, "tie_word_embeddings": True}),
    ("phi", TINY),
    ("phi", TINY | {"qk_layernorm": True}),
    ("starcoder2", TINY),
    ("starcoder2", TINY | {"use_bias": False, "sliding_window": 5}),
    ("nemotron", TINY),
    ("nemotron", TINY | {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    ("mixtral", TINY),
    ("mixtral", TINY | {"num_local_experts": 3, "head_dim": 6, "sliding_window": 5}),
    ("qwen2_moe", TINY | MOE | {"shared_expert_intermediate_size": 20}),
    ("qwen3_moe", TINY | MOE | {"head_dim": 16, "attention_bias": True, "decoder_sparse_step": 2}),
    ("qwen3_moe", TINY | MOE | {"mlp_only_layers": [1]}),
    ("gpt_oss", TINY | {"num_local_experts": 6, "head_dim": 16, "sliding_window": 5}),
    ("deepseek_v2", TINY | MLA),
    ("deepseek_v2", TINY | MLA | {"q_lora_rank": None, "attention_bias": True}),
    ("deepseek_v3", TINY | MLA),
    ("deepseek_v3", TINY | MLA | {"attention_bias": True}),
    ("qwen3_next", TINY | MOE | DELTA),
    ("qwen3_next", TINY | MOE | DELTA | {"attention_bias": True}),
    ("falcon_h1", TINY | MAMBA),
    ("falcon_h1", TINY | {"mamba_n_heads": 4, "mamba_d_ssm": None, "mamba_rms_norm": True, "mamba_proj_bias": True,
                          "projectors_bias": True, "attention_bias": True, "mlp_bias": True}),
    ("recurrent_gemma", TINY | {"lru_width": 48, "num_hidden_layers": 5}),
    ("recurrent_gemma", TINY | {"attention_bias": True}),
]  # fmt: skip
# No class of transformers has these.
ELSEWHERE = {"phi4flash"}


def shape(kind: str, values: dict[str, Any]) -> BlockShape:
    found = shape_of(values | {"model_type": kind}, "tiny", "tiny").shape
    assert isinstance(found, BlockShape)
    return found


def test_every_kind_is_held_to_a_built_model() -> None:
    assert {kind for kind, _ in CASES} | ELSEWHERE == set(BLOCKS)


@pytest.mark.parametrize(("kind", "values"), CASES)
def test_parameters_are_those_of_the_built_model(tmp_path: Path, kind: str, values: dict[str, Any]) -> None:
    config = AutoConfig.for_model(kind, **values)
    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(config).num_parameters()
    assert shape(kind, values).parameters().total == expected
    # And as the library itself writes the file, with all its fields.
    config.architectures = [BLOCKS[kind].architecture]
    config.save_pretrained(tmp_path)
    assert plan(str(tmp_path), setting=Setting(context=64)).model.estimate.parameters.total == expected


def test_phi_4_flash_is_counted_tensor_by_tensor() -> None:
    """Against the list of its tensors, written out for the published sizes."""
    D, F, V, inner, states, rank = 2560, 10_240, 200_064, 5120, 16, 160
    lambdas = 4 * 64 + 128
    mamba = 2 * inner * D + inner * 4 + inner + (rank + 2 * states) * inner + inner * rank + inner + inner * states
    mamba += inner + D * inner
    own = (40 + 2 * 20) * 64 * (D + 1) + D * (D + 1) + lambdas
    cross = 2 * D * (D + 1) + lambdas
    layers = 9 * mamba + 7 * 2 * D * inner + 9 * own + 7 * cross + 32 * (3 * D * F + 4 * D)
    found = public_models()["phi-4-mini-flash"].planned()
    assert isinstance(found.shape, BlockShape)
    assert (found.shape.parameters().total, found.attention) == (V * D + layers + 2 * D, "diff_v1")


# Of each attention how many numbers a token keeps, and what windows keep, as the caches of transformers have them.
@pytest.mark.parametrize(
    ("kind", "values"),
    [(kind, values) for kind, values in CASES if kind in ("gpt2", "phi", "starcoder2", "mixtral", "gpt_oss")],
)
def test_the_cache_is_as_large_as_that_of_transformers(kind: str, values: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values), attn_implementation="eager")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for tokens in ([[3] * 8], [[4]]):
            model(torch.tensor(tokens), past_key_values=cache, use_cache=True)
    held = sum(each.keys.numel() + each.values.numel() for each in cache.layers)
    found = shape(kind, values)
    assert found.cached(9) == held
    setting = Setting(context=9, precision="fp32", machine=None)
    assert estimate_model(found, "softmax", setting).decoding.memory.cache == 4 * held


def test_windows_count_the_pairs_and_keys_that_are_seen() -> None:
    block = Block(what="attention", layers=2, matrices=1, pairs=3, kept=5, window=4)
    for context in (1, 3, 4, 5, 19):
        seen = [min(token, 4) for token in range(1, context + 1)]
        assert (block.pairs_seen(context), block.keys(context)) == (sum(seen), seen[-1])
        assert block.tokens_kept(context) == min(context, 3)


def test_latent_keys_cost_less_cache_and_are_read_as_they_are() -> None:
    found = shape("deepseek_v3", TINY | MLA)
    assert found.cached(7) == 4 * 7 * (8 + 4)
    # Scores over the latents and the rotated key, and a sum of latents; a prompt has keys of 12 and values of 6.
    assert found.decoding_attention_flops(7) == (2 * 4 * 7 * 4 * (12 + 6), 2 * 4 * 7 * 4 * (8 + 4 + 8))
    assert found.attention_flops(7) == (2 * 4 * 28 * 4 * 18,) * 2


def test_a_state_does_not_grow_and_layers_that_share_keep_nothing() -> None:
    found = public_models()["phi-4-mini-flash"].planned().shape
    assert isinstance(found, BlockShape)
    grown = found.cached(100_000) - found.cached(99_999)
    # One layer of 17 alone keeps 20 keys and 20 values of 64 of each token.
    assert grown == 2 * 20 * 64
    states = 9 * 5120 * (16 + 3)
    assert found.cached(100_000) == states + 2 * 20 * 64 * (100_000 + 8 * 511)


def test_experts_count_in_memory_whole_and_in_flops_as_chosen() -> None:
    few, many = (shape("mixtral", TINY | {"num_local_experts": number}) for number in (2, 8))
    of_expert = 3 * 32 * 40
    router = 32
    assert many.parameters().total - few.parameters().total == 4 * 6 * (of_expert + router)
    assert many.linear_flops - few.linear_flops == 2 * 4 * 6 * router
    assert few.active() == few.parameters().total
    assert many.active() == many.parameters().total - 4 * 6 * of_expert
    # Of one token two experts are read, of two tokens four, of four all.
    read = [many.read_by(tokens) for tokens in (1, 2, 4, 5)]
    assert (read[1] - read[0], read[2] - read[1], read[3] - read[2]) == (4 * 2 * of_expert, 4 * 4 * of_expert, 0)


def test_motif_3_has_the_parameters_of_its_weights_and_its_experts() -> None:
    found = public_models()["motif-3"].planned().shape
    assert isinstance(found, BlockShape)
    assert found.parameters().total == 314_841_775_750
    assert found.active() == pytest.approx(13.2e9, rel=0.005)
    layers = {(each.layers, each.window, bool(each.experts)) for each in found.blocks}
    assert layers == {(1, None, False), (1, 129, False), (13, None, True), (38, 129, True)}
    assert found.cached(1000) == (512 + 64) * (14 * 1000 + 39 * 128)
    assert public_models()["mixtral-8x7B"].planned().shape.active() == pytest.approx(12.9e9, rel=0.005)


def test_a_plan_of_such_a_model_says_what_it_leaves_out() -> None:
    result = plan("motif-3", "diff_v1:3M", Setting(context=256, machine="rtx 3060"))
    text = " ".join(result.notes)
    for words in (
        "38 × grouped differential attention over latent keys with experts within 129 tokens",
        "Of its 314,841,775,750 parameters a token meets 13,229,298,406",
        "latent keys and values, which decoding reads as they are",
        "Training of motif-3 is not planned",
        "a layer that predicts further tokens, which generation leaves out (251,151,876 parameters)",
    ):
        assert words in text
    assert result.model.estimate.training is None
    assert "Of motif-3 only inference is planned" in result.sentences[1]
    rows = {row.key: row for row in result.ratios}
    assert rows["active_parameters"].model == 13_229_298_406
    assert rows["active_parameters"].against == rows["parameters"].against
    assert [row.backend for row in result.backends if row.model == "motif-3"] == ["standard"]
    assert "active_parameters" not in {row.key for row in plan("diff_v1:3M", setting=Setting(context=256)).ratios}


def test_further_layers_in_the_files_are_named_and_not_counted() -> None:
    found = shape_of(TINY | MLA | {"model_type": "deepseek_v3", "num_nextn_predict_layers": 1}, "tiny", "tiny")
    assert isinstance(found.shape, BlockShape)
    assert found.shape.unplanned == ("a layer that predicts further tokens, which generation leaves out",)
    assert found.shape.parameters() == shape("deepseek_v3", TINY | MLA).parameters()


def test_the_sizes_of_inference_are_sums_of_what_is_said() -> None:
    found = shape("qwen3_next", TINY | MOE | DELTA)
    setting = Setting(context=50, batch=3, precision="bf16", machine="rtx 3060")
    result = estimate_model(found, "softmax", setting)
    weights, cache = 2 * found.parameters().total, 2 * 3 * found.cached(50)
    assert (result.decoding.memory.weights, result.decoding.memory.cache) == (weights, cache)
    assert result.decoding.bytes_moved == 2 * found.read_by(3) + cache
    assert result.decoding.flops == 3 * (found.linear_flops + found.decoding_attention_flops(51)[1])
    assert inference_need(found, "softmax", setting) == result.inference_peak
    assert result.disk["int8"].bytes == found.parameters().total
    wide = max(each.wide for each in found.blocks)
    assert result.prefill.memory.activations == 2 * 150 * (2 * 32 + wide)


@pytest.mark.parametrize(
    ("kind", "more", "words"),
    [
        ("mixtral", {"num_local_experts": 0}, "num_local_experts=0"),
        ("mixtral", {"num_experts_per_tok": "2"}, "num_experts_per_tok='2'"),
        ("mixtral", {"num_attention_heads": 5}, "hidden_size=32 with num_attention_heads=5"),
        ("mixtral", {"gate_of_my_own": 1}, "gate_of_my_own=1, which may change what is counted"),
        ("nemotron", {"attention_bias": "yes"}, "attention_bias='yes'; wanted a truth value"),
        ("gpt_oss", {"layer_types": ["full_attention"]}, "layer_types of 1 layers with num_hidden_layers=4"),
        ("gpt_oss", {"layer_types": ["mamba"] * 4}, "layer_types="),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("qwen3_moe", {"mlp_only_layers": [9]}, r"mlp_only_layers=\[9\]"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads=2"),
        ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, "weights as they were before"),
        ("qwen3_next", {"layer_types": ["linear_attention"] * 3}, "layer_types of 3 layers"),
        ("falcon_h1", {"mamba_n_heads": 5}, "mamba_n_heads=5"),
        ("recurrent_gemma", {"block_types": ["mamba"]}, "block_types="),
        ("phi4flash", {"num_hidden_layers": 6}, "6 layers with 4 heads"),
        ("phi4flash", {"num_attention_heads": 1, "num_key_value_heads": 1}, "heads in pairs"),
        ("Motif", {"num_noise_heads": 0, "diff_v2": True}, "num_noise_heads=0"),
    ],
)
def test_a_field_that_cannot_be_planned_is_named(tmp_path: Path, kind: str, more: dict[str, Any], words: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY | more | {"model_type": kind}))
    with pytest.raises(ConfigError, match=words) as caught:
        read_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_noise_heads": 0}, "num_noise_heads=0"),
        ({"num_noise_heads": 12}, "num_attention_heads=80, num_noise_heads=12 and num_key_value_heads=16"),
        ({"num_key_value_heads": 8}, "num_key_value_heads=8"),
        ({"qk_rope_head_dim": 192}, "qk_rope_head_dim=192 with head_dim=192"),
        ({"attention_cls": "basic"}, "attention_cls='basic'"),
        ({"hidden_act": "silu"}, "hidden_act='silu'"),
    ],
)
def test_a_motif_3_that_contradicts_itself_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        shape_of(public_models()["motif-3"].config | change, "motif-3", "motif-3")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: plan("motif-3", setting=Setting(backend="fused_cpu")), "backend fused_cpu for motif-3"),
        (lambda: plan("motif-3", setting=Setting(ranks=2, batch=2)), "2 processes for motif-3"),
        (lambda: plan("diff_v1:mixtral-8x7B"), "a variant of mixtral-8x7B"),
        (lambda: plan_cluster("8xH100", ["motif-3"]), "motif-3 on a cluster"),
    ],
)
def test_what_is_not_planned_of_such_a_model_is_refused(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        call()


def test_such_a_model_is_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "gpt-2", "--context", "64", "--dtype", "float32", "--measure"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("diffattn: --measure of gpt-2; wanted a model that")


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (kind, values)
        for kind, values in CASES
        if kind in ("gpt2", "gpt_neox", "phi", "nemotron", "mixtral", "qwen3_moe", "deepseek_v3")
        and "sliding_window" not in values
    ],
)
def test_flops_are_those_that_torch_counts(kind: str, values: dict[str, Any]) -> None:
    """Of a forward pass that writes its maps out, for all T × T pairs: torch's counter knows no mask."""
    config = AutoConfig.for_model(kind, **values)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    tokens = 6
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(tokens)[None], use_cache=False)
    found = shape(kind, values)
    pairs = sum(each.layers * each.pairs for each in found.blocks)
    scans = sum(each.layers * each.scan for each in found.blocks)
    expected = tokens * (found.linear_flops - 2 * scans) + 2 * tokens**2 * pairs
    assert counter.get_total_flops() == expected
