"""Calls of the Triton kernels and what they should give, in float64: for the interpreter's script and on a GPU.

Imports the kernels, so that `TRITON_INTERPRET` must be set before it where there is no GPU.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from support.comparison import NAMES, Inputs, make_inputs
from torch import Tensor

from benchmarks.bare import bare_module

reference = bare_module("ops.reference").diff_attention_reference
Blocks, Walk = (getattr(bare_module("ops.triton.configs"), name) for name in ("Blocks", "Walk"))
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Relative errors, ‖x − definition‖ / ‖definition‖: float32 sums in another order, and rounding of p to half precision.
ALLOWED = {F32: 1e-6, F16: 1e-3, BF16: 1e-2}


class Kernels(NamedTuple):
    """The modules of the kernels: those of the package, or a copy of them with one mistake."""

    forward: Any
    backward: Any
    decoding: Any
    shared_forward: Any
    shared_backward: Any


def package_kernels() -> Kernels:
    return Kernels(*(bare_module(f"ops.triton.{name}") for name in Kernels._fields))


class Form(NamedTuple):
    """Blocks of the forward pass, and of the two kernels of the backward pass."""

    forward: Any
    backward: tuple[Any, tuple[Any, ...]]


class Problem(NamedTuple):
    """One call. At most one of `sequences` and `written` is given, and then `inputs` says nothing of masks."""

    inputs: Inputs
    cotangent: Tensor
    sequences: tuple[int, ...] = ()
    """Lengths of the sequences in a packed row; below 0 of what is padding between them."""
    written: int | None = None
    """Keys of a static cache that hold something; the queries are the last of them."""

    @property
    def signals(self) -> int:
        """Output heads of a noise head."""
        return self.inputs.q1.shape[2] // self.inputs.q2.shape[2]


def relative(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted).norm() / (wanted.norm() or 1.0)).item()


def spans(sequences: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Begin, end, and the length that was given."""
    ends = torch.tensor(sequences).abs().cumsum(0).tolist()
    return [(end - abs(size), end, size) for end, size in zip(ends, sequences, strict=True)]


def seeing_queries(problem: Problem) -> Tensor | None:
    """int32 (2, B, S) where the call hides more than a causal mask: the first query of each key, and one behind."""
    x = problem.inputs
    B, T, S = x.q1.shape[0], x.q1.shape[1], x.k1.shape[1]
    key = torch.arange(S, dtype=torch.int32)
    end = torch.full_like(key, T)
    if problem.sequences:
        first, end = key.clone(), torch.zeros_like(key)
        for begin, behind, size in spans(problem.sequences):
            end[begin:behind] = behind if size > 0 else 0
    elif x.window is not None:
        first = (key - (S - T)).clamp(min=0)
        end = (key - (S - T) + x.window).clamp(0, T)
    elif problem.written is not None:
        first = (key - (problem.written - T)).clamp(min=0)
        first[problem.written :] = T
    elif x.key_padding is not None:
        first = (key - (S - T)).clamp(min=0) if x.causal else torch.zeros_like(key)
        first = torch.where(x.key_padding.cpu(), first.new_full((), T), first)
    else:
        return None
    return torch.stack([first.expand(B, S), end.expand(B, S)]).to(x.q1.device)


def definition(problem: Problem) -> list[Tensor]:
    """Output and gradients in float64, in the order of NAMES; of V2's one k the sum, in the places of both.

    Each packed sequence by itself, of a cache only what is written, and each query of a window by itself: no mask says
    so, the calls are those.
    """
    x = problem.inputs
    leaves = [y.detach().double().requires_grad_() for y in x[:6]]
    if x.k2 is x.k1:
        leaves[3] = leaves[1]
    q1, k1, q2, k2, v, lam = leaves
    if problem.sequences:
        parts = []
        for begin, end, size in spans(problem.sequences):
            part = reference(*(y[:, begin:end] for y in leaves), scale=x.scale)
            parts.append(part if size > 0 else 0.0 * part)
        output = torch.cat(parts, 1)
    elif x.window is not None:
        parts = []
        for t in range(q1.shape[1]):
            last = k1.shape[1] - q1.shape[1] + t
            row, seen = slice(t, t + 1), slice(max(0, last + 1 - x.window), last + 1)
            parts.append(reference(q1[:, row], k1[:, seen], q2[:, row], k2[:, seen], v[:, seen], lam[:, row]))
        output = torch.cat(parts, 1)
    else:
        w = problem.written
        output = reference(q1, k1[:, :w], q2, k2[:, :w], v[:, :w], lam, **x.options)
    return [output.detach(), *torch.autograd.grad(output, leaves, problem.cotangent.double())]


