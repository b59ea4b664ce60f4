import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from support.small_models import SHAPE, assert_same_logits, small_model, tokens

from diffattn.errors import ConfigError, UnsupportedError
from diffattn.model.configuration import DIFF_FUSED, DiffTransformerConfig
from diffattn.ops.cpu import operator as fused_cpu
from diffattn.ops.reference import Call

RANKS = 2
MODELS = {
    "softmax": ("softmax", {"qk_norm": True, "attention_bias": True, "attention_output_bias": True}),
    "diff_v1": ("diff_v1", {"qk_norm": True}),
    "diff_v2": ("diff_v2", {"attention_output_bias": True, "tie_word_embeddings": False}),
    "diff_gda": ("diff_gda", {"lambda_init": [-0.1, 0.2, 0.4]}),
    "diff_gda_v2": ("diff_gda_v2", {}),
    "dex": ("dex", {"dex_heads": [[1, 5], [11, 2, 7], [0, 10]], "mlp_bias": True}),
    "dex of all heads": ("dex", {}),
}
# Twice a prime, which older versions of transformers want of what they share between two ranks.
EVEN = dataclasses.replace(SHAPE, vocab_size=2 * 37, intermediate_size=2 * 31)
TESTS = Path(__file__).parents[1]


def model_of(name: str):
    attention, fields = MODELS[name]
    model = small_model(attention, shape=EVEN, **fields)
    for key, parameter in model.named_parameters():
        if ".dex." in key or key.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    for key, buffer in model.named_buffers():
        if key.endswith("annealed"):
            buffer.fill_(0.6)
    return model


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    """The folder of what two processes found, which is the same test for all: starting them takes most of the time."""
    models, out = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("out")
    for name in MODELS:
        model_of(name).save_pretrained(models / name)
    # One key head of width 2d, with all query heads.
    narrow = dataclasses.replace(EVEN, num_kv_heads=2, num_layers=1)
    small_model("diff_v1", shape=narrow).save_pretrained(models / "one head")
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}",
               str(TESTS / "support" / "tensor_parallel_worker.py"), str(models), str(out)]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_compute_what_one_process_computes(name, ran):
    model, ids = model_of(name), tokens(2, 9)
    expected = model(ids).logits
    text = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    for rank in range(RANKS):
        found = load_file(ran / f"{name} {rank}.safetensors")
        for implementation in {model.config._attn_implementation, "sdpa"}:
            assert_same_logits(found[f"logits {implementation}"], expected)
        assert torch.equal(found["text"], text)
        assert torch.equal(found["text, static cache"], text)
    # The comparison is one: a model without this rank's other half is far off.
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:, layer.self_attn.o_proj.in_features // 2 :] = 0
    assert (model(ids).logits - expected).abs().max() > 0.1


