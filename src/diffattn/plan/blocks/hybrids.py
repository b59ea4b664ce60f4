"""Decoders in which layers keep a state of fixed size: Qwen3-Next, Falcon-H1, RecurrentGemma, Phi-4-mini-flash."""

from __future__ import annotations

import math

from diffattn.config_fields import shown
from diffattn.errors import ConfigError
from diffattn.plan.blocks.block import BlockShape
from diffattn.plan.blocks.experts import shared_and_routed, sparse_layers
from diffattn.plan.blocks.fields import Fields
from diffattn.plan.blocks.parts import FULL, Attention, biases, block, gated, shape

LINEAR = "linear_attention"


def qwen3_next(fields: Fields) -> BlockShape:
    """Reads Qwen3-Next: three layers of gated delta rule for each one of gated attention, experts in all of them."""
    D, L, F = fields.size("hidden_size"), fields.size("num_hidden_layers"), fields.size("intermediate_size", 5632)
    n, G, d = fields.heads(), fields.size("num_key_value_heads", 2), fields.size("head_dim", 256)
    every = fields.size("full_attention_interval", 4)
    types = fields.layer_types(L, (FULL, LINEAR), [LINEAR if (index + 1) % every else FULL for index in range(L)])
    if sparse_layers(fields, L) != L:
        raise ConfigError(
            "mlp_only_layers or decoder_sparse_step that leave out layers", "experts in every layer", "correct the file"
        )
    network = shared_and_routed(fields, D, width=512, chosen=10, experts=512, shared=512)
    attention = Attention(D, n, G, d, gated=True)
    bias = biases(fields, attention)
    attention = Attention(D, n, G, d, bias + n * d if bias else 0, gated=True)
    key_heads, value_heads = fields.size("linear_num_key_heads", 16), fields.size("linear_num_value_heads", 32)
    key_width, value_width = fields.size("linear_key_head_dim", 128), fields.size("linear_value_head_dim", 128)
    kernel = fields.size("linear_conv_kernel_dim", 4)
    keys, values = key_heads * key_width, value_heads * value_width
    convolved = 2 * keys + values
    state = value_heads * key_width * value_width
    delta = {
        "matrices": convolved * kernel + D * (2 * keys + 2 * values) + D * 2 * value_heads + values * D,
        "small": 2 * value_heads + value_width,
        # The state decays, is read with the key, changed, and read with the query.
        "scan": 4 * state,
        "state": state + convolved * (kernel - 1),
        "wide": 2 * keys + 3 * values,
    }
    near = types.count(LINEAR)
    return shape(
        fields,
        [
            block("gated attention with experts", L - near, attention.fields, network, norms=2 * D + 2 * d),
            block("gated delta rule with experts", near, delta, network, norms=2 * D),
        ],
        final=D,
        heads=(n, G, d),
        intermediate=F,
    )


