"""A decoder around the authors' attention modules, written out in plain torch from the description in ``unilm.py``.

Names of tensors and of fields are those of a reference folder. Only what a test needs: no cache, no padding.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rotary_tables(length: int, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin (T, d/2), in float32 as everywhere."""
    frequencies = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, T, heads, d): the channels 2i and 2i + 1 are one point of the plane, turned by the i-th angle."""
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def causal_maps(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q kᵀ/√d) of (B, T, H, d) and (B, T, H, d): (B, H, T, T)."""
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1)


class ReferenceV1(nn.Module):
    def __init__(self, config: dict[str, Any], depth: int, *, gain: bool) -> None:
        super().__init__()
        embed = config["embed_dim"]
        self.form = config["form"]
        self.heads = config["num_heads"]
        self.groups = config.get("num_kv_heads") or config.get("decoder_kv_attention_heads") or self.heads
        self.width = embed // self.heads // 2
        repeats = self.heads // self.groups
        self.q_proj = nn.Linear(embed, embed, bias=False)
        self.k_proj = nn.Linear(embed, embed // repeats, bias=False)
        self.v_proj = nn.Linear(embed, embed // repeats, bias=False)
        self.out_proj = nn.Linear(embed, embed, bias=False)
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            self.register_parameter(name, nn.Parameter(torch.empty(self.width)))
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * depth)
        self.subln = nn.RMSNorm(2 * self.width, eps=1e-5, elementwise_affine=gain)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, 2 * self.heads, self.width)
        k = self.k_proj(x).view(batch, length, 2 * self.groups, self.width)
        v = self.v_proj(x).view(batch, length, self.groups, 2 * self.width)
        q, k = rotate_interleaved(q, cos, sin), rotate_interleaved(k, cos, sin)
        repeats = self.heads // self.groups
        v = v.repeat_interleave(repeats, dim=2)
        if self.form == "eager":
            # All 2 · groups key heads are repeated, and neighbours are paired after that.
            maps = causal_maps(q, k.repeat_interleave(repeats, dim=2)).unflatten(1, (self.heads, 2))
            first, second = maps[:, :, 0], maps[:, :, 1]
        else:
            # Pairs of key heads are made first, and each pair is repeated.
            k1, k2 = (k[:, :, part::2].repeat_interleave(repeats, dim=2) for part in (0, 1))
            first, second = causal_maps(q[:, :, 0::2], k1), causal_maps(q[:, :, 1::2], k2)
        # In float32, as ours is, so that float64 shows every other difference.
        q1, k1, q2, k2 = (vector.float() for vector in (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2))
        lam = (q1 * k1).sum().exp() - (q2 * k2).sum().exp() + self.lambda_init
        y = torch.einsum("bhts,bshv->bthv", first - lam * second, v)
        return self.out_proj((self.subln(y) * (1 - self.lambda_init)).flatten(-2))


class ReferenceV2(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        embed, self.width, self.heads = config["embed_dim"], config["head_dim"], config["num_heads"]
        self.groups = config.get("num_kv_heads") or self.heads
        self.q_proj = nn.Linear(embed, 2 * self.heads * self.width, bias=False)
        self.k_proj = nn.Linear(embed, self.groups * self.width, bias=False)
        self.v_proj = nn.Linear(embed, self.groups * self.width, bias=False)
        self.o_proj = nn.Linear(self.heads * self.width, embed, bias=False)
        self.lambda_proj = nn.Linear(embed, self.heads, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, self.width)) for part in (self.q_proj, self.k_proj, self.v_proj))
        repeats = 2 * self.heads // self.groups
        k = rotate_interleaved(k, cos, sin).repeat_interleave(repeats, dim=2)
        maps = causal_maps(rotate_interleaved(q, cos, sin), k)
        o = torch.einsum("bhts,bshd->bthd", maps, v.repeat_interleave(repeats, dim=2))
        lam = torch.sigmoid(self.lambda_proj(x).float())[..., None]
        return self.o_proj((o[:, :, 0::2] - lam * o[:, :, 1::2]).flatten(-2))


class ReferenceMLP(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config["embed_dim"], config["intermediate_size"], bias=False)
        self.up_proj = nn.Linear(config["embed_dim"], config["intermediate_size"], bias=False)
        self.down_proj = nn.Linear(config["intermediate_size"], config["embed_dim"], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class ReferenceDecoder(nn.Module):
    """Token ids (B, T) to logits (B, T, vocabulary), for a reference folder's configuration."""

    def __init__(self, config: dict[str, Any], *, gain: bool = True) -> None:
        super().__init__()
        self.config = config
        norm = {"eps": config.get("rms_norm_eps", 1e-5)}
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config["vocab_size"], config["embed_dim"])
        self.model.layers = nn.ModuleList()
        for depth in range(config["num_hidden_layers"]):
            layer = nn.Module()
            layer.self_attn = ReferenceV1(config, depth, gain=gain) if config["version"] == 1 else ReferenceV2(config)
            layer.mlp = ReferenceMLP(config)
            layer.input_layernorm = nn.RMSNorm(config["embed_dim"], **norm)
            layer.post_attention_layernorm = nn.RMSNorm(config["embed_dim"], **norm)
            self.model.layers.append(layer)
        self.model.norm = nn.RMSNorm(config["embed_dim"], **norm)
        if not config.get("tie_word_embeddings", True):
            self.lm_head = nn.Linear(config["embed_dim"], config["vocab_size"], bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        tied = self.config.get("tie_word_embeddings", True)
        x = self.model.embed_tokens(ids)
        theta = self.config.get("rope_theta") or self.config.get("rope_parameters", {}).get("rope_theta", 10000.0)
        tables = rotary_tables(ids.shape[1], self.model.layers[0].self_attn.width, theta)
        for layer in self.model.layers:
            x = x + layer.self_attn(layer.input_layernorm(x), *tables)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight if tied else self.lm_head.weight)


def reference_decoder(config: dict[str, Any], *, gain: bool = True, seed: int = 0) -> ReferenceDecoder:
    """In float64, with scores of the order of 1, gains that are not 1, and λ that float32 holds."""
    torch.manual_seed(seed)
    decoder = ReferenceDecoder(config, gain=gain).double()
    for name, parameter in decoder.named_parameters():
        if "norm" in name or "subln" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif "lambda_" in name and parameter.dim() == 1:
            parameter.data.copy_(torch.randn(parameter.shape).mul(0.3))
        else:
            nn.init.normal_(parameter, std=0.3)
    return decoder.eval()
