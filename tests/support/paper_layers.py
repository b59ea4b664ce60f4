"""The attention layers, written from the papers a second time, and versions that are wrong in ways that have shipped.

``w`` holds a layer's parameters by the names that the package gives them. Everything is computed in the dtype of ``x``,
λ in float32 at least.
"""

import math

import torch
from torch import Tensor

from diffattn.ops.reference import diff_attention_reference, softmax_attention_reference
from diffattn.plan.shape import ModelShape

Weights = dict[str, Tensor]


def rotary(heads: Tensor, theta: float) -> Tensor:
    """Turn channels (i, i + d/2) of ``(B, T, heads, d)`` by the angle t·θ^(−2i/d)."""
    half = heads.shape[-1] // 2
    frequency = theta ** -(torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(heads.shape[1], dtype=torch.float64)[:, None, None] * frequency
    cos, sin = angle.cos().to(heads.dtype), angle.sin().to(heads.dtype)
    x, y = heads[..., :half], heads[..., half:]
    return torch.cat([x * cos - y * sin, x * sin + y * cos], dim=-1)


def rms_norm(x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


class PaperSoftmax:
    """Grouped-query softmax attention with rotary positions."""

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape
        self.scale = shape.head_dim**-0.5

    def rotate(self, heads: Tensor) -> Tensor:
        return rotary(heads, self.shape.rope_theta)

    def project(self, x: Tensor, w: Weights) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            (x @ w[f"{name}_proj.weight"].mT).unflatten(-1, (-1, self.shape.head_dim)) for name in ("q", "k", "v")
        )
        return self.rotate(q), self.rotate(k), v

    def heads(self, x: Tensor, w: Weights) -> Tensor:
        q, k, v = self.project(x, w)
        return softmax_attention_reference(q, k, v, scale=self.scale)

    def __call__(self, x: Tensor, w: Weights) -> Tensor:
        return self.heads(x, w).flatten(2) @ w["o_proj.weight"].mT


class PaperGated(PaperSoftmax):
    """arXiv 2505.06708, the gate behind the attention (G1), of its own per head and channel."""

    def gate(self, x: Tensor, w: Weights) -> Tensor:
        return 1 / (1 + (-(x @ w["g_proj.weight"].mT)).exp())

    def __call__(self, x: Tensor, w: Weights) -> Tensor:
        return (self.gate(x, w) * self.heads(x, w).flatten(2)) @ w["o_proj.weight"].mT


class PaperNormedSoftmax(PaperSoftmax):
    """The softmax row "+ GroupNorm" of arXiv 2410.05258, Table 6: V1's norm of each head, with a scale of 1."""

    def heads(self, x: Tensor, w: Weights) -> Tensor:
        normed = rms_norm(super().heads(x, w).to(torch.promote_types(x.dtype, torch.float32)), 1e-5)
        return (normed * w["subln.weight"]).to(x.dtype)


class PaperV1(PaperSoftmax):
    """arXiv 2410.05258, section 2, with the learnable gain of the authors' code where ``w`` has one."""

    eps = 1e-5

    def __init__(self, shape: ModelShape, lambda_init: float) -> None:
        super().__init__(shape)
        self.lambda_init = lambda_init
        self.factor = 1 - lambda_init

    def pair(self, heads: Tensor) -> tuple[Tensor, Tensor]:
        return heads[:, :, 0::2], heads[:, :, 1::2]

    def lam(self, w: Weights) -> Tensor:
        q1, k1, q2, k2 = (w[f"lam.lambda_{name}"] for name in ("q1", "k1", "q2", "k2"))
        return (q1 @ k1).exp() - (q2 @ k2).exp() + self.lambda_init

    def head(self, q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
        (q1, q2), (k1, k2) = self.pair(q), self.pair(k)
        return rms_norm(diff_attention_reference(q1, k1, q2, k2, v, lam, scale=self.scale), self.eps)

    def __call__(self, x: Tensor, w: Weights) -> Tensor:
        q, k, v = self.project(x, w)
        v = v.flatten(2).unflatten(-1, (-1, 2 * self.shape.head_dim))
        y = self.factor * self.head(q, k, v, self.lam(w)) * w.get("subln.weight", 1.0)
        return y.to(x.dtype).flatten(2) @ w["o_proj.weight"].mT


class PaperV1WithoutNorm(PaperV1):
    """The row "w/o GroupNorm" of the same table: no norm, and so none of its scale."""

    def __init__(self, shape: ModelShape, lambda_init: float) -> None:
        super().__init__(shape, lambda_init)
        self.factor = 1.0

    def head(self, q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
        (q1, q2), (k1, k2) = self.pair(q), self.pair(k)
        return diff_attention_reference(q1, k1, q2, k2, v, lam, scale=self.scale)


class PaperV2(PaperSoftmax):
    """The authors' post of 20 January 2026: 2n queries, the keys and values of the softmax layer, λ per token."""

    def pair(self, heads: Tensor) -> tuple[Tensor, Tensor]:
        return heads[:, :, 0::2], heads[:, :, 1::2]

    def lam(self, x: Tensor, w: Weights) -> Tensor:
        return torch.sigmoid((x @ w["lambda_proj.weight"].mT).to(torch.promote_types(x.dtype, torch.float32)))

    def __call__(self, x: Tensor, w: Weights) -> Tensor:
        q, k, v = self.project(x, w)
        q1, q2 = self.pair(q)
        y = diff_attention_reference(q1, k, q2, k, v, self.lam(x, w), scale=self.scale)
        return y.flatten(2) @ w["o_proj.weight"].mT


class PaperLinearV2(PaperV2):
    """λ = x W_λ without the sigmoid."""

    def lam(self, x: Tensor, w: Weights) -> Tensor:
        return (x @ w["lambda_proj.weight"].mT).to(torch.promote_types(x.dtype, torch.float32))


class _Grouped:
    """Groups of query heads, r signal heads and behind them their noise head (arXiv 2510.06949)."""

    def groups(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Signal heads (B, T, noise heads, r, d) and noise heads (B, T, noise heads, d)."""
        shape = self.shape
        shared = shape.signals_per_noise or shape.num_heads // shape.num_kv_heads
        groups = q.unflatten(2, (-1, shared + 1))
        return groups[:, :, :, :shared], groups[:, :, :, shared]

    def noise_of(self, head: int, shared: int, noise_heads: int) -> int:
        return head // shared

    def differences(self, q: Tensor, k1: Tensor, k2: Tensor, v: Tensor, lam: Tensor) -> Tensor:
        """Head by head, each with its own pair of maps; λ is (B, T, H)."""
        signals, noise = self.groups(q)
        shared, noise_heads = signals.shape[3], noise.shape[2]
        heads = shared * noise_heads
        found = []
        for head in range(heads):
            key = head * v.shape[2] // heads
            q1, q2 = signals[:, :, head // shared, head % shared], noise[:, :, self.noise_of(head, shared, noise_heads)]
            q1, q2, k1_, k2_, v_ = (x[:, :, None] for x in (q1, q2, k1[:, :, key], k2[:, :, key], v[:, :, key]))
            found.append(diff_attention_reference(q1, k1_, q2, k2_, v_, lam[:, :, head, None], scale=self.scale))
        return torch.cat(found, dim=2)


class PaperGrouped(_Grouped, PaperV1):
    """V1's λ, norm and values with shared noise heads: arXiv 2510.06949."""

    def head(self, q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
        lam = lam.expand(*q.shape[:2], self.shape.num_heads // 2)
        return rms_norm(self.differences(q, *self.pair(k), v, lam), self.eps)


class PaperGroupedV2(_Grouped, PaperV2):
    """V2's rule with shared noise heads: a sigmoid λ for each token and signal head, no norm."""

    def __call__(self, x: Tensor, w: Weights) -> Tensor:
        q, k, v = self.project(x, w)
        return self.differences(q, k, k, v, self.lam(x, w)).flatten(2) @ w["o_proj.weight"].mT


class PaperGroupedLinearV2(PaperGroupedV2):
    """λ = x W_λ without the sigmoid."""

    def lam(self, x: Tensor, w: Weights) -> Tensor:
        return (x @ w["lambda_proj.weight"].mT).to(torch.promote_types(x.dtype, torch.float32))


class PaperOneV2(PaperV2):
    """λ = 1: the plain difference."""

    def lam(self, x: Tensor, w: Weights) -> Tensor:
        return torch.ones(x.shape[0], x.shape[1], self.shape.num_heads)


class PaperOtherGroupsV2(PaperV2):
    """The noise map, with its values, of the head that stands where this one does in the next key/value group."""

    def __call__(self, x: Tensor, w: Weights) -> Tensor:
        q, k, v = self.project(x, w)
        signal, noise = (softmax_attention_reference(half, k, v, scale=self.scale) for half in self.pair(q))
        share = self.shape.num_heads // self.shape.num_kv_heads
        other = [(head + share) % self.shape.num_heads for head in range(self.shape.num_heads)]
        y = signal - self.lam(x, w)[..., None] * noise[:, :, other]
        return y.to(x.dtype).flatten(2) @ w["o_proj.weight"].mT


class _GateWithoutSigmoid(PaperGated):
    def gate(self, x: Tensor, w: Weights) -> Tensor:
        return x @ w["g_proj.weight"].mT


class _OneGatePerHead(PaperGated):
    def gate(self, x: Tensor, w: Weights) -> Tensor:
        heads = super().gate(x, w).unflatten(-1, (-1, self.shape.head_dim))
        return heads.mean(-1, keepdim=True).expand_as(heads).flatten(2)


class _GatedValues(PaperGated):
    def __call__(self, x: Tensor, w: Weights) -> Tensor:
        q, k, v = self.project(x, w)
        share = self.shape.num_heads // self.shape.num_kv_heads
        gate = self.gate(x, w).unflatten(-1, (-1, self.shape.head_dim))
        y = softmax_attention_reference(*(q, k.repeat_interleave(share, 2)), gate * v.repeat_interleave(share, 2))
        return y.flatten(2) @ w["o_proj.weight"].mT


class _Halves:
    def pair(self, heads: Tensor) -> tuple[Tensor, Tensor]:
        first, second = heads.chunk(2, dim=2)
        return first, second


class _ScaleOf2d:
    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.scale = 1 / math.sqrt(2 * self.shape.head_dim)


class _RopeOver2d:
    def rotate(self, heads: Tensor) -> Tensor:
        wide = heads.flatten(2).unflatten(-1, (-1, 2 * self.shape.head_dim))
        return super().rotate(wide).flatten(2).unflatten(-1, (-1, self.shape.head_dim))


class _NoRope:
    def rotate(self, heads: Tensor) -> Tensor:
        return heads


class _PairsByHalvesV1(_Halves, PaperV1): ...


class _ScaleOf2dV1(_ScaleOf2d, PaperV1): ...


class _RopeOver2dV1(_RopeOver2d, PaperV1): ...


class _LambdaSignFlipped(PaperV1):
    def lam(self, w: Weights) -> Tensor:
        return -super().lam(w)


class _LambdaInitAlone(PaperV1):
    def lam(self, w: Weights) -> Tensor:
        return 0 * super().lam(w) + self.lambda_init


class _NoFactor(PaperV1):
    def __init__(self, shape: ModelShape, lambda_init: float) -> None:
        super().__init__(shape, lambda_init)
        self.factor = 1.0


class _NormBeforeSubtraction(PaperV1):
    def head(self, q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
        (q1, q2), (k1, k2) = self.pair(q), self.pair(k)
        o1, o2 = (softmax_attention_reference(q, k, v, scale=self.scale) for q, k in ((q1, k1), (q2, k2)))
        return rms_norm(o1, self.eps) - lam * rms_norm(o2, self.eps)


class _NormOverAllHeads(PaperV1):
    def head(self, q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
        (q1, q2), (k1, k2) = self.pair(q), self.pair(k)
        y = diff_attention_reference(q1, k1, q2, k2, v, lam, scale=self.scale)
        return rms_norm(y.flatten(2), self.eps).unflatten(-1, y.shape[-2:])


class _ValuesOfWidthD(PaperV1):
    def head(self, q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
        half = self.shape.head_dim
        return super().head(q, k, torch.cat([v[..., :half], v[..., :half]], dim=-1), lam)


class _PairsByHalvesV2(_Halves, PaperV2): ...


class _ScaleOf2dV2(_ScaleOf2d, PaperV2): ...


class _MapsSwapped(PaperV2):
    def pair(self, heads: Tensor) -> tuple[Tensor, Tensor]:
        return heads[:, :, 1::2], heads[:, :, 0::2]


class _NormedV2(PaperV2):
    def __call__(self, x: Tensor, w: Weights) -> Tensor:
        q, k, v = self.project(x, w)
        q1, q2 = self.pair(q)
        y = rms_norm(diff_attention_reference(q1, k, q2, k, v, self.lam(x, w)), 1e-5)
        return y.flatten(2) @ w["o_proj.weight"].mT


class _NoiseFirst:
    def groups(self, q: Tensor) -> tuple[Tensor, Tensor]:
        signals, noise = super().groups(q)
        groups = torch.cat([signals, noise[:, :, :, None]], dim=3)
        return groups[:, :, :, 1:], groups[:, :, :, 0]


class _NoiseBehindAllSignals:
    def groups(self, q: Tensor) -> tuple[Tensor, Tensor]:
        signals, noise = super().groups(q)
        signal_heads, noise_heads = q.split([signals.shape[2] * signals.shape[3], noise.shape[2]], dim=2)
        return signal_heads.unflatten(2, signals.shape[2:4]), noise_heads


class _NoiseInTurn:
    def noise_of(self, head: int, shared: int, noise_heads: int) -> int:
        return head % noise_heads


class _FirstSignalAlone:
    def differences(self, q: Tensor, k1: Tensor, k2: Tensor, v: Tensor, lam: Tensor) -> Tensor:
        shared = self.groups(q)[0].shape[3]
        return super().differences(q, k1, k2, v, lam * (torch.arange(lam.shape[2]) % shared == 0))


class _LambdaOfTheGroup:
    def differences(self, q: Tensor, k1: Tensor, k2: Tensor, v: Tensor, lam: Tensor) -> Tensor:
        shared = self.groups(q)[0].shape[3]
        return super().differences(q, k1, k2, v, lam[:, :, ::shared].repeat_interleave(shared, 2))


class _NoiseFirstGrouped(_NoiseFirst, PaperGrouped): ...


class _NoiseBehindAllSignalsGrouped(_NoiseBehindAllSignals, PaperGrouped): ...


class _NoiseInTurnGrouped(_NoiseInTurn, PaperGrouped): ...


class _FirstSignalAloneGrouped(_FirstSignalAlone, PaperGrouped): ...


class _ScaleOf2dGrouped(_ScaleOf2d, PaperGrouped): ...


class _LambdaSignFlippedGrouped(PaperGrouped):
    def lam(self, w: Weights) -> Tensor:
        return -super().lam(w)


class _NoFactorGrouped(PaperGrouped):
    def __init__(self, shape: ModelShape, lambda_init: float) -> None:
        super().__init__(shape, lambda_init)
        self.factor = 1.0


class _SignalKeyForNoise(PaperGrouped):
    def pair(self, heads: Tensor) -> tuple[Tensor, Tensor]:
        return heads[:, :, 0::2], heads[:, :, 0::2]


class _NoiseFirstGroupedV2(_NoiseFirst, PaperGroupedV2): ...


class _NoiseBehindAllSignalsGroupedV2(_NoiseBehindAllSignals, PaperGroupedV2): ...


class _NoiseInTurnGroupedV2(_NoiseInTurn, PaperGroupedV2): ...


class _FirstSignalAloneGroupedV2(_FirstSignalAlone, PaperGroupedV2): ...


class _LambdaOfTheGroupV2(_LambdaOfTheGroup, PaperGroupedV2): ...


class _ScaleOf2dSoftmax(_ScaleOf2d, PaperSoftmax): ...


class _NoRopeSoftmax(_NoRope, PaperSoftmax): ...


KNOWN_WRONG: dict[str, tuple[type, ...]] = {
    "softmax": (_ScaleOf2dSoftmax, _NoRopeSoftmax),
    "diff_v1": (
        _LambdaSignFlipped,
        _LambdaInitAlone,
        _NoFactor,
        _NormBeforeSubtraction,
        _NormOverAllHeads,
        _ScaleOf2dV1,
        _RopeOver2dV1,
        _PairsByHalvesV1,
        _ValuesOfWidthD,
    ),
    "diff_v2": (_PairsByHalvesV2, _ScaleOf2dV2, PaperLinearV2, PaperOneV2, PaperOtherGroupsV2, _MapsSwapped, _NormedV2),
    "diff_gda": (
        _NoiseFirstGrouped,
        _NoiseBehindAllSignalsGrouped,
        _NoiseInTurnGrouped,
        _FirstSignalAloneGrouped,
        _ScaleOf2dGrouped,
        _LambdaSignFlippedGrouped,
        _NoFactorGrouped,
        _SignalKeyForNoise,
    ),
    "diff_gda_v2": (
        _NoiseFirstGroupedV2,
        _NoiseBehindAllSignalsGroupedV2,
        _NoiseInTurnGroupedV2,
        _FirstSignalAloneGroupedV2,
        _LambdaOfTheGroupV2,
        PaperGroupedLinearV2,
    ),
    "gated": (PaperSoftmax, _GateWithoutSigmoid, _OneGatePerHead, _GatedValues),
}
