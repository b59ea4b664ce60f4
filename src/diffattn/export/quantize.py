"""Weights in 8 or 4 bits: each block of 32, along a product's sum, shares one float32 scale.

The matrices of the layers become ``MatMulNBits``, by onnxruntime's own ``MatMulNBitsQuantizer``. The embedding and the
output head are the largest matrix of a small model. Where they are tied they stay one: the table is quantised once, by
the same quantiser, and both a ``GatherBlockQuantized`` and a ``MatMulNBits`` read it; the last block of a row is filled
up with zeros. λ, norms, biases and DEX's W_D stay float32. ::

    table (V, D / block · bytes) uint8 ─┬─ GatherBlockQuantized(input_ids) ──→ embeddings
                                        └─ Reshape (V, D / block, bytes) ──→ MatMulNBits ──→ logits
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from diffattn.errors import ConfigError
from diffattn.export import onnxruntime_private
from diffattn.export.options import BITS
from diffattn.export.run import HEAD, require

BLOCK_SIZES = (16, 32, 64, 128, 256)
TABLE = "model.embed_tokens.weight"
MICROSOFT = "com.microsoft"


def check_block_size(block_size: int) -> None:
    """Raises a ``ConfigError`` for a block size that onnxruntime does not have."""
    if block_size not in BLOCK_SIZES:
        raise ConfigError(
            f"block_size is {block_size}", f"one of {', '.join(map(str, BLOCK_SIZES))}", "leave it out for 32"
        )


def quantize(
    graph: Any,
    bits: int,
    *,
    block_size: int = 32,
    symmetric: bool = True,
    table_bits: int = 8,
    accuracy_level: int = 4,
) -> Any:
    """Returns a graph of ``diffattn.export.graph.to_graph`` with quantised weights; the argument stays as it is.

    Args:
        graph: an ``onnx_ir.Model``.
        bits: bits of a weight in the matrices of the layers, 8 or 4.
        block_size: weights, along a product's sum, that share one scale: 16, 32, 64, 128 or 256.
        symmetric: whether blocks have no zero point.
        table_bits: bits of a weight in the embedding and the output head, 8 or 4.
        accuracy_level: the attribute of ``MatMulNBits``. 4: activations are quantised to int8 on the fly, and products
            are of integers; 0: the weights are made float32 again at every call, several times slower on a CPU.

    Raises:
        ConfigError: bits or block size are none of these.
        UnsupportedError: onnx or onnxruntime is missing.
    """
    if bits not in BITS or table_bits not in BITS:
        raise ConfigError(
            f"bits is {bits} and table_bits {table_bits}",
            f"one of {', '.join(map(str, BITS))} for each",
            "pass bits=8 and table_bits=8",
        )
    check_block_size(block_size)
    require("onnx", "onnxruntime")
    import onnx_ir

    library = onnxruntime_private.quantizers()

    def options(width: int) -> Any:
        return library.DefaultWeightOnlyQuantConfig(
            block_size=block_size, is_symmetric=symmetric, accuracy_level=accuracy_level, bits=width
        )

    # V2's λ of each head is a sigmoid of a product with a matrix of few columns: nothing is gained by rounding it.
    excluded = [HEAD, *(node.name for node in graph.graph if node.name.endswith("lambda_proj"))]
    quantizer = library.MatMulNBitsQuantizer(
        onnx_ir.to_proto(graph), bits=bits, algo_config=options(bits), nodes_to_exclude=excluded
    )
    quantizer.process()
    quantized = onnx_ir.from_proto(quantizer.model.model)
    quantized.graph.opset_imports.setdefault(MICROSOFT, 1)
    _quantize_table(quantized.graph, options(table_bits))
    quantized.graph.sort()
    return quantized


def _quantize_table(graph: Any, options: Any) -> None:
    """Puts the quantised embedding and head in the place of those in ``graph``; one table where they are tied."""
    import onnx_ir

    nodes = list(graph)
    gather = next(node for node in nodes if node.op_type == "Gather" and node.inputs[0].name == TABLE)
    head = next(node for node in nodes if node.name == HEAD)
    table = graph.initializers[TABLE]
    width = table.shape[1]
    block = options.block_size
    tied = not head.inputs[1].is_initializer()

    def constant(name: str, values: npt.NDArray[Any]) -> Any:
        value = onnx_ir.val(name, const_value=onnx_ir.tensor(values, name=name))
        graph.register_initializer(value)
        return value

    def pack(name: str, weight_VD: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.uint8], list[Any]]:
        packed, scales, zeros = _blocks(weight_VD, options)
        rest = [constant(f"{name}_scales", scales)]
        if not options.is_symmetric:
            rest.append(constant(f"{name}_zero_points", zeros))
        return packed, rest

    packed, rest = pack(TABLE, table.const_value.numpy())
    data = constant(f"{TABLE}_Q{options.bits}", packed.reshape(len(packed), -1))
    attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": block, "bits": options.bits}
    embed = onnx_ir.node(
        "GatherBlockQuantized", [data, gather.inputs[1], *rest], attributes, domain=MICROSOFT, name="embed_tokens"
    )
    graph.insert_before(gather, embed)
    rows = embed.outputs[0]
    if width % block:
        # The last block is filled up with zeros, which the product with the head leaves out by itself.
        ends = [constant(f"embed_tokens_{name}", np.array([value])) for name, value in (("begin", 0), ("end", width))]
        axis = constant("embed_tokens_axis", np.array([-1]))
        cut = onnx_ir.node("Slice", [rows, *ends, axis], name="embed_tokens_width")
        graph.insert_before(gather, cut)
        rows = cut.outputs[0]
    gather.outputs[0].replace_all_uses_with(rows)
    graph.remove(gather, safe=True)

    if tied:
        shape = constant("lm_head_shape", np.array(packed.shape))
        reshape = onnx_ir.node("Reshape", [data, shape], name="lm_head_weight")
        graph.insert_before(head, reshape)
        matrix = reshape.outputs[0]
    else:
        packed, rest = pack(f"{HEAD}.weight", head.inputs[1].const_value.numpy().T)
        matrix = constant(f"{HEAD}.weight_Q{options.bits}", packed)
    attributes = {"K": width, "N": len(packed), "bits": options.bits, "block_size": block}
    if options.accuracy_level:
        attributes["accuracy_level"] = options.accuracy_level
    product = onnx_ir.node("MatMulNBits", [head.inputs[0], matrix, *rest], attributes, domain=MICROSOFT, name=HEAD)
    logits = head.outputs[0]
    product.outputs[0].name, product.outputs[0].shape, product.outputs[0].type = logits.name, logits.shape, logits.type
    graph.insert_before(head, product)
    graph.outputs[0] = product.outputs[0]
    old = head.inputs[1]
    graph.remove(head, safe=True)
    if tied:
        graph.remove(old.producer(), safe=True)
    else:
        del graph.initializers[old.name]
    del graph.initializers[TABLE]


def _blocks(
    weight_VD: npt.NDArray[np.float32], options: Any
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """Returns packed blocks (V, blocks, bytes of one), scales (V, blocks) and packed zero points of the rows."""
    # The library cuts columns into blocks.
    return onnxruntime_private.quantize_blocks(np.ascontiguousarray(weight_VD.T), options)
