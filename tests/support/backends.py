"""Our backends as functions of the arguments of `diff_attention`, for tests that spread them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffattn.ops import standard
from diffattn.ops.cpu import operator
from diffattn.ops.reference import Call


def fused_cpu_diff_attention(*tensors: Any, **options: Any) -> Tensor:
    return operator.fused_cpu_diff_attention(Call(*tensors, **options))


def standard_diff_attention(*tensors: Any, **options: Any) -> Tensor:
    return standard.standard_diff_attention(Call(*tensors, **options))
