"""The names of onnxruntime that the ONNX export uses although onnxruntime does not promise to keep them."""

from __future__ import annotations

import importlib
import logging
from typing import Any

from diffattn.private_names import PrivateName

_MODULE = "onnxruntime.quantization.matmul_nbits_quantizer"


def quantizers() -> Any:
    """Returns the module whose quantizers make ``MatMulNBits`` nodes.

    When it is imported it gives Python's root logger a handler and a level; both are put back.
    """
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        return importlib.import_module(_MODULE)
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.getLogger(_MODULE).setLevel(logging.WARNING)


def quantize_blocks(matrix: Any, options: Any) -> Any:
    """Returns the packed blocks, the scales and the packed zero points of a matrix whose columns are cut into blocks.

    Args:
        matrix: float32, (rows, columns), contiguous.
        options: a ``DefaultWeightOnlyQuantConfig`` of :func:`quantizers`.
    """
    return quantizers().DefaultWeightOnlyQuantizer(options).qbits_block_quant(matrix)


_TESTED = ">=1.24,<1.33"
_EXPORT = ("diffattn export --bits", "onnxruntime documents a Python interface that quantises an onnx_ir model")
NAMES = (
    PrivateName(f"{_MODULE}:MatMulNBitsQuantizer", _TESTED, *_EXPORT),
    PrivateName(f"{_MODULE}:DefaultWeightOnlyQuantConfig", _TESTED, *_EXPORT),
    PrivateName(
        f"{_MODULE}:DefaultWeightOnlyQuantizer.qbits_block_quant", _TESTED,
        "diffattn export --bits: the embedding and the output head are quantised by it",
        "MatMulNBitsQuantizer quantises an embedding that is also the output head, as one table",
    ),
)  # fmt: skip
