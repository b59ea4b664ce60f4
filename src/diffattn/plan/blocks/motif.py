"""Motif 3: grouped differential attention over latent keys and values, windows, experts, four residual streams."""

from __future__ import annotations

from diffattn.errors import ConfigError
from diffattn.plan.blocks.block import BlockShape
from diffattn.plan.blocks.experts import FURTHER
from diffattn.plan.blocks.fields import Fields
from diffattn.plan.blocks.parts import block, gated, routed, shape

# PolyNorm's three weights and its bias.
POLYNORM = 4
_KIND = "grouped differential attention over latent keys"


def motif3(fields: Fields) -> BlockShape:
    """Reads Motif 3.

    Raises:
        ConfigError: noise heads that do not divide the others, widths that contradict each other, or another attention.
    """
    D, L, F = fields.size("hidden_size"), fields.size("num_hidden_layers"), fields.size("intermediate_size")
    n, G, noise = fields.size("num_attention_heads"), fields.size("num_key_value_heads"), fields.size("num_noise_heads")
    fields.must_be("attention_cls", ("gdla",), "gdla")
    fields.must_be("diff_v2", (True,), True)
    fields.must_be("hidden_act", ("poly_norm",), "poly_norm")
    fields.must_be("interleave_moe_layer_step", (1,), 1)
    fields.must_be("num_shared_experts", (1,), 1)
    if noise >= n or (n - noise) % noise or noise != G:
        raise ConfigError(
            f"num_attention_heads={n}, num_noise_heads={noise} and num_key_value_heads={G}",
            "as many signal heads for each noise head, and a noise head for each key/value head",
            "correct the file",
        )
    d, rope, values = fields.size("head_dim"), fields.size("qk_rope_head_dim"), fields.size("v_head_dim")
    if rope >= d:
        raise ConfigError(f"qk_rope_head_dim={rope} with head_dim={d}", "a part of the head", "correct the file")
    q_rank, rank, signals = fields.size("q_lora_rank"), fields.size("kv_lora_rank"), n - noise
    gate = fields.flag("elementwise_attn_output_gate", True)
    streams = fields.size("mhc_expansion_rate", 4) if fields.flag("mhc_enabled", False) else 0
    # How the streams are mixed before and after attention and the network: a norm, a matrix, and what is added.
    mixes = 2 * streams + streams * streams
    attention = {
        "matrices": D * (q_rank + rank + rope + signals) + q_rank * n * d + rank * G * (d - rope + values)
        + signals * values * D + (q_rank * signals * values if gate else 0),
        "small": 0,
        "pairs": n * d + signals * values,
        "executed_pairs": n * (d + values),
        "decoding_pairs": n * (2 * rank + rope),
        "kept": rank + rope,
        "wide": 2 * n * d + 2 * signals * values,
    }  # fmt: skip
    mixing = 2 * mixes * streams * D
    held = dict(attention)
    held["matrices"] += mixing
    held["small"] += 2 * (mixes + 3 + streams * D) if streams else 0
    norms = 2 * D + q_rank + rank
    experts, width = fields.size("num_experts"), fields.size("moe_intermediate_size")
    network = routed(
        D, width, experts=experts, chosen=fields.size("experts_top_k"), shared=3 * D * width, small=experts + POLYNORM
    ) | {"expert_small": POLYNORM}
    dense = min(L, fields.count("n_dense_first_layers"))
    period = fields.size("sliding_window_period", 4)
    windowed = fields.flag("use_sliding_window", True) and fields.get("sliding_window") is not None
    # A token sees as many tokens before it as the field says.
    window = fields.size("sliding_window") + 1 if windowed else None
    blocks = []
    for kind, its_layers, its_network in (
        (_KIND, range(dense), gated(D, F, POLYNORM)), (f"{_KIND} with experts", range(dense, L), network)
    ):  # fmt: skip
        whole = sum(index % period == 0 for index in its_layers) if windowed else len(its_layers)
        blocks.append(block(kind, whole, held, its_network, norms=norms))
        blocks.append(block(kind, len(its_layers) - whole, held, its_network, norms=norms, window=window))
    predicting = fields.count("num_nextn_predict_layers") * (
        attention["matrices"] + 3 * D * F + POLYNORM + norms + 2 * D + 2 * D * D
    )
    fields.read |= {"swa_rope_theta", "original_seq_len", "rope_factor", "mscale"}
    return shape(
        fields, blocks, final=D, heads=(n, G, d), intermediate=F,
        extras=(("feed_forward", FURTHER, predicting),) if predicting else (), unread=predicting,
    )  # fmt: skip