def results(problem: Problem, kernels: Kernels, form: Form | None = None) -> list[Tensor]:
    """The same of the kernels, with blocks of the table where no form is given."""
    x = problem.inputs
    options = {"causal": x.causal, "scale": x.scale or x.q1.shape[-1] ** -0.5, "queries": seeing_queries(problem)}
    if problem.signals > 1:
        return _shared_results(problem, kernels, form, options)
    out, o2, lse = kernels.forward.forward(*x[:6], **options, blocks=form and form.forward)
    d_q, d_k, d_v, d_lam = kernels.backward.backward(
        problem.cotangent, *x[:6], out, o2, lse, **options, blocks=form and form.backward
    )
    return [out, d_q[:, :, :, 0], d_k[:, :, :, 0], d_q[:, :, :, 1], d_k[:, :, :, -1], d_v, d_lam]


def _shared_results(problem: Problem, kernels: Kernels, form: Form | None, options: dict[str, Any]) -> list[Tensor]:
    """Signal heads and their noise head side by side, as a layer's projection has them."""
    q1, k1, q2, k2, v, lam = problem.inputs[:6]
    q = torch.cat([q1.unflatten(2, (q2.shape[2], -1)), q2.unsqueeze(3)], 3)
    apart = (q[:, :, :, :-1], k1, q[:, :, :, -1], k2, v, lam)
    saved = kernels.shared_forward.forward(*apart, **options, blocks=form and form.forward)
    d_q, d_k, d_v, d_lam = kernels.shared_backward.backward(
        problem.cotangent, q, k1, k2, v, lam, *saved, **options, blocks=form and form.backward
    )
    return [saved[0], d_q[:, :, :, :-1].flatten(2, 3), d_k[:, :, :, 0], d_q[:, :, :, -1], d_k[:, :, :, -1], d_v, d_lam]


def errors(got: list[Tensor], wanted: list[Tensor]) -> dict[str, float]:
    return {name: relative(x, y) for name, x, y in zip(NAMES, got, wanted, strict=True)}


def decoded(
    problem: Problem, kernels: Kernels, *, gain: Tensor | None = None, norm: bool = False, **how: Any
) -> Tensor:
    x = problem.inputs
    extra = {"gain": gain, "norm_scale": 0.2, "eps": 1e-5} if norm else {}
    scale = x.scale or x.q1.shape[-1] ** -0.5
    queries = seeing_queries(problem)
    q1 = x.q1.unflatten(2, (x.q2.shape[2], -1))
    return kernels.decoding.decode(q1, *x[1:6], causal=x.causal, scale=scale, queries=queries, **extra, **how)


