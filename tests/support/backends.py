"""Our backends as functions of the arguments of `diff_attention`, for tests that spread them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffattn.ops import standard
from diffattn.ops.cpu import operator
from diffattn.ops.reference import Call
from diffattn.ops.visibility import ranges_of


def fused_cpu_diff_attention(*tensors: Any, **options: Any) -> Tensor:
    return operator.fused_cpu_diff_attention(_call(*tensors, **options))


def standard_diff_attention(*tensors: Any, **options: Any) -> Tensor:
    return standard.standard_diff_attention(_call(*tensors, **options))


def _call(*tensors: Any, window: int | None = None, **options: Any) -> Call:
    call = Call(*tensors, **options)
    if window is None:
        return call
    queries = ranges_of(call.q1, call.k1, call.causal, call.key_padding, window)
    return call._replace(key_padding=None, queries=queries)
