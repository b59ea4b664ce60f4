"""The cases of `benchmarks.gpu`: problems, the ways to compute each attention, and the definition they are held to.

Tensors lie as a model lays them out, (batch, sequence, heads, width) with the two maps of a pair adjacent:

    softmax   q (B, T, N, d)     k (B, S, G, d)   v (B, S, G, d)         N softmax heads in G groups, the twin
    v1        q (B, T, N, d)     k (B, S, G, d)   v (B, S, G/2, 2d)      N/2 output heads of 2d
    v2        q (B, T, 2N, d)    k (B, S, G, d)   v (B, S, G, d)         N output heads of d
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.bare import bare_module

standard = bare_module("ops.standard")
reference = bare_module("ops.reference")
variants = bare_module("variants")
visibility = bare_module("ops.visibility")
configs = bare_module("ops.triton.configs")

# "default" is what PyTorch chooses by itself.
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Problem(NamedTuple):
    """Sizes of one call, those of the softmax twin; `value_width` where V1 or V2 has values of another width."""

    batch: int
    queries: int
    keys: int
    heads: int
    groups: int
    width: int
    dtype: str = "bfloat16"
    causal: bool = True
    value_width: int | None = None

    @property
    def pairs(self) -> int:
        """Query-key pairs that are visible, of one sequence and head."""
        T, S = self.queries, self.keys
        return T * (S - T) + T * (T + 1) // 2 if self.causal else T * S


class Call(NamedTuple):
    """The tensors of one call of one kind: "softmax", "v1" or "v2"."""

    kind: str
    q: Tensor
    k: Tensor
    v: Tensor
    lam: Tensor
    causal: bool

    @property
    def leaves(self) -> list[Tensor]:
        return [self.q, self.k, self.v] + ([] if self.kind == "softmax" else [self.lam])


def make_call(problem: Problem, kind: str, device: str, seed: int = 0) -> Call:
    """Unit-normal inputs and a λ in (0.2, 0.9) per token and head; the same numbers for every way to compute them."""
    B, T, S, N, G, d, dtype, causal, value_width = problem
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        x = torch.randn(*shape, device=device, generator=generator)
        return x.to(DTYPES[dtype]).requires_grad_()

    q = normal(B, T, 2 * N if kind == "v2" else N, d)
    k = normal(B, S, G, d)
    v = normal(B, S, G // 2, value_width or 2 * d) if kind == "v1" else normal(B, S, G, value_width or d)
    lam = 0.2 + 0.7 * torch.rand(B, T, N // 2 if kind == "v1" else N, device=device, generator=generator)
    return Call(kind, q, k, v, lam.requires_grad_(), causal)


def split(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q1, k1, q2, k2 as views; V2 has one k."""
    q1, q2 = call.q.unflatten(2, (-1, 2)).unbind(3)
    if call.kind == "v2":
        return q1, call.k, q2, call.k
    k1, k2 = call.k.unflatten(2, (-1, 2)).unbind(3)
    return q1, k1, q2, k2


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    backend: str,
    causal: bool,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """One `scaled_dot_product_attention`, (B, T, heads, width) in and out, under a named backend."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1] or q.shape[1] != v.shape[1]
    T, S = q.shape[2], k.shape[2]
    causal = causal and mask is None and T > 1
    if causal and T != S:
        # PyTorch's own causal mask begins at the top left.
        mask, causal = bottom_right(T, S, backend, q.device), False

    def run() -> Tensor:
        o = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped)
        return o.transpose(1, 2)

    if backend == "default":
        return run()
    with sdpa_kernel(BACKENDS[backend]):
        return run()


@functools.cache
def bottom_right(queries: int, keys: int, backend: str, device: torch.device) -> Tensor:
    """The causal mask of fewer queries than keys; for FlashAttention, which takes no tensor, by its name."""
    if backend == "flash":
        # The import loads PyTorch's compiler.
        from torch.nn.attention.bias import causal_lower_right

        return causal_lower_right(queries, keys)
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def softmax(call: Call, backend: str, mask: Tensor | None = None) -> Tensor:
    """The twin."""
    return sdpa(call.q, call.k, call.v, backend, call.causal, mask)


def v1_padded(call: Call, backend: str, mask: Tensor | None = None) -> Tensor:
    """One call of width 2d: [q1, 0] and [0, q2] against [k1, k2], which is how the keys lie. Today's standard path."""
    k = call.k.unflatten(2, (-1, 2)).flatten(3)
    scale = 1 / math.sqrt(call.q.shape[-1])
    o = sdpa(standard.pad_queries(call.q), k, call.v, backend, call.causal, mask, scale)
    return standard.subtract(o, call.lam).to(call.v.dtype)


