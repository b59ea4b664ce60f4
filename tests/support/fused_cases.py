"""Calls that the compiled kernel is tested on, by name: its tests run them, and so does its AddressSanitizer script."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.comparison import Inputs, make_inputs
from torch import Tensor

from diffattn.ops.cpu import build

DTYPES = [torch.float32, torch.bfloat16]
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
every_dtype = pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=["float32", "bfloat16", "float16"])


def needs_kernel(dtype: torch.dtype) -> pytest.MarkDecorator:
    """Skips a test, with the sentence that says why, where the kernel does not serve `dtype`."""
    reason = build.unavailable(dtype)
    return pytest.mark.skipif(reason is not None, reason=str(reason))


needs_the_kernel = needs_kernel(torch.float32)


def require_kernel(dtype: torch.dtype = torch.float32) -> None:
    """The same from within a test or fixture."""
    reason = build.unavailable(dtype)
    if reason is not None:
        pytest.skip(reason)


def padded(keys: int, left: int, right: int) -> Tensor:
    """Two sequences: the first has `left` padding keys in front, the second `right` behind."""
    key_padding = torch.zeros(2, keys, dtype=torch.bool)
    key_padding[0, :left] = True
    key_padding[1, keys - right :] = True
    return key_padding


def holes(keys: int, *spans: tuple[int, int]) -> Tensor:
    """Two sequences: the first has padding keys from `begin` to before `end` of each span, the second has none."""
    key_padding = torch.zeros(2, keys, dtype=torch.bool)
    for begin, end in spans:
        key_padding[0, begin:end] = True
    return key_padding


def nearly_equal_maps(x: Inputs) -> Inputs:
    """q2 ≈ q1, k2 ≈ k1 and λ = 0.999: the output is a thousandth of what it is the difference of."""
    nudge = make_inputs(*x.q1.shape[:2], x.k1.shape[1], *x.q1.shape[2:3], *x.k1.shape[2:], dtype=x.v.dtype, seed=5)
    k2 = x.k1 if x.k2 is x.k1 else x.k1 + 0.01 * nudge.k1
    return x._replace(q2=x.q1 + 0.01 * nudge.q1, k2=k2, lam=torch.full_like(x.lam, 0.999))


# Up to 8 queries are decoded (in spans of 512 keys); more are computed in blocks of 16, 32 or 64 rows and tiles of 128
# keys. Few queries share a block with those of the other heads of their group.
CASES: dict[str, dict[str, Any]] = {
    "T = S": {"T": 23},
    "T < S": {"T": 11, "S": 19},
    "non-causal, T < S": {"T": 11, "S": 19, "causal": False},
    "non-causal, T > S": {"T": 19, "S": 11, "causal": False},
    "V2": {"T": 29, "one_key": True},
    "V2, T < S, Dv = D": {"T": 13, "S": 37, "D": 11, "Dv": 11, "one_key": True},
    "V2, non-causal": {"T": 37, "S": 13, "one_key": True, "causal": False},
    "Dv = 2D": {"T": 63, "D": 16, "Dv": 32},
    "v narrower than k": {"T": 13, "D": 11, "Dv": 3},
    "one group": {"T": 17, "H": 5, "G": 1},
    "no groups": {"T": 17, "H": 5, "G": 5},
    "scale": {"T": 17, "scale": 0.9},
    "widths of a model": {"B": 1, "T": 70, "H": 4, "G": 2, "D": 64, "Dv": 128},
    "widths of a model, V2": {"B": 1, "T": 70, "H": 4, "G": 2, "D": 128, "Dv": 128, "one_key": True},
    "several tiles": {"B": 1, "T": 397, "H": 2, "G": 1, "D": 7, "Dv": 13},
    "several tiles, T < S": {"B": 1, "T": 131, "S": 523, "H": 2, "G": 1, "D": 7, "Dv": 13},
    "several tiles, non-causal": {"B": 1, "T": 67, "S": 401, "H": 2, "G": 1, "D": 7, "Dv": 13, "causal": False},
    "several tiles, V2": {"B": 1, "T": 257, "H": 3, "G": 1, "D": 13, "Dv": 13, "one_key": True},
    "padded": {"T": 11, "S": 19, "key_padding": padded(19, 3, 2)},
    "padded, T = S: rows without keys": {"T": 23, "key_padding": padded(23, 5, 7)},
    "padded, several tiles": {"T": 67, "S": 311, "H": 2, "G": 1, "key_padding": padded(311, 131, 151)},
    "padded, non-causal": {"T": 11, "S": 151, "causal": False, "key_padding": padded(151, 129, 22)},
    "padded, V2": {"T": 11, "S": 19, "one_key": True, "key_padding": padded(19, 3, 2)},
    "holes": {"T": 19, "S": 331, "H": 2, "G": 1, "key_padding": holes(331, (0, 2), (7, 8), (60, 300))},
    "holes, non-causal": {"T": 19, "S": 43, "causal": False, "key_padding": holes(43, (1, 17), (20, 42))},
    "a sequence of padding": {"T": 11, "S": 19, "key_padding": padded(19, 19, 0)},
    "a sequence of padding, non-causal": {"T": 11, "S": 19, "causal": False, "key_padding": padded(19, 2, 19)},
    "all padding": {"T": 11, "S": 19, "key_padding": padded(19, 19, 19)},
    "decoding": {"T": 1, "S": 13},
    "decoding, S = 1": {"T": 1, "S": 1},
    "decoding, V2": {"T": 1, "S": 37, "one_key": True},
    "decoding, Dv = 2D": {"T": 1, "S": 65, "D": 64, "Dv": 128},
    "decoding, one group": {"T": 1, "S": 37, "H": 32, "G": 1},
    "decoding, padded": {"T": 1, "S": 13, "key_padding": padded(13, 5, 3)},
    "decoding, all padding": {"T": 2, "S": 13, "key_padding": padded(13, 13, 13)},
    "decoding, several spans": {"T": 3, "S": 1500, "H": 2, "G": 1},
    "decoding, several spans, V2": {"T": 3, "S": 1500, "H": 2, "G": 1, "one_key": True},
    "decoding, a span of padding": {"T": 2, "S": 1100, "H": 2, "G": 1, "key_padding": padded(1100, 530, 80)},
    "decoding, T = S: rows without keys": {"T": 7, "key_padding": padded(7, 3, 2)},
    "decoding, non-causal, T > S": {"T": 7, "S": 3, "causal": False},
    "two to one": {"T": 23, "H": 12, "noise_heads": 6},
    "four to one, blocks of 64 rows": {"B": 1, "T": 131, "H": 4, "noise_heads": 1, "G": 1, "D": 16, "Dv": 32},
    "three to one, V2, several tiles": {
        "B": 1, "T": 67, "S": 401, "H": 6, "noise_heads": 2, "G": 1, "D": 13, "Dv": 13, "one_key": True,
    },
    "five to one, padded": {"T": 11, "S": 41, "H": 10, "noise_heads": 2, "G": 2, "key_padding": padded(41, 33, 7)},
    "five to one, all masked rows": {"T": 23, "H": 5, "noise_heads": 1, "G": 1, "key_padding": padded(23, 5, 7)},
    "decoding, four to one": {"T": 1, "S": 37, "H": 8, "noise_heads": 2, "G": 1},
    "decoding, odd rows, several spans": {"T": 3, "S": 1500, "H": 2, "noise_heads": 1, "G": 1},
    "decoding, two to one, V2, padded": {
        "T": 7, "H": 4, "noise_heads": 2, "G": 1, "one_key": True, "key_padding": padded(7, 3, 2),
    },
    "a window, several tiles": {"T": 131, "S": 523, "H": 2, "G": 1, "window": 140},
    "a window, decoding over several spans": {"T": 5, "S": 1500, "H": 2, "G": 1, "window": 300},
    "few queries of many heads": {"T": 9, "S": 41, "H": 16, "G": 2},
    "few queries of many heads, padded": {"T": 11, "S": 41, "H": 15, "G": 3, "key_padding": padded(41, 33, 7)},
}  # fmt: skip
