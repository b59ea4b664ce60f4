"""Implementations that are wrong in ways that have shipped elsewhere. A test that one of them passes is no test."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from support.comparison import Inputs, compare, rounding_floors
from torch import Tensor

from diffattn.ops.reference import diff_attention_reference, softmax_attention_reference


class KnownWrong(NamedTuple):
    """A wrong function and when its mistake shows: some are right by accident, such as a wrong KV group among one."""

    name: str
    function: Callable[[Inputs], Tensor]
    applies: Callable[[Inputs], bool]
    after_norm: bool = False


def _definition(x: Inputs) -> Tensor:
    return diff_attention_reference(*x[:6], **x.options)


def _more_keys_than_one(x: Inputs) -> bool:
    """A query sees more than its own key."""
    return x.k1.shape[1] > 1 and not (x.causal and x.window == 1)


def _keys_behind(x: Inputs) -> bool:
    return x.causal and x.q1.shape[1] < x.k1.shape[1] and x.window is None


def _several_noise_heads(x: Inputs) -> bool:
    return 1 < x.q2.shape[2] < x.q1.shape[2] and _more_keys_than_one(x)


def _ignores_q_and_k(x: Inputs) -> Tensor:
    return _definition(x._replace(q1=torch.zeros_like(x.q1), q2=torch.zeros_like(x.q2)))


def _lam_is_0(x: Inputs) -> Tensor:
    return _definition(x._replace(lam=torch.zeros_like(x.lam)))


def _of_signals(x: Inputs) -> int:
    """The heads that subtract one noise map."""
    return x.q1.shape[2] // x.q2.shape[2]


def _maps_swapped(x: Inputs) -> Tensor:
    q2 = x.q2.repeat_interleave(_of_signals(x), dim=2)
    return _definition(x._replace(q1=q2, k1=x.k2, q2=x.q1, k2=x.k1))


def _wrong_kv_group(x: Inputs) -> Tensor:
    """Query head h reads group h % G, as `repeat` gives, where h // (H / G), as `repeat_interleave` gives, is meant."""
    repeats, of_noise = (q.shape[2] // x.k1.shape[2] for q in (x.q1, x.q2))
    k1, v, k2 = x.k1.repeat(1, 1, repeats, 1), x.v.repeat(1, 1, repeats, 1), x.k2.repeat(1, 1, of_noise, 1)
    return _definition(x._replace(k1=k1, k2=k2, v=v))


def _wrong_noise_head(x: Inputs) -> Tensor:
    """Output head h subtracts noise head h % Hn, where h // (H / Hn) is meant."""
    return _definition(x._replace(q2=x.q2.repeat(1, 1, _of_signals(x), 1)))


def _neighbour_is_the_noise(x: Inputs) -> Tensor:
    """The groups of signal heads and their noise head are taken one head too late, as where r is counted from 0."""
    return _definition(x._replace(q2=x.q2.repeat_interleave(_of_signals(x), dim=2).roll(1, 2)))


def _first_signal_alone_is_differential(x: Inputs) -> Tensor:
    """Pairs are subtracted, and what is left of a group stays softmax attention."""
    first = torch.arange(x.q1.shape[2]) % _of_signals(x) == 0
    return _definition(x._replace(lam=x.lam.expand(x.q1.shape[:3]) * first))


def _no_window(x: Inputs) -> Tensor:
    return _definition(x._replace(window=None))


def _window_too_short(x: Inputs) -> Tensor:
    """Counted without the query's own key, or on one side."""
    assert x.window is not None
    return _definition(x._replace(window=x.window - 1))


def _window_is_less(x: Inputs) -> bool:
    return x.window is not None and x.window < x.k1.shape[1] - x.q1.shape[1] + 1


def _top_left_mask(x: Inputs) -> Tensor:
    """Query t sees keys up to t: the later keys are cut off, and with them their part in every softmax."""
    T = x.q1.shape[1]
    padding = None if x.key_padding is None else x.key_padding[:, :T]
    return _definition(x._replace(k1=x.k1[:, :T], k2=x.k2[:, :T], v=x.v[:, :T], key_padding=padding))


def _half_of_v(x: Inputs) -> Tensor:
    """V of width d where 2d was meant: the second half of the channels never arrives."""
    half = x.v.shape[-1] // 2
    return _definition(x._replace(v=torch.cat([x.v[..., :half], torch.zeros_like(x.v[..., half:])], dim=-1)))


def _scale_of_2d(x: Inputs) -> Tensor:
    return _definition(x._replace(scale=(2 * x.q1.shape[-1]) ** -0.5))


def rms_norm(x: Tensor, eps: float = 1e-5) -> Tensor:
    """V1's norm over the channels of each head, without a gain, in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


def _norm_before_the_subtraction(x: Inputs) -> Tensor:
    o1 = softmax_attention_reference(x.q1, x.k1, x.v, **x.options)
    o2 = softmax_attention_reference(x.q2, x.k2, x.v, **x.options).repeat_interleave(_of_signals(x), dim=2)
    return (rms_norm(o1) - x.lam.expand(o1.shape[:3])[..., None] * rms_norm(o2)).to(x.v.dtype)


KNOWN_WRONG = (
    KnownWrong("ignores q and k", _ignores_q_and_k, _more_keys_than_one),
    KnownWrong("lam = 0", _lam_is_0, lambda x: bool(x.lam.ne(0).any())),
    KnownWrong("maps swapped", _maps_swapped, _more_keys_than_one),
    KnownWrong("wrong KV group", _wrong_kv_group, lambda x: 1 < x.k1.shape[2] < x.q1.shape[2]),
    KnownWrong("top-left mask", _top_left_mask, _keys_behind),
    KnownWrong(
        "norm before the subtraction", _norm_before_the_subtraction, lambda x: x.window is None, after_norm=True
    ),
    KnownWrong("V of width d", _half_of_v, lambda x: True),
    KnownWrong("scale from 2d", _scale_of_2d, _more_keys_than_one),
    KnownWrong("noise head h % Hn", _wrong_noise_head, _several_noise_heads),
    KnownWrong("noise head of the group before", _neighbour_is_the_noise, _several_noise_heads),
    KnownWrong("first signal alone is differential", _first_signal_alone_is_differential, lambda x: _of_signals(x) > 1),
    KnownWrong("no window", _no_window, _window_is_less),
    KnownWrong("window too short by one", _window_too_short, lambda x: _window_is_less(x) and x.window != 1),
)


def assert_rejects_known_wrong(inputs: Inputs, *, factor: float = 2.0) -> list[str]:
    """Asserts that `compare()` rejects every implementation whose mistake shows on `inputs`; returns their names."""
    expected, eager = _definition(inputs.to(torch.float64)), _definition(inputs)
    floors = rounding_floors(diff_attention_reference, inputs)[:1]
    rejected = []
    for wrong in KNOWN_WRONG:
        if not wrong.applies(inputs):
            continue
        try:
            if wrong.after_norm:
                compare(wrong.function(inputs), rms_norm(expected), rms_norm(eager), factor=factor)
            else:
                compare(wrong.function(inputs), expected, eager, factor=factor, floors=floors)
        except AssertionError:
            rejected.append(wrong.name)
        else:
            raise AssertionError(f"compare() accepts a wrong implementation: {wrong.name}")
    return rejected
