"""A new variant is a record and a layer: every room that is asked about one that exists in this test alone answers."""

import ast
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import diffattn
from diffattn.cli.main import main
from diffattn.model import attention as layers
from diffattn.model.attention import SoftmaxAttention
from diffattn.model.modeling import DiffTransformerForCausalLM
from diffattn.model.pairing import build_pair, parameters_of
from diffattn.model.tensors import tensor_shapes
from diffattn.plan.shape import ModelShape
from diffattn.report.charts import look
from diffattn.study.options import CompareOptions
from diffattn.variants import ATTENTIONS, VARIANTS, Look, OwnTensor, Variant

FILES = 4
"""So many files a new variant may touch beside tests."""
# Softmax attention with a gate for each token and head, which no variant of ours has.
TOY = Variant(
    name="toy",
    title="a gate per head",
    source="this test",
    summary="sigmoid(x W_t) · attention, a narrower feed-forward network",
    tensors=(OwnTensor(name="t_proj.weight", axes=("H", "D"), split=True),),
    flops=ATTENTIONS["gated"].flops,
    look=Look("#123456", "#abcdef", (7, 1), "cross"),
)


class ToyAttention(SoftmaxAttention):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.t_proj = nn.Linear(config.hidden_size, config.num_attention_heads, bias=False)

    def combining_weights(self, x_BTD: Tensor) -> Tensor:
        return torch.sigmoid(self.t_proj(x_BTD))

    def combine(self, o_BTNW: Tensor, lam: Tensor | None) -> Tensor:
        assert lam is not None
        return o_BTNW * lam[..., None]


@pytest.fixture(autouse=True)
def _toy(monkeypatch):
    monkeypatch.setitem(ATTENTIONS, "toy", TOY)
    monkeypatch.setitem(VARIANTS, "toy", TOY)
    monkeypatch.setitem(layers.ATTENTION, "toy", ToyAttention)


def test_it_is_built_as_a_pair_saved_and_loaded(tmp_path):
    shape = ModelShape(hidden_size=64, num_layers=2, num_heads=4, head_dim=16, intermediate_size=16, vocab_size=96)
    model, twin = build_pair(shape, "toy", seed=3)
    assert model.config.intermediate_size < shape.intermediate_size
    assert abs(model.num_parameters() / twin.num_parameters() - 1) < 0.005
    assert parameters_of(model.config).total == model.num_parameters()
    assert model.config.shape().num_heads == shape.num_heads
    assert model.config.tensor_parallel_plan()["layers.*.self_attn.t_proj"] == "colwise"
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    expected = model(ids, labels=ids)
    expected.loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    assert set(tensor_shapes(model.config)) | {"lm_head.weight"} == set(model.state_dict())
    torch.testing.assert_close(DiffTransformerForCausalLM.from_pretrained(tmp_path)(ids).logits, expected.logits)


def test_it_is_planned_with_what_the_built_model_has(capsys):
    assert main(["plan", "--model", "toy:300K", "--against", "softmax:300K", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    model, twin = planned["model"], planned["against"]
    built = build_pair(ModelShape.preset("300K"), "toy")
    assert model["estimate"]["parameters"]["total"] == built.model.num_parameters()
    assert twin["estimate"]["parameters"]["total"] == built.twin.num_parameters()
    assert model["estimate"]["cache_bytes_per_token"] == twin["estimate"]["cache_bytes_per_token"]


def test_it_is_compared_and_drawn():
    assert CompareOptions(variants=("softmax", "toy")).variants == ("softmax", "toy")
    assert look("toy", ["softmax", "toy"]).colour == TOY.look.colour


def test_few_files_name_the_newest_variant():
    """Those that do are what a new one touches; a docstring that tells of it is none."""
    root = Path(diffattn.__file__).parent
    found = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if any(
            isinstance(node, ast.Constant) and node.value == "gated" for node in ast.walk(ast.parse(path.read_text()))
        )
    }
    assert {"variants.py", "model/attention.py"} <= found
    assert len(found) <= FILES, found
