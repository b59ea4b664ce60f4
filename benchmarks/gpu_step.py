"""A training step of layers shaped as the paper's 1.4B model: attention is one cost of many.

Hidden width 2048, 16 softmax heads of 128, a gated feed-forward network, RMS norms, no rotary positions (every variant
would turn the same numbers). V1 has one λ a layer and the norm of its heads, V2 a λ for each token and head, and a
narrower feed-forward network that pays for its second query projection.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu_cases import Call

HIDDEN, HEADS, WIDTH = 2048, 16, 128
FEED_FORWARD = {"softmax": 5632, "v1": 5632, "v2": 4928}


class Layer(nn.Module):
    """One decoder layer; `attention` takes a `Call`."""

    def __init__(self, kind: str, attention: Callable[[Call], Tensor], hidden: int = HIDDEN) -> None:
        super().__init__()
        self.kind, self.attention = kind, attention
        self.heads = hidden // WIDTH if hidden == HIDDEN else 2
        width = hidden // self.heads
        inner = FEED_FORWARD[kind] if hidden == HIDDEN else 4 * hidden
        self.q = nn.Linear(hidden, hidden * (2 if kind == "v2" else 1), bias=False)
        self.k, self.v, self.o = (nn.Linear(hidden, hidden, bias=False) for _ in range(3))
        self.up, self.gate, self.down = (
            nn.Linear(*((inner, hidden) if name == "down" else (hidden, inner)), bias=False)
            for name in ("up", "gate", "down")
        )
        self.norms = nn.ParameterList([nn.Parameter(torch.ones(hidden)) for _ in range(2)])
        if kind == "v1":
            self.lam, self.gain = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.ones(2 * width))
        elif kind == "v2":
            self.lam = nn.Linear(hidden, self.heads, bias=False)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        h = F.rms_norm(x, x.shape[-1:], self.norms[0])
        q, k, v = (project(h).unflatten(-1, (-1, self.width)) for project in (self.q, self.k, self.v))
        lam = torch.zeros((), device=x.device)
        if self.kind == "v1":
            v, lam = v.unflatten(2, (-1, 2)).flatten(3), self.lam.float().expand(*x.shape[:2], self.heads // 2)
        elif self.kind == "v2":
            lam = torch.sigmoid(self.lam(h).float())
        o = self.attention(Call(self.kind, q, k, v, lam, True))
        if self.kind == "v1":
            o = 0.2 * F.rms_norm(o, o.shape[-1:], self.gain)
        x = x + self.o(o.flatten(2))
        h = F.rms_norm(x, x.shape[-1:], self.norms[1])
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def training_step(
    kind: str,
    attention: Callable[[Call], Tensor],
    *,
    batch: int,
    tokens: int,
    layers: int,
    device: str,
    dtype: torch.dtype,
    hidden: int = HIDDEN,
) -> Callable[[], object]:
    """Forward and backward through a stack of layers, as a function."""
    torch.manual_seed(0)
    stack = nn.Sequential(*(Layer(kind, attention, hidden) for _ in range(layers))).to(device, dtype)
    x = torch.randn(batch, tokens, hidden, device=device).to(dtype).requires_grad_()

    def step() -> None:
        stack.zero_grad(set_to_none=True)
        stack(x).float().square().mean().backward()

    return step