def v1_unequal(call: Call, backend: str, mask: Tensor | None = None) -> Tensor:
    """One call whose values are twice as wide as its keys and have half as many heads: nothing is padded."""
    pairs, groups = call.q.shape[2] // 2, call.v.shape[2]
    # Of each value head: first the queries of its k1, then those of its k2.
    q = call.q.unflatten(2, (groups, pairs // groups, 2)).transpose(3, 4).flatten(2, 4)
    o = sdpa(q, call.k, call.v, backend, call.causal, mask)
    o = o.unflatten(2, (groups, 2, pairs // groups)).transpose(3, 4).flatten(2, 4)
    return standard.subtract(o, call.lam).to(call.v.dtype)


def v1_unequal_repeated(call: Call, backend: str, mask: Tensor | None = None) -> Tensor:
    """As `v1_unequal` with one key and one value head for each query head, for backends that want equal counts."""
    pairs, groups = call.q.shape[2] // 2, call.v.shape[2]
    k = call.k.unflatten(2, (groups, 1, 2)).expand(-1, -1, -1, pairs // groups, -1, -1).flatten(2, 4)
    v = call.v.repeat_interleave(2 * pairs // groups, dim=2)
    o = sdpa(call.q, k, v, backend, call.causal, mask)
    return standard.subtract(o, call.lam).to(call.v.dtype)


def v1_two_calls(call: Call, backend: str, mask: Tensor | None = None) -> Tensor:
    """A call for each map, with values of 2d."""
    q1, k1, q2, k2 = split(call)
    o1, o2 = (sdpa(q, k, call.v, backend, call.causal, mask) for q, k in ((q1, k1), (q2, k2)))
    return standard.subtract(torch.stack([o1, o2], dim=3).flatten(2, 3), call.lam).to(call.v.dtype)


def v2_standard(call: Call, backend: str, mask: Tensor | None = None) -> Tensor:
    """One grouped call of 2N heads, then the subtraction."""
    o = sdpa(call.q, call.k, call.v, backend, call.causal, mask)
    return standard.subtract(o, call.lam).to(call.v.dtype)


class Fused(torch.autograd.Function):
    """The Triton kernels, on tensors as a layer has them, so that no gradient is copied."""

    @staticmethod
    def forward(
        ctx: Any, kind: str, causal: bool, queries: Tensor | None, q: Tensor, k: Tensor, v: Tensor, lam: Tensor
    ) -> Tensor:
        call = Call(kind, q, k, v, lam, causal)
        scale = 1 / math.sqrt(q.shape[-1])
        out, o2, lse = bare_module("ops.triton.forward").forward(
            *split(call), v, lam, causal=causal, scale=scale, queries=queries
        )
        ctx.save_for_backward(q, k, v, lam, out, o2, lse, queries)
        ctx.kind, ctx.causal, ctx.scale = kind, causal, scale
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
        q, k, v, lam, out, o2, lse, queries = ctx.saved_tensors
        d_q, d_k, d_v, d_lam = bare_module("ops.triton.backward").backward(
            d_out,
            *split(Call(ctx.kind, q, k, v, lam, ctx.causal)),
            v,
            lam,
            out,
            o2,
            lse,
            causal=ctx.causal,
            scale=ctx.scale,
            queries=queries,
        )
        return None, None, None, d_q.flatten(2, 3), d_k.flatten(2, 3), d_v, d_lam


def fused(call: Call, backend: str, queries: Tensor | None = None) -> Tensor:
    """The operators of the Triton kernels, as a layer calls them; few queries without gradients are decoded."""
    triton = bare_module("ops.triton.operator")
    scale, maps = 1 / math.sqrt(call.q.shape[-1]), 1 if call.kind == "v2" else 2
    if torch.is_grad_enabled():
        q, k = call.q.unflatten(2, (-1, 2)), call.k.unflatten(2, (-1, maps))
        return torch.ops.diffattn.fused_triton(q, k, call.v, call.lam, queries, call.causal, scale)[0]
    query, value = call.q.transpose(1, 2), call.v.transpose(1, 2)
    if triton.decodes(query, value):
        key = call.k.unflatten(2, (-1, maps)).flatten(3).transpose(1, 2)
        options = (call.lam, queries, scale, None, 1.0, None, True, 1)
        return torch.ops.diffattn.fused_triton_decoding(query, key, value, *options)
    q1, k1, q2, k2 = split(call)
    given = reference.Call(q1, k1, q2, k2, call.v, call.lam, call.causal, queries=queries)
    return triton.fused_triton_diff_attention(given)


PASSES = {
    "forward": configs.forward_blocks,
    "queries": configs.query_blocks,
    "keys": configs.key_walks,
    "decoding": configs.decoding_blocks,
}


def blocks_of(kind: str, problem: Problem, chip: str) -> dict[str, Any]:
    """The entries of the block table that a call takes, by pass; none where the chip has no table."""
    if chip not in configs.TABLES:
        return {}
    width = problem.width
    value_width = problem.value_width or (2 * width if kind == "v1" else width)
    return {name: entry(chip, width, value_width, kind == "v2") for name, entry in PASSES.items()}


def padding_of(problem: Problem, device: str) -> Tensor:
    """bool (B, S): the first third of one sequence and the last fifth of another."""
    padding = torch.zeros(problem.batch, problem.keys, dtype=torch.bool, device=device)
    padding[0, : problem.keys // 3] = True
    padding[1, -problem.keys // 5 :] = True
    return padding


def seeing_queries(call: Call, key_padding: Tensor) -> Tensor:
    """The masks of a call as the kernels take them."""
    return visibility.seeing_queries(call.q.shape[1], call.k.shape[1], call.causal, key_padding)


class Way(NamedTuple):
    """A way to compute the attention of one kind, and the form that it is in the variant's record of FLOPs."""

    kind: str
    run: Callable[..., Tensor]
    form: str


WAYS = {
    "softmax": Way("softmax", softmax, "standard"),
    "v1_padded": Way("v1", v1_padded, "standard"),
    "v1_unequal": Way("v1", v1_unequal, "unequal"),
    "v1_unequal_repeated": Way("v1", v1_unequal_repeated, "unequal"),
    "v1_two_calls": Way("v1", v1_two_calls, "two_calls"),
    "v2_standard": Way("v2", v2_standard, "standard"),
    "v1_fused": Way("v1", fused, "fused_triton"),
    "v2_fused": Way("v2", fused, "fused_triton"),
}
VARIANTS = {"softmax": "softmax", "v1": "diff_v1", "v2": "diff_v2"}


def executed_flops(way: str, problem: Problem, backward: bool) -> int:
    """What a way computes of the pairs that are visible; for the backward pass with the scores computed again."""
    kind, _, form = WAYS[way]
    value_width = 2 * problem.width if kind == "v1" else problem.width
    # In units of d, for a pair of softmax heads.
    units = variants.VARIANTS[VARIANTS[kind]].flops[form].executed(value_width, training=backward)
    return int(units * problem.width * problem.heads // 2 * problem.pairs * problem.batch)


def definition(call: Call, key_padding: Tensor | None = None) -> Tensor:
    """The reference, in the dtype of the call's tensors."""
    options: dict[str, Any] = {"causal": call.causal, "key_padding": key_padding}
    if call.kind == "softmax":
        return reference.softmax_attention_reference(call.q, call.k, call.v, **options)
    q1, k1, q2, k2 = split(call)
    return reference.diff_attention_reference(q1, k1, q2, k2, call.v, call.lam, **options)


def in_float64(call: Call) -> Call:
    """The same numbers as leaves in float64."""
    q, k, v, lam = (x.detach().double().requires_grad_() for x in (call.q, call.k, call.v, call.lam))
    return call._replace(q=q, k=k, v=v, lam=lam)


def results(function: Callable[[Call], Tensor], call: Call, d_output: Tensor) -> list[Tensor]:
    """The output and the gradients of a call's tensors."""
    output = function(call)
    return [output.detach(), *torch.autograd.grad(output, call.leaves, d_output.to(output.dtype))]


def relative_errors(got: list[Tensor], wanted: list[Tensor]) -> dict[str, float]:
    """‖x − definition‖ / ‖definition‖ of the output and of each gradient; NaN where one holds a NaN."""
    names = ("output", "d_q", "d_k", "d_v", "d_lam")
    return {
        name: float(f"{((x.double() - y).norm() / y.norm()).item():.3g}")
        for name, x, y in zip(names, got, wanted, strict=False)
    }


@contextlib.contextmanager
def poisoned(on: bool) -> Iterator[None]:
    """Fills what is allocated with NaN, so that an output that nobody writes shows."""
    if on:
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        if on:
            torch.use_deterministic_algorithms(False)


def wanted(call: Call, d_output: Tensor, key_padding: Tensor | None = None) -> list[Tensor]:
    """Output and gradients of the definition in float64."""
    wide = in_float64(call)
    output = definition(wide, key_padding)
    return [output.detach(), *torch.autograd.grad(output, wide.leaves, d_output.double())]
