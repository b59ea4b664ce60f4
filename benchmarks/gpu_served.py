"""The section of `benchmarks.gpu` that says what users get: `diff_attention`, and what serves a call of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.bare import bare_module
from benchmarks.gpu_cases import BACKENDS, Call, F, Problem, make_call, padding_of, reference, split
from benchmarks.gpu_device import Device, Row, probe

dispatch = bare_module("ops.dispatch")


def diff_attention(
    call: Call, backend: str, key_padding: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """The public function, by the name of one of its backends or "auto"."""
    masks: dict[str, Any] = {"causal": call.causal, "key_padding": key_padding, "cu_seqlens": cu_seqlens}
    return dispatch.diff_attention(*split(call), call.v, call.lam, **masks, backend=backend)


def users_forms(device: Device) -> dict[str, tuple[str, Callable[[Call], Tensor]]]:
    """`diff_attention` as users call it: what they get without asking, and the standard backend."""
    return {
        f"{kind}_diff_attention_{asked}": (kind, functools.partial(diff_attention, backend=asked))
        for kind in ("v1", "v2")
        for asked in (device.asked, "standard")
    }


def served_by(asked: str, call: Call, training: bool, key_padding: Tensor | None = None) -> Row:
    """What `diff_attention` takes for a call: the backend, why not those before it, and which of `WAYS` that is.

    Of the standard backend also what it passes to PyTorch's attention, and the kernel that PyTorch chooses.
    """
    with torch.set_grad_enabled(training):
        backend, reasons = asked, []
        if asked == "auto":
            given = reference.Call(*split(call), call.v, call.lam, call.causal, None, key_padding)
            for backend, record in dispatch.BACKENDS.items():
                if backend == "fused_cpu":
                    # It serves no GPU, and where it serves it would be compiled now.
                    continue
                reason = record.refuses(given) or record.passed_over(given)
                if reason is None:
                    break
                reasons.append(reason)
        if backend == "fused_triton":
            return {"backend": backend, "passed_over": reasons, "way": f"{call.kind}_fused"}
        made = sdpa_call(lambda: diff_attention(call, "standard", key_padding))
    way = "v2_standard"
    if call.kind == "v1" and "widths" in made:
        (_, k_width, v_width), (q_heads, k_heads, _) = made["widths"], made["heads"]
        way = "v1_padded" if k_width == v_width else f"v1_unequal{'_repeated' if q_heads == k_heads else ''}"
    return {"backend": backend, "passed_over": reasons, "way": way} | made


def sdpa_call(function: Callable[[], object]) -> Row:
    """What a function passes to `scaled_dot_product_attention`, and the kernel that PyTorch's own choice names for it.

    Nothing is computed. Where the function raises, its error stands in place of the kernel.
    """
    seen: list[Row] = []
    names = {backend.value: name for name, backend in BACKENDS.items()}
    real = F.scaled_dot_product_attention

    def look(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, **options: Any) -> Tensor:
        kernel = names.get(torch._fused_sdp_choice(q, k, v, attn_mask, dropout_p, **options), "none")
        heads, widths = ([x.shape[dimension] for x in (q, k, v)] for dimension in (1, 3))
        seen.append({"kernel": kernel, "heads": heads, "widths": widths, "mask": attn_mask is not None})
        return q.new_empty(*q.shape[:3], v.shape[3])

    F.scaled_dot_product_attention = look
    try:
        said = probe(function)
    finally:
        F.scaled_dot_product_attention = real
    return seen[0] if said is True else {"kernel": str(said)}


def served(device: Device) -> Iterator[Row]:
    """What `diff_attention` takes for calls of training, of inference and of decoding, and why nothing before it."""
    T = 32 if device.tiny else 512
    plain = Problem(2, T, T, 16, 16, 64)
    calls = [(f"{width} wide", plain._replace(width=width), False) for width in (64, 128, 256)]
    calls += [
        ("4 groups", plain._replace(groups=4), False),
        ("padding", plain, True),
        ("padding, 4 groups", plain._replace(groups=4), True),
        ("fewer queries than keys", plain._replace(queries=T // 2), False),
        ("1 query", plain._replace(queries=1), False),
        ("1 query, padding", plain._replace(queries=1), True),
        ("float16", plain._replace(dtype="float16"), False),
        ("float32", plain._replace(dtype="float32"), False),
    ]
    for name, problem, padded in calls:
        padding = padding_of(problem, device.name) if padded else None
        for kind in ("v1", "v2"):
            call = make_call(problem, kind, device.name)
            for training in (True, False) if problem.queries > 1 else (False,):
                row: Row = {"what": "served", "call": f"{kind}, {name}", "training": training}
                row |= {"problem": problem._asdict(), "padding": padded}
                yield row | {asked: served_by(asked, call, training, padding) for asked in ("auto", "standard")}
