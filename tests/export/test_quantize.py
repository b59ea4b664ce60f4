import logging

import numpy as np
import onnx_ir
import pytest
import torch
from support.small_exports import (
    copy,
    decoder,
    every_option,
    model_of,
    small_checkpoint,
    traced,
    traced_checkpoint,
    traced_every_option,
)
from support.small_models import tokens

from diffattn.cli.main import main
from diffattn.errors import ConfigError
from diffattn.export import graph as onnx_graph
from diffattn.export import onnx as onnx_export
from diffattn.export.check import check_float32, check_quantized
from diffattn.export.quantize import BITS, quantize

ATTENTIONS = ("diff_v1", "diff_v2", pytest.param("diff_gda_v2", marks=pytest.mark.full))


@pytest.fixture(scope="module", params=ATTENTIONS)
def attention(request):
    return request.param


def logits_of(graph, folder):
    return decoder(graph, folder).logits(tokens(3, 17).numpy())[0]


def error(graph, model, folder):
    """RMS error of the logits over their standard deviation."""
    with torch.no_grad():
        expected = model(tokens(3, 17)).logits.numpy()
    actual = logits_of(graph, folder)
    return float(np.sqrt(np.mean((actual - expected) ** 2)) / expected.std())


def dequantized(graph, name, bits, block, rows, columns, symmetric):
    """A matrix (rows, columns) from the packed blocks of its columns, by the format's definition."""
    packed, scales = (graph.initializers[f"{name}_{end}"].const_value.numpy() for end in (f"Q{bits}", "scales"))
    values = packed.reshape(columns, -1)
    scales = scales.reshape(columns, -1)
    if bits == 4:
        values = np.stack([values & 15, values >> 4], axis=-1).reshape(columns, -1)
    zero = np.full_like(scales, 2 ** (bits - 1))
    if not symmetric:
        zeros = graph.initializers[f"{name}_zero_points"].const_value.numpy().reshape(columns, -1)
        zero = np.stack([zeros & 15, zeros >> 4], axis=-1).reshape(columns, -1) if bits == 4 else zeros
        zero = zero[:, : scales.shape[1]].astype(np.float32)
    blocks = values.reshape(columns, -1, block).astype(np.float32) - zero[..., None]
    return (blocks * scales[..., None]).reshape(columns, -1)[:, :rows].T


def test_eight_bits_keep_within_a_bound_that_four_exceed(attention, tmp_path):
    model, graph = model_of(attention), traced(attention, True)
    errors = {bits: error(quantize(graph, bits), model, tmp_path) for bits in BITS}
    # This model's attention is far from uniform, so it feels rounding more than a trained one does.
    assert 0.003 < errors[8] < 0.08 < errors[4] < 0.5


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_the_logits_are_those_of_the_rounded_weights(bits, symmetric, attention, tmp_path):
    """Exactly: activations in float32, and every matrix of the torch model replaced by what the file holds."""
    quantized = quantize(
        traced(attention, True), bits, block_size=16, symmetric=symmetric, table_bits=bits, accuracy_level=0
    )
    model = model_of(attention)
    replaced = 0
    for name, weight in model.named_parameters():
        if f"{name}_Q{bits}" in quantized.graph.initializers:
            table = name == "model.embed_tokens.weight"
            out, inner = weight.shape
            values = dequantized(quantized.graph, name, bits, 16, inner, out, symmetric).T
            assert np.abs(values - weight.detach().numpy()).max() > 1e-4
            weight.data = torch.from_numpy(values.copy())
            replaced += 2 if table else 1
    model.tie_weights()
    # Seven matrices of each layer, the embedding and the head.
    assert replaced == 2 * 7 + 2
    with torch.no_grad():
        expected = model(tokens(3, 17)).logits
    torch.testing.assert_close(torch.from_numpy(logits_of(quantized, tmp_path)), expected, rtol=0, atol=2e-5)


def test_lambda_and_norms_stay_float32(attention):
    quantized = quantize(traced(attention, True), 4).graph
    kept = {name for name in traced(attention, True).graph.initializers if "lambda_proj" in name or "norm" in name}
    assert len(kept) == (5 if attention == "diff_v1" else 7)
    assert kept <= set(quantized.initializers)


