"""``attn_implementation="diff_fused"``: a fused kernel where one supports the call, the standard call elsewhere.

An attention function of ``transformers`` that is given λ and the norm behind it beside queries, keys and values, and
returns output heads that are already subtracted and normalised. The kernels are the compiled one of the CPU and those
in Triton of a GPU. It is total: a call that neither serves (another device or dtype, no compiled kernel, a mask of its
own per query and key, a derivative in forward mode) is padded, computed by ``sdpa`` and subtracted, with the same
result up to rounding; ``diffattn doctor`` tells which of them serves here.

Its mask is O(S): the queries that see a key are a range of them, be the pattern causal or causal within each of the
sequences that a row was packed from. T = 3 queries behind 2 cached keys, of which the first is padding:

    0 1 1 0 0          first = 0 0 0 1 2
    0 1 1 1 0
    0 1 1 1 1    is    end   = 0 3 3 3 3

It has five dimensions, int32 (2, B, 1, 1, S), which no mask of a user has.

Shape suffixes: B batch, T queries, S keys, N query heads, G key/value heads, W width of a key head, V of a value head,
d width of a query, H output heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from diffattn.model.attention import RMSNormPerHead
from diffattn.model.configuration import DIFF_FUSED
from diffattn.model.masks.pattern import Pattern
from diffattn.model.transformers_private import (
    causal_mask_function,
    is_tracing,
    prepare_padding_mask,
    sdpa_attention_forward,
    sdpa_mask,
)
from diffattn.ops.cpu import operator as fused_cpu
from diffattn.ops.derivatives import through_sdpa
from diffattn.ops.half import attention_inputs
from diffattn.ops.sdpa import without_nan
from diffattn.ops.standard import open_dead_rows, pad_queries, subtract
from diffattn.ops.triton import operator as fused_triton
from diffattn.ops.visibility import visible_in_ranges, visible_keys
from diffattn.variants import ATTENTIONS

# They offer the same functions, and are asked in this order.
KERNELS = {"fused_cpu": fused_cpu, "fused_triton": fused_triton}


def diff_fused_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    lam: Tensor,
    norm: RMSNormPerHead | None = None,
    signals_per_noise: int = 1,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``norm((softmax(Q1 K1ᵀ · scaling) − λ · softmax(Q2 K2ᵀ · scaling)) V)`` for groups of query heads.

    Args:
        module: the layer; the standard call reads ``num_key_value_groups`` and ``is_causal`` from it.
        query: (B, N, T, d), groups adjacent: ``signals_per_noise`` heads ask for signal maps, and the head behind them
            for the noise map that is subtracted from each. Pairs, where it is one.
        key: (B, G, S, W). W = 2d holds [k1, k2] (V1), W = d serves both maps (V2).
        value: (B, G, S, V).
        attention_mask: None for causal, bottom-right aligned; int32 (2, B, 1, 1, S), the first query that sees each
            key and the first behind it that does not; or any mask of ``sdpa``, which the standard call takes.
        dropout: of the maps; only the standard call has it.
        scaling: of the scores.
        lam: λ in float32, broadcastable to (B, T, H).
        norm: of each output head, or none.
        signals_per_noise: the signal heads of each noise head.
        kwargs: options of ``sdpa_attention_forward``; those that change the result take the standard call.

    Returns:
        Output heads (B, T, H, V), one for each signal head, and None for the weights, which no one has held.
        Half-precision ones may be float32: the standard call leaves the rounding to the norm behind it.
    """
    kernel, queries = None, None
    if _needs_standard_call(attention_mask, dropout, kwargs) is None:
        queries = None if attention_mask is None else attention_mask[:, :, 0, 0]
        call = (query, key, value, lam, queries)
        serving = (one for one in KERNELS.values() if one.refuses(*call, signals_per_noise=signals_per_noise) is None)
        kernel = next(serving, None)
    if kernel is not None:
        options = {"scale": scaling, "queries": queries, "signals_per_noise": signals_per_noise}
        if kernel.decodes(query, value, signals_per_noise=signals_per_noise):
            gain, norm_scale, eps = (None, 1.0, None) if norm is None else (_gain(norm), norm.scale, norm.eps)
            return kernel.decode(query, key, value, lam, gain=gain, norm_scale=norm_scale, eps=eps, **options), None
        output = kernel.attend(query, key, value, lam, **options)
        return output if norm is None else norm(output, norm.scale), None

    if _holds_both_keys(query, key):
        query = pad_queries(query.transpose(1, 2), signals_per_noise).transpose(1, 2)
    mask, dead = _standard_mask(attention_mask, query, key, kwargs.get("is_causal"))
    query, key, value, mask = attention_inputs(query, key, value, mask)

    def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)[0]

    with without_nan(query.device, query.shape[2], mask):
        # Computed a second time, for a second derivative, dropout would draw others.
        o_BTNV = sdpa(query, key, value, mask) if dropout else through_sdpa(sdpa, query, key, value, mask)
    if dead is not None:
        o_BTNV = o_BTNV.masked_fill(dead, 0.0)
    output = subtract(o_BTNV, lam, signals_per_noise)
    return output if norm is None else norm(output, norm.scale), None


def _gain(norm: RMSNormPerHead) -> Tensor | None:
    """Returns the gain of a norm as a plain tensor: a model that is spread over ranks has it whole, as a DTensor."""
    to_local = getattr(norm.weight, "to_local", None)
    return norm.weight if to_local is None else to_local()


