"""Motif's decoder as a plain loop in float64 over its published tensors, one token and one head at a time.

It shares nothing with the package: no module, no layout function, no attention call. The two layouts are those of
Motif-2.6B (neighbouring heads are a pair) and of Motif-2-12.7B (of r + 1 neighbouring query heads the last is noise).
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

TWO_POINT_SIX: dict[str, Any] = {
    "model_type": "Motif", "architectures": ["MotifForCausalLM"], "vocab_size": 71, "hidden_size": 48,
    "intermediate_size": 67, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4,
    "hidden_act": "poly_norm", "rms_norm_eps": 1e-6, "attn_rms_norm_eps": 1e-5, "rope_theta": 500.0,
    "max_position_embeddings": 89, "initializer_range": 0.15, "use_bias": False, "tie_word_embeddings": True,
    "use_cache": True, "bos_token_id": 3, "eos_token_id": 2, "sliding_window": None, "use_sliding_window": False,
    "auto_map": {"AutoModelForCausalLM": "modeling_motif.MotifForCausalLM"}, "attention_dropout": 0.0,
    "torch_dtype": "float32",
}  # fmt: skip
# 4 · 2 signal heads and 2 noise heads on 2 pairs of key heads; the heads are wider than the hidden size.
TWELVE_POINT_SEVEN = TWO_POINT_SIX | {
    "num_attention_heads": 10, "num_key_value_heads": 4, "num_noise_heads": 2, "head_dim": 10, "k_ratio": 1,
    "tie_word_embeddings": False,
}  # fmt: skip
MOTIF: dict[str, dict[str, Any]] = {
    "Motif-2.6B": TWO_POINT_SIX,
    "Motif-2.6B untied": TWO_POINT_SIX | {"tie_word_embeddings": False, "num_key_value_heads": 8},
    "Motif-2.6B biases": TWO_POINT_SIX | {"use_bias": True},
    "Motif-2.6B biases of q, k, v": TWO_POINT_SIX | {"qkv_bias": True, "head_dim": 6},
    "Motif-2-12.7B": TWELVE_POINT_SEVEN,
    "Motif-2-12.7B tied": TWELVE_POINT_SEVEN | {"tie_word_embeddings": True, "use_bias": True},
    # Three noise heads on one pair of key heads, two signals each.
    "Motif-2-12.7B, few keys": TWELVE_POINT_SEVEN
    | {"num_attention_heads": 9, "num_noise_heads": 3, "num_key_value_heads": 2},
}


def motif_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names and shapes of the published tensors."""
    D, F, d, heads, noise, keys = _sizes(config)
    bias, qkv = config["use_bias"], config.get("qkv_bias", config["use_bias"])
    yield "model.embed_tokens.weight", (config["vocab_size"], D)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, rows, columns, biased in (
            ("self_attn.q_proj", heads * d, D, qkv),
            ("self_attn.k_proj", keys * d, D, qkv),
            ("self_attn.v_proj", keys * d, D, qkv),
            ("self_attn.o_proj", D, 2 * (heads - noise) * d, bias),
            ("mlp.gate_proj", F, D, bias),
            ("mlp.up_proj", F, D, bias),
            ("mlp.down_proj", D, F, bias),
        ):
            yield f"{prefix}{name}.weight", (rows, columns)
            if biased:
                yield f"{prefix}{name}.bias", (rows,)
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            yield f"{prefix}self_attn.{name}", (d,)
        yield f"{prefix}self_attn.subln.weight", (2 * d,)
        yield f"{prefix}mlp.act_fn.weight", (3,)
        yield f"{prefix}mlp.act_fn.bias", (1,)
        yield f"{prefix}input_layernorm.weight", (D,)
        yield f"{prefix}post_attention_layernorm.weight", (D,)
    yield "model.norm.weight", (D,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], D)