def falcon_h1(fields: Fields) -> BlockShape:
    """Reads Falcon-H1: attention and Mamba-2 side by side in every layer."""
    D, L, F = fields.size("hidden_size"), fields.size("num_hidden_layers"), fields.size("intermediate_size")
    n = fields.heads()
    G, d = fields.size("num_key_value_heads", 8), fields.size("head_dim", max(1, D // n))
    inner = fields.size("mamba_d_ssm", fields.size("mamba_expand", 2) * D)
    if fields.values.get("mamba_d_ssm", 1024) is not None:
        inner = fields.size("mamba_d_ssm", 1024)
    heads, width = fields.size("mamba_n_heads", 128), fields.get("mamba_d_head", "auto")
    if inner % heads or width not in ("auto", inner // heads):
        raise ConfigError(
            f"mamba_n_heads={heads} and mamba_d_head={shown(width)} with mamba_d_ssm={inner}",
            "as many channels as heads times their width",
            "correct the file",
        )
    groups, states = fields.size("mamba_n_groups", 1), fields.size("mamba_d_state", 256)
    kernel = fields.size("mamba_d_conv", 4)
    convolved = inner + 2 * groups * states
    projected = inner + convolved + heads
    attention = Attention(D, n, G, d)
    attention = Attention(D, n, G, d, biases(fields, attention))
    small = 3 * heads + convolved * fields.flag("mamba_conv_bias", True) + projected * fields.flag("mamba_proj_bias")
    small += D * fields.flag("projectors_bias") + inner * fields.flag("mamba_rms_norm")
    both = attention.fields
    both["matrices"] += D * projected + convolved * kernel + inner * D
    both["small"] += small
    both["wide"] += projected + inner
    both |= {"scan": 3 * inner * states, "state": inner * states + convolved * (kernel - 1)}
    network = gated(D, F, (2 * F + D) * fields.flag("mlp_bias"))
    return shape(
        fields, [block("attention beside Mamba-2", L, both, network, norms=2 * D)], final=D, heads=(n, G, d),
        intermediate=F,
    )  # fmt: skip


def recurrent_gemma(fields: Fields) -> BlockShape:
    """Reads RecurrentGemma: two layers of a gated linear recurrence for each one of attention within a window."""
    D, L, F = fields.size("hidden_size"), fields.size("num_hidden_layers"), fields.size("intermediate_size") // 2
    n = fields.heads()
    G, d = fields.size("num_key_value_heads", n), D // n
    width, kernel = fields.size("lru_width", D), fields.size("conv1d_width", 4)
    fields.must_be("head_dim", (d,), d)
    cycle = fields.get("block_types", ["recurrent", "recurrent", "attention"])
    if not isinstance(cycle, list) or not cycle or set(map(str, cycle)) - {"recurrent", "attention"} or width % n:
        raise ConfigError(
            f"block_types={shown(cycle)} with lru_width={width}",
            "a list of recurrent and attention, and a width that the heads divide",
            "correct the file",
        )
    near = sum(cycle[index % len(cycle)] == "attention" for index in range(L))
    attention = Attention(D, n, G, d, D + ((n + 2 * G) * d if fields.flag("attention_bias") else 0))
    recurrence = {
        "matrices": 3 * D * width + width * kernel + 2 * width * (width // n),
        "small": 2 * width + D + width + 3 * width,
        "scan": 2 * width,
        "state": width + width * (kernel - 1),
        "wide": 4 * width,
    }
    network = gated(D, F, 2 * F + D)
    window = fields.size("attention_window_size", 2048)
    return shape(
        fields,
        [
            block("attention", near, attention.fields, network, norms=2 * D, window=window),
            block("linear recurrence", L - near, recurrence, network, norms=2 * D),
        ],
        tied=True, final=D, heads=(n, G, d), intermediate=2 * F,
    )  # fmt: skip


def phi4flash(fields: Fields) -> BlockShape:
    """Reads Phi-4-mini-flash: V1 within windows and Mamba-1, then layers that read one cache and one memory.

    Even layers are Mamba-1 up to the middle, then gated memory units; odd ones are V1, the last of them in the first
    half without a window, and those behind it make queries alone and read its keys and values.
    """
    D, L, F = fields.size("hidden_size"), fields.size("num_hidden_layers"), fields.size("intermediate_size")
    n = fields.heads()
    G, d = fields.size("num_key_value_heads", n), D // n
    fields.must_be("mb_per_layer", (2,), 2)
    fields.must_be("mlp_bias", (False,), False)
    fields.must_be("lm_head_bias", (False,), False)
    fields.must_be("head_dim", (d,), d)
    if L % 4 or n % 2 or G % 2:
        raise ConfigError(
            f"{L} layers with {n} heads and {G} key/value heads",
            "layers in fours, and heads in pairs, as V1 joins them",
            "correct the file",
        )
    window = fields.get("sliding_window", 512)
    if isinstance(window, list):
        # One for each layer, as older files have it.
        window = next((each for each in window if each is not None), 512)
    inner, states = fields.size("mamba_expand", 2) * D, fields.size("mamba_d_state", 16)
    kernel, given = fields.size("mamba_d_conv", 4), fields.get("mamba_dt_rank", "auto")
    rank = math.ceil(D / 16) if given == "auto" else fields.size("mamba_dt_rank")
    mamba = {
        "matrices": 2 * D * inner + inner * kernel + inner * (rank + 2 * states) + rank * inner + inner * D,
        "small": inner * states + 3 * inner,
        "scan": 3 * inner * states,
        "state": inner * states + inner * (kernel - 1),
        "wide": 5 * inner,
    }
    memory = {"matrices": 2 * D * inner, "wide": 3 * inner}
    own = Attention(D, n, G, d).fields
    # λ's four vectors and the gain of the heads' norm; biases of all projections. Values of two heads meet both maps.
    lambdas = 4 * d + 2 * d
    own |= {"small": (n + 2 * G) * d + D + lambdas, "executed_pairs": 3 * n * d}
    cross = own | {"matrices": 2 * D * n * d, "small": n * d + D + lambdas, "kept": 0}
    network = gated(D, F)
    more = {"norms": 4 * D}
    return shape(
        fields,
        [
            block("V1", L // 4, own, network, window=_window(window), **more),
            block("V1 whose keys and values later layers read", 1, own, network, **more),
            block("V1 that reads them", L // 4 - 1, cross, network, **more),
            block("Mamba-1", L // 4 + 1, mamba, network, **more),
            block("gated memory unit", L // 4 - 1, memory, network, **more),
        ],
        tied=True, final=2 * D, heads=(n, G, d), intermediate=F,
    )  # fmt: skip


def _window(value: object) -> int:
    return Fields({"sliding_window": value}).size("sliding_window")
