"""A model that is spread over ranks computes what one process computes, in every way of spreading it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from support import sharded
from support.ranks import run_ranks
from support.small_models import tokens

from diffattn.errors import ConfigError
from diffattn.model.modeling import DiffTransformerForCausalLM
from diffattn.plan.ranks.mesh import mesh_sizes

# Sums in another order: of the losses as such, and of gradients as a part of the largest number of each.
LOSS, GRADIENT = 1e-6, 5e-6


# Copies on two hosts, or on all ranks, are FSDP2's alone: no variant has a part in them.
CASES = [f"{name} {way}" for name in sharded.MODELS for way in ("full 1", "full 2")]
CASES += [f"{name} {way} 1" for name in ("diff_v1", "diff_v2") for way in ("hybrid", "none")]


@pytest.fixture(scope="module")
def four_ranks() -> dict[str, tuple[float, str, float]]:
    """What four ranks found, which is one launch for all tests."""
    return run_ranks(sharded.errors, 4, CASES)[0]


@pytest.mark.parametrize("case", CASES)
def test_four_ranks_have_the_loss_and_the_gradients_of_one_process(case, four_ranks):
    loss, worst, gradient = four_ranks[case]
    assert abs(loss) <= LOSS
    assert gradient <= GRADIENT, worst


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def two_ranks(folder) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    return run_ranks(sharded.two_ranks, 2, str(folder))


@pytest.mark.parametrize("cast", [False, True], ids=["float32 weights", "a model in bfloat16"])
@pytest.mark.parametrize("name", ["diff_v1 1", "diff_v1 2", "dex 1", "dex 2"])
def test_what_is_float32_by_design_has_the_bits_of_one_process_under_bfloat16(name, cast, two_ranks):
    for found in two_ranks:
        assert all(found["exact"][name][cast].values()), found["exact"][name][cast]


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_sharded_model_writes_what_one_process_writes(tensor, two_ranks):
    assert [found["written"][tensor] for found in two_ranks] == [True, True]


@pytest.mark.parametrize(
    "case",
    ["diff_v1 checkpointing 1", "dex checkpointing 2", "diff_v1 compiled 2", "diff_v1 accumulated 1",
     "diff_v1 accumulated 2", "dex accumulated 2"],
)  # fmt: skip
def test_every_way_of_computing_has_the_gradients_of_one_process(case, two_ranks):
    worst, gradient = two_ranks[0]["ways"][case]
    assert gradient <= GRADIENT, worst


def test_norm_optimizer_and_folder_are_those_of_one_process(two_ranks, folder):
    norms = two_ranks[0]["step"]
    assert norms["sharded"] == pytest.approx(norms["alone"], rel=1e-6)
    models = {way: DiffTransformerForCausalLM.from_pretrained(folder / way) for way in norms}
    before = sharded.model_of("diff_v1")
    for key, weight in models["alone"].named_parameters():
        torch.testing.assert_close(models["sharded"].get_parameter(key), weight, rtol=0, atol=1e-5)
        # A step of Adam is about as long as the learning rate, 0.01, where a gradient is not small.
        assert (weight - before.get_parameter(key)).abs().max() > 1e-3, key
    ids = tokens(2, 9)
    torch.testing.assert_close(models["sharded"](ids).logits, models["alone"](ids).logits, rtol=0, atol=1e-4)


def test_one_rank_saves_a_sharded_model_as_it_is(tmp_path):
    run_ranks(sharded.saved_by_one_rank, 1, str(tmp_path))
    saved = DiffTransformerForCausalLM.from_pretrained(tmp_path)
    for key, weight in sharded.model_of("diff_v2").named_parameters():
        assert torch.equal(saved.get_parameter(key), weight), key


@pytest.mark.parametrize(
    ("mistake", "line"),
    [
        ("plain, λ", "λ in bfloat16, to which a wrapper rounded it; wanted float32 whatever the model computes in: "
         "shard the model with diffattn.shard, which keeps it, and with no other wrapper"),
        ("plain, DEX", "DEX in bfloat16, to which a wrapper rounded it; wanted float32 whatever the model computes in: "
         "shard the model with diffattn.shard, which keeps it, and with no other wrapper"),
        ("two seeds", "model.layers.1.mlp.up_proj.weight is not the same on all ranks; wanted one model, the same on "
         "each rank: build it with one seed, or load it from one folder"),
        ("twice", "a model that is sharded already; wanted one that is whole on each rank: shard it once"),
        ("another model", "a Linear; wanted a model of diffattn without a wrapper: shard it before anything wraps it"),
        ("another mesh", "a mesh with the dimensions dp; wanted shard, and replicate and tensor where they are "
         "wanted: make it with diffattn.mesh_for"),
        ("another number", "a mesh of 1 rank where 2 run; wanted all ranks in the mesh: give mesh_for the number of "
         "all; Accelerator(cpu=True) finds the ranks where there is no GPU"),
        ("another dtype", "dtype=torch.float16; wanted torch.float32 or torch.bfloat16: take torch.bfloat16"),
        ("not sharded", "the weights are whole on every rank, so no wrapper sharded this model; wanted a model that "
         "is sharded by FSDP2: call diffattn.shard(model, mesh) before training, and give the model to no other "
         "wrapper"),
        ("another wrapper", "FSDP was asked for, and each of 2 ranks trains the whole model; wanted a model that is "
         "sharded: shard it with diffattn.shard(model, mesh) and leave fsdp out, or train on GPUs"),
    ],
)  # fmt: skip
def test_every_rank_says_a_mistake_in_the_same_line(mistake, line, two_ranks):
    assert [found["said"].get(mistake) for found in two_ranks] == [line, line]


def test_rounded_rotary_frequencies_are_refused():
    model = sharded.model_of("softmax")
    # As FSDP1 does with a dtype for buffers.
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.bfloat16()
    with pytest.raises(ConfigError, match=re.escape("the rotary frequencies in bfloat16")):
        model(tokens(1, 5))


@pytest.mark.parametrize(
    ("shard", "tensor", "sizes"),
    [("full", 1, (1, 8, 1)), ("full", 2, (1, 4, 2)), ("none", 4, (2, 1, 4)), ("hybrid", 2, (2, 2, 2))],
)
def test_a_mesh_has_three_named_sizes_that_multiply_to_the_ranks(shard, tensor, sizes):
    assert mesh_sizes(8, shard=shard, tensor=tensor, per_host=4) == sizes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard": "half"}, "shard='half'; wanted none, full or hybrid: correct the name"),
        ({"shard": "full", "tensor": 3}, "tensor parallelism over 3 ranks of 8; .*: take one of 1, 2, 4, 8"),
        ({"shard": "hybrid", "per_host": 3}, "shard='hybrid' with 8 ranks, 3 on each host and 1 for each layer"),
        ({"shard": "hybrid", "per_host": 2, "tensor": 4}, "2 on each host and 4 for each layer"),
    ],
)
def test_numbers_of_ranks_that_do_not_divide_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        mesh_sizes(8, **options)
