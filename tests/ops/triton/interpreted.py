"""Runs the Triton kernels in the interpreter and prints, for each case, a JSON line of relative errors against float64.

A process of its own: `TRITON_INTERPRET` must be set before the kernels are imported. Needs torch and Triton alone.

    TRITON_INTERPRET=1 python tests/ops/triton/interpreted.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from support.comparison import NAMES, Inputs, make_inputs
from torch import Tensor

from benchmarks.bare import bare_module
from benchmarks.interpreter import mend_interpreter

mend_interpreter()
backward, configs, decoding, forward, reference = (
    bare_module(f"ops.{name}")
    for name in ("triton.backward", "triton.configs", "triton.decoding", "triton.forward", "reference")
)
Blocks, Walk = configs.Blocks, configs.Walk

# Forms of the kernels: blocks of 16, so that small shapes cross them.
TOGETHER = (Blocks(16, 16, 4, 2), Blocks(16, 16, 4, 2), (Walk(Blocks(16, 16, 4, 2)),))
APART = (
    Blocks(16, 16, 4, 2, together=False),
    Blocks(16, 16, 4, 2),
    (Walk(Blocks(16, 16, 4, 2), makes_v=False), Walk(Blocks(16, 16, 4, 2), makes_k=False)),
)
DESCRIBED = (
    Blocks(16, 16, 4, 2, descriptors=True),
    Blocks(16, 16, 4, 2, descriptors=True),
    (Walk(Blocks(16, 16, 4, 2, descriptors=True)),),
)
FORMS = {"together": TOGETHER, "apart": APART, "described": DESCRIBED}
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def padding(keys: int) -> Tensor:
    """Two sequences: one with padding in front, so that rows see no key, the other behind."""
    key_padding = torch.zeros(2, keys, dtype=torch.bool)
    key_padding[0, : keys // 2] = True
    key_padding[1, -keys // 4 :] = True
    return key_padding


# Name, form of the kernels, dtype, arguments of `make_inputs`.
CASES: list[tuple[str, str, torch.dtype, dict[str, Any]]] = [
    ("V1", "together", F32, {"T": 37, "D": 16, "Dv": 32}),
    ("V1, apart", "apart", F32, {"T": 37, "D": 16, "Dv": 32}),
    ("V1, described", "described", F32, {"T": 37, "D": 16, "Dv": 32}),
    ("V2", "together", F32, {"T": 37, "D": 16, "Dv": 16, "one_key": True}),
    ("V2, apart", "apart", F32, {"T": 37, "D": 16, "Dv": 16, "one_key": True}),
    ("V2, described", "described", F32, {"T": 37, "D": 16, "Dv": 16, "one_key": True}),
    ("T < S", "together", F32, {"T": 21, "S": 43, "D": 16, "Dv": 32}),
    ("not causal, T < S", "together", F32, {"T": 21, "S": 43, "D": 16, "Dv": 32, "causal": False}),
    ("not causal, T > S", "apart", F32, {"T": 43, "S": 21, "D": 16, "Dv": 32, "causal": False}),
    ("padded", "together", F32, {"T": 37, "D": 16, "Dv": 32, "key_padding": padding(37)}),
    ("padded, T < S, V2", "together", F32, {"T": 5, "S": 43, "D": 16, "one_key": True, "key_padding": padding(43)}),
    ("padded, not causal", "apart", F32, {"T": 19, "S": 37, "causal": False, "key_padding": padding(37)}),
    ("groups", "together", F32, {"T": 19, "H": 4, "G": 2, "D": 16, "Dv": 32}),
    ("no groups", "together", F32, {"T": 19, "H": 3, "G": 3, "D": 16, "Dv": 32}),
    ("odd widths", "together", F32, {"T": 23, "D": 11, "Dv": 37}),
    ("odd widths, described", "described", F32, {"T": 23, "D": 24, "Dv": 40}),
    ("scale", "together", F32, {"T": 19, "D": 16, "Dv": 32, "scale": 0.9}),
    ("float16", "together", F16, {"T": 37, "D": 16, "Dv": 32}),
    ("bfloat16", "together", BF16, {"T": 37, "D": 16, "Dv": 32}),
    ("bfloat16, apart", "apart", BF16, {"T": 37, "D": 16, "Dv": 32}),
    ("bfloat16, V2", "together", BF16, {"T": 37, "D": 16, "Dv": 16, "one_key": True}),
]
# The same for decoding, with the number of spans of keys.
DECODING: list[tuple[str, torch.dtype, int, dict[str, Any]]] = [
    ("1 query", F32, 3, {"T": 1, "S": 83, "D": 16, "Dv": 32}),
    ("1 span", F32, 1, {"T": 1, "S": 37, "D": 16, "Dv": 32}),
    ("5 queries, V2", F32, 2, {"T": 5, "S": 43, "D": 16, "Dv": 16, "one_key": True}),
    ("padded", F32, 4, {"T": 2, "S": 71, "D": 16, "Dv": 32, "key_padding": padding(71)}),
    ("odd widths, one group", BF16, 2, {"T": 2, "S": 43, "H": 5, "G": 1, "D": 24, "Dv": 40}),
]


def relative(got: list[Tensor], wanted: list[Tensor]) -> list[float]:
    return [((x.double() - y).norm() / y.norm()).item() for x, y in zip(got, wanted, strict=True)]


def queries_of(x: Inputs) -> Tensor | None:
    """int32 (2, B, S) where the call has padding."""
    if x.key_padding is None:
        return None
    T, S = x.q1.shape[1], x.k1.shape[1]
    key = torch.arange(S, dtype=torch.int32)
    first = (key - (S - T)).clamp(min=0) if x.causal else torch.zeros_like(key)
    first = torch.where(x.key_padding, first.new_full((), T), first)
    return torch.stack([first, torch.full_like(first, T)])


def definition(x: Inputs, cotangent: Tensor) -> list[Tensor]:
    """Output and gradients in float64; of V2's one k the sum, in the places of both."""
    leaves = [y.detach().double().requires_grad_() for y in x[:6]]
    if x.k2 is x.k1:
        leaves[3] = leaves[1]
    output = reference.diff_attention_reference(*leaves, **x.options)
    return [output.detach(), *torch.autograd.grad(output, leaves, cotangent.double())]