@pytest.mark.parametrize("bits", BITS)
def test_a_tied_table_is_stored_once(bits, tmp_path):
    quantized = quantize(traced("diff_v1", True), bits)
    large = [value.const_value.nbytes for value in quantized.graph.initializers.values() if value.const_value.size > 61]
    model = model_of("diff_v1")
    table, layers = 71 * 64, 0
    for name, weight in model.named_parameters():
        if "proj" in name:
            out, inner = weight.shape
            blocks = -(-inner // 32)
            layers += out * blocks * (4 * bits + 4)
    # Two blocks of 32 bytes and two scales in each row, once.
    assert sum(large) == layers + table + 71 * 2 * 4
    types = [node.op_type for node in quantized.graph]
    assert types.count("GatherBlockQuantized") == 1
    assert types.count("MatMulNBits") == 15
    assert "MatMul" not in types


def test_an_untied_head_has_its_own(tmp_path):
    model = every_option()
    quantized = quantize(traced_every_option(), 8)
    assert {"model.embed_tokens.weight_Q8", "lm_head.weight_Q8"} <= set(quantized.graph.initializers)
    assert not {"model.embed_tokens.weight", "lm_head.weight"} & set(quantized.graph.initializers)
    assert error(quantized, model, tmp_path) < 0.08


@pytest.mark.parametrize("block_size", [16, 64, 256])
def test_blocks_of_every_size_run_through_the_cache(block_size, tmp_path):
    session = decoder(quantize(traced("diff_v1", True), 8, block_size=block_size), tmp_path)
    ids = tokens(2, 9).numpy()
    whole, _ = session.logits(ids)
    first, cache = session.logits(ids[:, :6])
    second, _ = session.logits(ids[:, 6:], cache=cache)
    # Each token's activations are rounded by themselves, so pieces change nothing but the order of sums.
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), whole, rtol=0, atol=0.03)


def test_the_argument_stays_as_it_was():
    graph = traced("diff_v1", True)
    before = onnx_ir.to_proto(graph).SerializeToString(deterministic=True)
    quantize(graph, 4)
    assert onnx_ir.to_proto(graph).SerializeToString(deterministic=True) == before


def test_the_root_logger_stays_as_it_was():
    root = logging.getLogger()
    before = list(root.handlers), root.level
    quantize(traced("diff_v1", True), 8)
    assert (list(root.handlers), root.level) == before


def test_the_check_tells_a_broken_quantised_model_from_a_rounded_one(tmp_path):
    model, graph = model_of("diff_v1"), traced("diff_v1", True)
    onnx_graph.save(graph, tmp_path)
    float32 = check_float32(model, tmp_path)
    quantized = quantize(graph, 8)
    onnx_graph.save(quantized, tmp_path)
    report = check_quantized(model, tmp_path, 8, float32)
    assert report.passed
    assert 0.003 < report.quantized.rounded_error < 0.05
    broken = copy(quantized)
    scales = broken.graph.initializers["model.layers.1.self_attn.q_proj.weight_scales"]
    scales.const_value = onnx_ir.tensor(scales.const_value.numpy()[::-1].copy() * 2, name=scales.name)
    onnx_graph.save(broken, tmp_path)
    assert not check_quantized(model, tmp_path, 8, float32).passed


@pytest.mark.parametrize("options", [{"bits": 3}, {"bits": 8, "block_size": 48}, {"bits": 4, "table_bits": 2}])
def test_other_bits_and_blocks_are_refused(options):
    with pytest.raises(ConfigError, match="wanted one of"):
        quantize(traced("diff_v1", True), **options)


def test_the_verb_quantises_into_a_folder_of_its_own(tmp_path, capsys, monkeypatch):
    folder = small_checkpoint(tmp_path / "checkpoint")
    monkeypatch.setattr(onnx_export, "to_graph", lambda model, **options: copy(traced_checkpoint(folder)))
    assert main(["export", str(folder), "--onnx", "--no-cache", "--bits", "8", "--check"]) == 0
    assert "8 bits: RMS error" in capsys.readouterr().err
    types = [node.op_type for node in onnx_ir.load(folder / "onnx-int8/model.onnx").graph]
    assert types.count("MatMulNBits") == 8
    assert "MatMul" not in types