@pytest.mark.parametrize("name", MODELS)
def test_each_rank_holds_its_heads_whole_pairs_with_their_key_head(name, ran):
    model = model_of(name)
    config, attention = model.config, model.model.layers[1].self_attn
    assert config.num_key_value_heads % RANKS == 0
    for rank in range(RANKS):
        found = load_file(ran / f"{name} {rank}.safetensors")

        def rows(count: int, width: int, rank: int = rank) -> slice:
            assert count % RANKS == 0
            return slice(rank * count // RANKS * width, (rank + 1) * count // RANKS * width)

        queries, groups = config.num_attention_heads, config.num_key_value_heads
        per_group = queries // groups
        if config.subtracts_maps:
            # A noise head is on the rank of its signal heads.
            assert per_group % (config.signals_per_noise + 1) == 0
        assert torch.equal(found["q_proj"], attention.q_proj.weight[rows(queries, attention.width)])
        for key in ("k_proj", "v_proj"):
            assert torch.equal(found[key], getattr(attention, key).weight[rows(groups, attention.head_dim)])
        # The query heads that the rank holds are those of the key heads that it holds.
        assert len(found["q_proj"]) // attention.width == per_group * len(found["k_proj"]) // attention.head_dim
        outputs = attention.o_proj.in_features // RANKS
        assert torch.equal(found["o_proj"], attention.o_proj.weight[:, rank * outputs : (rank + 1) * outputs])
        assert ("lambda_proj" in found) == (name in ("diff_v2", "diff_gda_v2"))
        if "lambda_proj" in found:
            assert torch.equal(found["lambda_proj"], attention.lambda_proj.weight[rows(config.output_heads, 1)])


@pytest.mark.parametrize("name", ["diff_v1", "diff_v2", "diff_gda"])
def test_the_kernel_serves_each_ranks_heads(name, ran):
    model = model_of(name)
    query = torch.zeros(1, 1, 2, 10)
    available = fused_cpu.unsupported(Call(query, query, query, query, torch.zeros(1, 1, 2, 20), 0.0)) is None
    for rank in range(RANKS):
        found = load_file(ran / f"{name} {rank}.safetensors")
        heads = model.config.output_heads // RANKS
        assert found[f"kernel {DIFF_FUSED}"] == (heads if available else 0)
        assert found["kernel sdpa"] == 0


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_one_process_on_every_rank(name, ran):
    model, ids = model_of(name), tokens(2, 9)
    model(ids, labels=ids, use_cache=False).loss.backward()
    for rank in range(RANKS):
        found = load_file(ran / f"{name} {rank}.safetensors")
        for key, parameter in model.named_parameters():
            if ".lam." in key and Version(transformers.__version__) < Version("5.23"):
                # Its hook for summing gradients runs too early for a module that takes no input.
                continue
            # A sum that left out a rank would be off by about the gradient itself.
            scale = float(parameter.grad.abs().max())
            assert scale > 1e-6, key
            torch.testing.assert_close(found[f"gradient {key}"], parameter.grad, rtol=0, atol=1e-4 * scale, msg=key)


def test_more_ranks_than_key_heads_are_refused_in_one_line(ran):
    said = json.loads((ran / "said.json").read_text())
    assert list(said) == ["one head"]
    assert said["one head"] == (
        "tensor parallelism over 2 ranks; wanted a number of ranks that divides the 1 key/value heads of the attention "
        "call: take 1"
    )


@pytest.mark.parametrize(
    ("attention", "works"),
    [
        ("softmax", [1, 2, 4]),
        ("diff_v1", [1, 2]),
        ("diff_v2", [1, 2, 4]),
        ("diff_gda", [1, 2]),
        ("diff_gda_v2", [1, 2, 4]),
        ("dex", [1, 2, 4]),
    ],
)
def test_numbers_of_ranks_that_part_a_pair_or_a_key_head_are_refused(attention, works):
    config = DiffTransformerConfig.from_shape(SHAPE, "softmax" if attention == "dex" else attention)
    config.attention = attention
    for ranks in range(1, 13):
        if ranks in works:
            config.check_tensor_parallel(ranks)
        else:
            with pytest.raises(ConfigError, match=f"take {', '.join(map(str, works))}$"):
                config.check_tensor_parallel(ranks)


def test_dex_heads_of_a_rank_that_is_not_told_are_refused():
    attention = model_of("dex").model.layers[0].self_attn
    with pytest.raises(UnsupportedError, match="does not say which of them are here, which DEX has to know"):
        attention.combine(torch.zeros(1, 1, SHAPE.num_heads // 2, SHAPE.head_dim), None)


@pytest.mark.parametrize("name", MODELS)
def test_the_plan_names_every_module_of_a_layer_that_a_rank_holds_in_part_or_trains_with_others(name):
    model = model_of(name)
    modules = {key.replace("layers.0.", "layers.*.") for key, _ in model.model.named_modules()}
    plan = model.config.base_model_tp_plan
    assert plan.keys() <= modules
    outside = {key.rpartition(".")[0].replace("layers.0.", "layers.*.") for key, _ in model.model.named_parameters()
               if "layers.0." in key} - plan.keys()  # fmt: skip
    assert outside == {"layers.*.input_layernorm", "layers.*.post_attention_layernorm"}
    # What engines read as colwise and rowwise are linear layers.
    for key, style in plan.items():
        module = model.model.get_submodule(key.replace("*", "0"))
        assert isinstance(module, torch.nn.Linear) == (style in ("colwise", "rowwise"))
