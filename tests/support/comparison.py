"""One comparison for every kernel's test: the error is at most `factor` times that of eager code in the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Tensors = Tensor | Sequence[Tensor]


class Inputs(NamedTuple):
    """The arguments of one differential attention call."""

    q1: Tensor
    k1: Tensor
    q2: Tensor
    k2: Tensor
    v: Tensor
    lam: Tensor
    causal: bool = True
    scale: float | None = None
    key_padding: Tensor | None = None
    window: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        window = {} if self.window is None else {"window": self.window}
        return {"causal": self.causal, "scale": self.scale, "key_padding": self.key_padding} | window

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values in another dtype. λ stays in float32 at least, and one k for both maps stays one tensor."""
        k1 = self.k1.to(dtype)
        return self._replace(
            q1=self.q1.to(dtype),
            k1=k1,
            q2=self.q2.to(dtype),
            k2=k1 if self.k2 is self.k1 else self.k2.to(dtype),
            v=self.v.to(dtype),
            lam=self.lam.to(torch.promote_types(dtype, torch.float32)),
        )


NAMES = ("output", "d_q1", "d_k1", "d_q2", "d_k2", "d_v", "d_lam")


def make_inputs(
    B: int = 2,
    T: int = 7,
    S: int | None = None,
    H: int = 6,
    G: int = 3,
    D: int = 5,
    Dv: int = 13,
    *,
    dtype: torch.dtype = torch.float32,
    noise_heads: int | None = None,
    one_key: bool = False,
    seed: int = 0,
    **options: Any,
) -> Inputs:
    """Unit-normal inputs, so that scores have a spread of about 1 and no map is uniform; λ is uniform in (0.2, 0.9).

    There are as many noise heads as output heads, if no other number is given.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    S = T if S is None else S
    q1, k1, q2 = normal(B, T, H, D), normal(B, S, G, D), normal(B, T, noise_heads or H, D)
    k2 = k1 if one_key else normal(B, S, G, D)
    lam = 0.2 + 0.7 * torch.rand(B, T, H, generator=generator)
    return Inputs(q1, k1, q2, k2, normal(B, S, G, Dv), lam, **options).to(dtype)


def forward_and_gradients(function: Callable[..., Tensor], inputs: Inputs) -> list[Tensor]:
    """The output and gradients in the order of NAMES, for a fixed cotangent. One k has one gradient, listed twice."""
    one_key = inputs.k2 is inputs.k1
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs[:6]]
    if one_key:
        leaves[3] = leaves[1]
    output = function(*leaves, **inputs.options)
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(output.shape, generator=generator).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, cotangent)]


def _eps(x: Tensor) -> float:
    return torch.finfo(x.dtype).eps


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def rounding_floors(reference: Callable[..., Tensor], inputs: Inputs) -> list[float]:
    """Rounding, in the order of NAMES, that another order of the same sums may add: 2 ulp of the terms that cancel.

    What is expected can be far smaller than the terms that it is a difference of (λ near 1, one key only), and then the
    luck of one order of sums is no measure of another. The terms are known: with −λ for λ they add up instead.
    The scores' gradients are cancelled once more, by the softmax, but inside the kernels, which hold them in float32.
    """
    wide = inputs.to(torch.float64)
    added = forward_and_gradients(reference, wide._replace(lam=-wide.lam))
    floors = [2 * _eps(inputs.v) * _largest(x) for x in added]
    scale = wide.q1.shape[-1] ** -0.5 if wide.scale is None else wide.scale
    # A gradient of a score is a sum of Dv products of unit-normal numbers, and several of them meet a q or a k.
    scores = 4 * torch.finfo(torch.float32).eps * scale * wide.v.shape[-1] ** 0.5 * _largest(wide.v)
    return [floor + scores if name[:3] in ("d_q", "d_k") else floor for name, floor in zip(NAMES, floors, strict=True)]


def compare(
    actual: Tensors,
    expected: Tensors,
    eager: Tensors,
    *,
    factor: float = 2.0,
    names: Sequence[str] = ("output",),
    floors: Sequence[float] | None = None,
) -> None:
    """Asserts that `actual` is as near to `expected` (float64) as `eager` (the definition, in actual's dtype) is.

    Both the largest and the RMS error may be at most `factor` times eager's, plus a floor: one per tensor in `floors`,
    or 2 ulp of the largest value expected. Prints, for each tensor, the maximum error, its RMS over the RMS of what is
    expected, and eager's maximum error in the same dtype.
    """
    rows = [[x] if isinstance(x, Tensor) else list(x) for x in (actual, expected, eager)]
    failures = []
    given_floors = [None] * len(rows[0]) if floors is None else floors
    for name, got, want, plain, given_floor in zip(names, *rows, given_floors, strict=True):
        assert got.shape == want.shape == plain.shape, f"{name}: shapes {got.shape}, {want.shape}, {plain.shape}"
        assert got.dtype == plain.dtype, f"{name}: dtype {got.dtype}, eager {plain.dtype}"
        assert want.dtype == torch.float64, f"{name}: what is expected must be in float64, not {want.dtype}"
        if not got.numel():
            continue
        error, plain_error = (got.double() - want).abs(), (plain.double() - want).abs()
        # Both round their last sum to the dtype, in different orders, and on small or lucky inputs eager's error is 0.
        # Two ulp of the largest value expected allow for that; a signal is 2**7 (bfloat16) to 2**23 ulp.
        floor = given_floor or 2 * _eps(got) * _largest(want)
        largest, plain_largest = error.max().item(), plain_error.max().item()
        rms, plain_rms, signal = (x.square().mean().sqrt().item() for x in (error, plain_error, want))
        line = f"{name}: max error {largest:.3g}, RMS ratio {rms / signal if signal else rms:.3g}, "
        line += f"eager {got.dtype} max error {plain_largest:.3g}, floor {floor:.3g}"
        print(line)
        # Written so that NaN fails.
        if not (largest <= factor * plain_largest + floor and rms <= factor * plain_rms + floor):
            failures.append(line)
    assert not failures, "; ".join(failures)


def compare_forward_and_gradients(
    function: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: Inputs, *, factor: float = 2.0
) -> None:
    """`compare()` on the output with `factor` and on all six gradients with one and a half times that (2 and 3)."""
    actual = forward_and_gradients(function, inputs)
    expected = forward_and_gradients(reference, inputs.to(torch.float64))
    eager = forward_and_gradients(reference, inputs)
    floors = rounding_floors(reference, inputs)
    for part, allowed in ((slice(0, 1), factor), (slice(1, 7), 1.5 * factor)):
        compare(actual[part], expected[part], eager[part], factor=allowed, names=NAMES[part], floors=floors[part])
