"""Rewrites the look-up of a quantised embedding in operators that every build of onnxruntime has.

The build for browsers that holds WebAssembly and WebGPU has ``GatherBlockQuantized`` for WebGPU alone. The same bytes
and scales are gathered instead, and multiplied after: the numbers are the same to the last bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from diffattn.export.run import require

LOOKUP = "GatherBlockQuantized"
# What stands for 0 where a row has no zero points of its own.
_MIDDLE = 128


def plain_embedding(content: bytes) -> bytes:
    """Returns a ``model.onnx`` whose embedding of 8 bits is looked up by standard operators; any other as it is.

    Args:
        content: the file, as ``diffattn export --onnx`` writes it.

    Raises:
        UnsupportedError: onnx is missing.
    """
    require("onnx")
    import onnx

    model = onnx.load_from_string(content)
    nodes = model.graph.node
    found = [(place, node) for place, node in enumerate(nodes) if node.op_type == LOOKUP]
    for place, node in reversed(found):
        settings = {each.name: each.i for each in node.attribute}
        assert settings["bits"] == 8, "the table has 8 bits also where the layers have 4"
        nodes.remove(node)
        for step, each in enumerate(_steps(model.graph, node, settings["block_size"])):
            nodes.insert(place + step, each)
    return model.SerializeToString() if found else content


def _steps(graph: Any, node: Any, block: int) -> list[Any]:
    """Returns nodes that give what the one node gives: (bytes − zero) · scale, block by block."""
    from onnx import TensorProto, helper, numpy_helper

    def constant(name: str, values: Any) -> str:
        graph.initializer.append(numpy_helper.from_array(values, f"{node.name}_{name}"))
        return f"{node.name}_{name}"

    steps: list[Any] = []

    def made(kind: str, *inputs: str, **settings: Any) -> str:
        output = f"{node.name}_{len(steps)}"
        steps.append(helper.make_node(kind, inputs, [output], output, **settings))
        return output

    table, ids, scales, *zeros = node.input
    last = constant("last", np.array([-1]))

    def by_block(of: str) -> str:
        return made("Unsqueeze", made("Gather", of, ids), last)

    numbers = made("Cast", made("Gather", table, ids), to=TensorProto.FLOAT)
    blocks = made("Reshape", numbers, constant("blocks", np.array([0, 0, -1, block])))
    zero = made("Cast", by_block(zeros[0]), to=TensorProto.FLOAT) if zeros else constant("zero", np.float32(_MIDDLE))
    scaled = made("Mul", made("Sub", blocks, zero), by_block(scales))
    steps.append(
        helper.make_node("Reshape", [scaled, constant("rows", np.array([0, 0, -1]))], node.output, f"{node.name}_rows")
    )
    return steps