def kernels(x: Inputs, form: tuple[Any, Any, Any], cotangent: Tensor) -> list[Tensor]:
    """The same of the kernels, in the order of NAMES."""
    options = {"causal": x.causal, "scale": x.scale or x.q1.shape[-1] ** -0.5, "queries": queries_of(x)}
    out, o2, lse = forward.forward(*x[:6], **options, blocks=form[0])
    d_q, d_k, d_v, d_lam = backward.backward(cotangent, *x[:6], out, o2, lse, **options, blocks=form[1:])
    return [out, d_q[:, :, :, 0], d_k[:, :, :, 0], d_q[:, :, :, 1], d_k[:, :, :, -1], d_v, d_lam]


def main() -> None:
    # Fills what is allocated with NaN: an output that nobody writes shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    for name, form, dtype, options in CASES:
        x = make_inputs(**{"H": 2, "G": 1, **options}, dtype=dtype)
        cotangent = torch.randn(*x.q1.shape[:3], x.v.shape[-1], generator=torch.Generator().manual_seed(1)).to(dtype)
        got, wanted = kernels(x, FORMS[form], cotangent), definition(x, cotangent)
        swapped = definition(x._replace(q1=x.q2, k1=x.k2, q2=x.q1, k2=x.k2 if x.k2 is x.k1 else x.k1), cotangent)
        row = {"case": name, "dtype": str(dtype), "errors": dict(zip(NAMES, relative(got, wanted), strict=True))}
        print(json.dumps(row | {"swapped": relative(got[:1], swapped[:1])[0]}), flush=True)
    for name, dtype, splits, options in DECODING:
        x = make_inputs(**{"H": 2, "G": 1, **options}, dtype=dtype)
        scale = x.q1.shape[-1] ** -0.5
        gain = torch.linspace(0.5, 1.5, x.v.shape[-1]).to(dtype)
        wide = reference.diff_attention_reference(*(y.double() for y in x[:6]), **x.options)
        # The first row of a padded sequence may see no key; its norm is that of zeros.
        normed = 0.2 * gain.double() * wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        for norm, wanted_output in ((False, wide), (True, normed)):
            extra = {"gain": gain, "norm_scale": 0.2, "eps": 1e-5} if norm else {}
            got = decoding.decode(
                *x[:6],
                causal=x.causal,
                scale=scale,
                queries=queries_of(x),
                splits=splits,
                blocks=Blocks(16, 16, 4, 2),
                **extra,
            )
            row = {"case": f"decoding, {name}" + ", norm" * norm, "dtype": str(dtype)}
            print(json.dumps(row | {"errors": {"output": relative([got], [wanted_output])[0]}}), flush=True)


if __name__ == "__main__":
    main()