def motif_tensors(config: dict[str, Any], *, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights with scores of the order of 1, gains that are not 1, and λ of each layer far from another's."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in motif_shapes(config):
        drawn = torch.randn(shape, generator=generator)
        if "norm" in name or "subln" in name:
            drawn = 1 + 0.2 * drawn
        elif "act_fn.weight" in name:
            drawn = 1 / 3 + 0.2 * drawn
        else:
            drawn = 0.3 * drawn
        made[name] = drawn.to(dtype)
    return made


def motif_logits(config: dict[str, Any], tensors: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Token ids (B, T) to logits (B, T, vocabulary), in float64 but for λ, which the model computes in float32."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    return torch.stack([_sequence(config, tensors, weights, row) for row in ids])


def _sizes(config: dict[str, Any]) -> tuple[int, int, int, int, int, int]:
    heads, D = config["num_attention_heads"], config["hidden_size"]
    noise = config.get("num_noise_heads") or heads // 2
    d = config.get("head_dim") or D // heads
    return D, config["intermediate_size"], d, heads, noise, config["num_key_value_heads"]


def _sequence(config: dict[str, Any], stored: dict[str, Tensor], weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        normed = _rms(x, config["rms_norm_eps"]) * weights[f"{prefix}input_layernorm.weight"]
        x = x + _attention(config, stored, weights, layer, normed)
        normed = _rms(x, config["rms_norm_eps"]) * weights[f"{prefix}post_attention_layernorm.weight"]
        gate = _linear(weights, f"{prefix}mlp.gate_proj", normed)
        w, b = weights[f"{prefix}mlp.act_fn.weight"], weights[f"{prefix}mlp.act_fn.bias"]
        act = w[0] * _rms(gate**3, 1e-6) + w[1] * _rms(gate**2, 1e-6) + w[2] * _rms(gate, 1e-6) + b
        x = x + _linear(weights, f"{prefix}mlp.down_proj", act * _linear(weights, f"{prefix}mlp.up_proj", normed))
    x = _rms(x, config["rms_norm_eps"]) * weights["model.norm.weight"]
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return x @ weights[head].T


def _attention(
    config: dict[str, Any], stored: dict[str, Tensor], weights: dict[str, Tensor], layer: int, x: Tensor
) -> Tensor:
    _, _, d, heads, noise, keys = _sizes(config)
    prefix = f"model.layers.{layer}.self_attn."
    theta = config["rope_theta"]
    q = [_rotated(part, theta) for part in _linear(weights, f"{prefix}q_proj", x).split(d, dim=1)]
    k = [_rotated(part, theta) for part in _linear(weights, f"{prefix}k_proj", x).split(d, dim=1)]
    v = list(_linear(weights, f"{prefix}v_proj", x).split(d, dim=1))
    vectors = [stored[f"{prefix}lambda_{which}"].float() for which in ("q1", "k1", "q2", "k2")]
    init = 0.8 - 0.6 * math.exp(-0.3 * (layer - 1))
    first, second = ((a * b).sum().exp() for a, b in (vectors[:2], vectors[2:]))
    lam = (first - second + init).double()
    ratio, groups_per_key = (heads - noise) // noise, noise // (keys // 2)
    outputs = []
    for group in range(noise):
        pair = group // groups_per_key
        values = torch.cat((v[2 * pair], v[2 * pair + 1]), dim=1)
        subtracted = _map(q[group * (ratio + 1) + ratio], k[2 * pair + 1]) @ values
        for signal in range(ratio):
            out = _map(q[group * (ratio + 1) + signal], k[2 * pair]) @ values - lam * subtracted
            normed = _rms(out, config["attn_rms_norm_eps"]) * weights[f"{prefix}subln.weight"]
            outputs.append(normed * (1 - init))
    return _linear(weights, f"{prefix}o_proj", torch.cat(outputs, dim=1))


def _map(q: Tensor, k: Tensor) -> Tensor:
    """One softmax map (T, T) of one head, row by row: a token sees itself and what is before it."""
    rows = torch.zeros(len(q), len(k), dtype=torch.float64)
    for t in range(len(q)):
        rows[t, : t + 1] = torch.softmax(k[: t + 1] @ q[t] / math.sqrt(q.shape[1]), dim=0)
    return rows


def _rotated(x: Tensor, theta: float) -> Tensor:
    """(T, d) with channels i and i + d/2 turned by the angle t · θ^(−2i/d), whose cos and sin are float32."""
    half = x.shape[1] // 2
    frequencies = 1.0 / theta ** (torch.arange(half, dtype=torch.float32) / half)
    angles = torch.arange(len(x), dtype=torch.float32)[:, None] * frequencies
    cos, sin = angles.cos().double(), angles.sin().double()
    a, b = x[:, :half], x[:, half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=1)


def _rms(x: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps)


def _linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y
