"""The quantised embedding in operators that the browser's engine has: the same numbers as in onnxruntime's own."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from diffattn.demo.embedding import LOOKUP, plain_embedding

ROWS, BLOCKS = 37, 3


def graph(block: int, zeros: bool) -> bytes:
    """A look-up of 8 bits alone, as diffattn.export.quantize writes it."""
    random = np.random.default_rng(3)
    tables = {
        "table": random.integers(0, 256, (ROWS, BLOCKS * block), np.uint8),
        "scales": random.normal(size=(ROWS, BLOCKS)).astype(np.float32),
    }
    if zeros:
        tables["zeros"] = random.integers(0, 256, (ROWS, BLOCKS), np.uint8)
    node = helper.make_node(
        LOOKUP, ["table", "ids", *list(tables)[1:]], ["rows"], "embed_tokens", domain="com.microsoft",
        gather_axis=0, quantize_axis=1, block_size=block, bits=8,
    )  # fmt: skip
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "new"])
    rows = helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["batch", "new", BLOCKS * block])
    weights = [numpy_helper.from_array(values, name) for name, values in tables.items()]
    sets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_model(helper.make_graph([node], "look-up", [ids], [rows], weights), opset_imports=sets)
    made.ir_version = 10
    return made.SerializeToString()


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("block", [16, 32])
def test_numbers_are_the_same_to_the_last_bit(zeros, block):
    from onnxruntime import InferenceSession

    content = graph(block, zeros)
    plain = plain_embedding(content)
    assert LOOKUP not in [node.op_type for node in onnx.load_from_string(plain).graph.node]
    onnx.checker.check_model(plain)
    ids = np.random.default_rng(5).integers(0, ROWS, (2, 7))
    found, wanted = (
        InferenceSession(each, providers=["CPUExecutionProvider"]).run(None, {"ids": ids})[0]
        for each in (plain, content)
    )
    assert found.std() > 1
    np.testing.assert_array_equal(found, wanted)


def test_a_graph_without_the_look_up_stays_as_it_is():
    plain = plain_embedding(graph(32, zeros=False))
    assert plain_embedding(plain) is plain