def serving_backend(attention: str, device: str, dtype: torch.dtype, head_dim: int, signals_per_noise: int = 1) -> str:
    """Returns what serves a causal call of a model in training by default, by its name in ``ops.dispatch.BACKENDS``.

    ``dtype`` is that of queries, keys and values, under autocast that of the products, and ``head_dim`` the width of a
    softmax head. Compiles the CPU kernel if need be.
    """
    if ATTENTIONS[attention].maps == 1:
        return "standard"
    return serving(attention, device, dtype, head_dim, signals_per_noise=signals_per_noise)[0]


def serving(
    attention: str,
    device: str,
    dtype: torch.dtype,
    head_dim: int = 64,
    *,
    decoding: bool = False,
    signals_per_noise: int = 1,
) -> tuple[str, list[str]]:
    """Returns what serves a differential model's causal call, and for each kernel asked before one sentence why not.

    The call is one of 16 tokens in training, where nothing is padded, or of one token in decoding.
    """
    # As wide as the keys of both maps where they are two, and as the values.
    joined = ATTENTIONS[attention].join * head_dim

    def empty(heads: int, tokens: int, width: int) -> Tensor:
        return torch.empty(1, heads, tokens, width, dtype=dtype, device=device, requires_grad=not decoding)

    tensors = (
        empty(signals_per_noise + 1, 1 if decoding else 16, head_dim),
        empty(1, 16, joined),
        empty(1, 16, joined),
    )
    lam = torch.empty((), device=device)
    reasons: list[str] = []
    for name, kernel in KERNELS.items():
        reason = kernel.refuses(*tensors, lam, None, signals_per_noise=signals_per_noise)
        if reason is None:
            return name, reasons
        reasons.append(reason)
    return "standard", reasons


def _holds_both_keys(query: Tensor, key: Tensor) -> bool:
    return key.shape[-1] != query.shape[-1]


def _needs_standard_call(mask: Tensor | None, dropout: float, options: dict[str, Any]) -> str | None:
    """Returns None where the kernel takes the mask and options of a call, else one sentence that says why not."""
    if mask is not None and not is_compact(mask):
        return "diff_fused: a mask of its own per query and key needs the standard call"
    if dropout:
        return "diff_fused: dropout needs the standard call"
    given = [name for name in ("position_bias", "softcap") if options.get(name) is not None]
    # A mask says itself who sees what.
    if mask is None and options.get("is_causal") is False:
        given.append("is_causal=False")
    if options.get("output_attentions"):
        # The standard call then says that it returns no attention weights, as it does under its own name.
        given.append("output_attentions")
    return f"diff_fused: {', '.join(given)} needs the standard call" if given else None


def _standard_mask(
    mask: Tensor | None, query: Tensor, key: Tensor, is_causal: bool | None
) -> tuple[Tensor | None, Tensor | None]:
    """The mask that ``sdpa`` takes for ours, and the rows (B, T, N or 1, 1) that see no key, or None."""
    T, S = query.shape[2], key.shape[2]
    if mask is None:
        # Without a mask sdpa is causal from the top left, which is ours only where T = S.
        if is_causal is False or T in (1, S):
            return None, None
        return visible_keys(T, S, True, None, query.device), None
    if not is_compact(mask):
        return open_dead_rows(mask) if mask.dtype == torch.bool else (mask, None)
    return open_dead_rows(visible_in_ranges(mask[:, :, 0, 0], T))


def diff_fused_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask of ``diff_fused_attention``: None or int32 (2, B, 1, 1, S) for the causal pattern, else ``sdpa``'s.

    Arguments are those of ``transformers.masking_utils.sdpa_mask``; ``attention_mask`` is bool (B, keys), False where
    a key is padding.

    >>> diff_fused_mask(1, 3, 5, q_offset=2) is None
    True
    >>> mask = diff_fused_mask(1, 3, 5, q_offset=2, attention_mask=torch.tensor([[False, True, True, True, True]]))
    >>> mask.flatten(1).tolist()
    [[0, 0, 0, 1, 2], [0, 3, 3, 3, 3]]
    """
    pattern = mask_function if isinstance(mask_function, Pattern) else Pattern()
    if pattern is not mask_function and mask_function is not causal_mask_function:
        # Never None, which is causal here and may be bidirectional there.
        kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False, "device": device}
        return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **kwargs)
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if (
        allow_is_causal_skip
        and pattern.causal
        and pattern.first is None
        and (pattern.window is None or kv_length <= pattern.window)
        and _sees_every_key(padding)
        and not isinstance(q_offset, Tensor)
        and not isinstance(kv_offset, Tensor)
        and q_offset + q_length == kv_offset + kv_length
    ):
        return None
    position = torch.arange(kv_length, device=device) + kv_offset
    # The keys that a static cache has not written yet lie behind the last query, so this hides them too.
    first, end = pattern.queries(position, q_length, q_offset).expand(-1, batch_size, -1)
    if padding is not None:
        end = torch.where(padding[:, position], end, 0)
    return torch.stack([first, end])[:, :, None, None, :]


def is_compact(mask: Tensor) -> bool:
    """Tells whether a mask is the fused kernel's own, int32 (2, B, 1, 1, S): no other one has five dimensions."""
    return mask.dim() == 5


def _sees_every_key(padding: Tensor | None) -> bool:
    """Tells whether no key is padding; False while a graph is traced, which cannot depend on values."""
    return padding is None or (not is_tracing(padding) and bool(padding.all()))


ALL_ATTENTION_FUNCTIONS.register(DIFF_FUSED, diff_fused_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(DIFF_FUSED, diff_fused_mask)