def normed(output: Tensor, gain: Tensor | None = None) -> Tensor:
    """V1's norm of an output in float64; a row that sees no key stays zeros."""
    normed = 0.2 * output / (output.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return normed if gain is None else normed * gain.double()


def make_problem(
    *,
    dtype: torch.dtype = F32,
    device: str = "cpu",
    change: Callable[[Inputs], Inputs] | None = None,
    cotangent: Callable[[Tensor], Tensor] | None = None,
    padded: bool = False,
    sequences: tuple[int, ...] = (),
    written: int | None = None,
    **shapes: Any,
) -> Problem:
    """Two heads of one group where nothing else is said. The views of `change` hold values that can be told apart."""
    shapes = {"H": 2, "G": 1, "D": 16, "Dv": 16 if shapes.get("one_key") else 32, **shapes}
    if sequences:
        shapes |= {"B": 1, "T": spans(sequences)[-1][1]}
    x = make_inputs(**shapes, dtype=dtype)
    one_key = x.k2 is x.k1
    x = x._replace(**{name: getattr(x, name).to(device) for name in ("q1", "k1", "q2", "k2", "v", "lam")})
    x = x._replace(k2=x.k1) if one_key else x
    if padded:
        x = x._replace(key_padding=padding(x.k1.shape[1]).to(device))
    x = change(x) if change else x
    d_output = torch.randn(*x.q1.shape[:3], x.v.shape[-1], generator=torch.Generator().manual_seed(1))
    d_output = d_output.to(device, dtype)
    return Problem(x, cotangent(d_output) if cotangent else d_output, sequences, written)


def padding(keys: int) -> Tensor:
    """Two sequences: one with padding in front, so that rows see no key, the other behind."""
    key_padding = torch.zeros(2, keys, dtype=torch.bool)
    key_padding[0, : keys // 2] = True
    key_padding[1, -keys // 4 :] = True
    return key_padding


def lam_of(make: Callable[[Tensor], Tensor]) -> Callable[[Inputs], Inputs]:
    """Another λ, expanded to (B, T, H) by strides."""
    return lambda x: x._replace(lam=make(x.lam).expand(x.lam.shape))


def one_projection(x: Inputs) -> Inputs:
    """q1, q2, k1, k2 and v as a layer's one projection of the tokens has them: the maps of a head side by side."""
    (B, T, H, D), G, Dv = x.q1.shape, x.k1.shape[2], x.v.shape[3]
    maps = 1 if x.k2 is x.k1 else 2
    sizes = (H * 2 * D, G * maps * D, G * Dv)
    q, k, v = x.v.new_empty(B, T, sum(sizes)).split(sizes, -1)
    q, k, v = q.unflatten(-1, (H, 2, D)), k.unflatten(-1, (G, maps, D)), v.unflatten(-1, (G, Dv))
    views = dict(zip(("q1", "q2", "k1", "v"), (*q.unbind(3), k[:, :, :, 0], v), strict=True))
    views["k2"] = views["k1"] if maps == 1 else k[:, :, :, 1]
    for name, view in views.items():
        view.copy_(getattr(x, name))
    return x._replace(**views)


def of_cache(x: Inputs) -> Inputs:
    """Keys and values as the beginning of a longer cache, both maps' keys as halves; what is behind is never read."""
    (B, S, G, D), Dv, more = x.k1.shape, x.v.shape[3], 13
    keys = x.k1.new_full((B, G, S + more, 2 * D), float("nan")).transpose(1, 2)
    values = x.v.new_full((B, G, S + more, Dv), float("nan")).transpose(1, 2)
    k1, k2, v = keys[:, :S, :, :D], keys[:, :S, :, D:], values[:, :S]
    k1.copy_(x.k1), k2.copy_(x.k2), v.copy_(x.v)
    return x._replace(k1=k1, k2=k1 if x.k2 is x.k1 else k2, v=v)


def misaligned(x: Inputs) -> Inputs:
    """Every tensor at an odd address, its heads an odd number of elements apart."""

    def moved(y: Tensor) -> Tensor:
        view = y.new_empty(*y.shape[:3], y.shape[3] + 3)[..., 1:-2]
        return view.copy_(y)

    k1 = moved(x.k1)
    return x._replace(q1=moved(x.q1), q2=moved(x.q2), k1=k1, k2=k1 if x.k2 is x.k1 else moved(x.k2), v=moved(x.v))


def alike(x: Inputs) -> Inputs:
    """One sequence's keys and values for the whole batch, by steps of 0."""
    k1 = x.k1[:1].expand_as(x.k1)
    k2 = k1 if x.k2 is x.k1 else x.k2[:1].expand_as(x.k2)
    return x._replace(k1=k1, k2=k2, v=x.v[:1].expand_as(x.v))


def far(batch_step: int, token_step: int) -> Callable[[Inputs], Inputs]:
    """Sequences and tokens so many elements apart, in memory of which almost nothing is touched."""

    def change(x: Inputs) -> Inputs:
        B, T, _, _ = x.k1.shape
        tensors = {name: getattr(x, name) for name in ("q1", "q2", "k1", "k2", "v")}
        # The five lie side by side.
        room = max(y.shape[2] * y.shape[3] for y in tensors.values())
        elements = (B - 1) * batch_step + (T - 1) * token_step + 5 * room
        buffer = untouched(elements, x.v.dtype, x.v.device)
        views = {}
        for place, (name, y) in enumerate(tensors.items()):
            steps = (batch_step, token_step, y.shape[3], 1)
            views[name] = torch.as_strided(buffer, y.shape, steps, place * room).copy_(y)
        if x.k2 is x.k1:
            views["k2"] = views["k1"]
        return x._replace(**views)

    return change


def untouched(elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory of a file without contents, which takes room only where it is touched; on a GPU all of it does."""
    if device.type != "cpu":
        return torch.empty(elements, dtype=dtype, device=device)
    with tempfile.TemporaryFile() as file:
        file.truncate(elements * dtype.itemsize)
        return torch.frombuffer(mmap.mmap(file.fileno(), elements * dtype.itemsize), dtype=dtype)
