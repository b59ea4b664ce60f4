"""Decoders with experts: Mixtral, Qwen2 and Qwen3 MoE, gpt-oss, DeepSeek V2 and V3."""

from __future__ import annotations

from collections.abc import Callable

from diffattn.config_fields import is_whole, shown
from diffattn.errors import ConfigError
from diffattn.plan.blocks.block import Block, BlockShape
from diffattn.plan.blocks.fields import Fields
from diffattn.plan.blocks.parts import FULL, SLIDING, Attention, biases, block, gated, routed, shape

FURTHER = "a layer that predicts further tokens, which generation leaves out"


def sparse_layers(fields: Fields, layers: int) -> int:
    """Returns the layers that have experts, by Qwen's two fields.

    Raises:
        ConfigError: ``mlp_only_layers`` that is no list of layers.
    """
    step, dense = fields.size("decoder_sparse_step", 1), fields.get("mlp_only_layers", [])
    if not isinstance(dense, list) or any(not is_whole(each) or not 0 <= each < layers for each in dense):
        raise ConfigError(
            f"mlp_only_layers={shown(dense)}", f"a list of layers, from 0 to {layers - 1}", "correct the file"
        )
    return sum((index + 1) % step == 0 and index not in dense for index in range(layers))


def mixtral(fields: Fields) -> BlockShape:
    """Reads Mixtral: every layer has experts, and all layers have a window where the file has one."""
    D, L, F = fields.size("hidden_size"), fields.size("num_hidden_layers"), fields.size("intermediate_size")
    n = fields.heads()
    G, d = fields.size("num_key_value_heads", 8), fields.size("head_dim", max(1, D // n))
    window = fields.size("sliding_window") if fields.get("sliding_window") is not None else None
    network = routed(D, F, experts=fields.size("num_local_experts", 8), chosen=fields.size("num_experts_per_tok", 2))
    attention = Attention(D, n, G, d)
    return shape(
        fields, [block("attention with experts", L, attention.fields, network, norms=2 * D, window=window)], final=D,
        heads=(n, G, d), intermediate=F,
    )  # fmt: skip


def qwen3_moe(fields: Fields) -> BlockShape:
    """Reads Qwen3 MoE: norms of queries and keys, experts in all layers but those that the file names."""
    D, L, F = fields.size("hidden_size"), fields.size("num_hidden_layers"), fields.size("intermediate_size", 6144)
    n = fields.heads()
    G, d = fields.size("num_key_value_heads", 4), fields.size("head_dim", max(1, D // n))
    fields.must_be("use_sliding_window", (False,), False)
    fields.read |= {"sliding_window", "max_window_layers"}
    experts = fields.size("num_experts", fields.count("num_local_experts") or 128)
    network = routed(
        D, fields.size("moe_intermediate_size", 768), experts=experts, chosen=fields.size("num_experts_per_tok", 8)
    )
    attention = Attention(D, n, G, d)
    attention = Attention(D, n, G, d, biases(fields, attention))
    sparse = sparse_layers(fields, L)
    return shape(
        fields,
        [
            block("attention with experts", sparse, attention.fields, network, norms=2 * D + 2 * d),
            block("attention", L - sparse, attention.fields, gated(D, F), norms=2 * D + 2 * d),
        ],
        final=D,
        heads=(n, G, d),
        intermediate=F,
    )


def shared_and_routed(fields: Fields, D: int, *, width: int, chosen: int, experts: int, shared: int) -> dict[str, int]:
    """Returns Qwen's experts with a shared one, whose result is multiplied by a gate of one number."""
    own = fields.size("shared_expert_intermediate_size", shared)
    return routed(
        D, fields.size("moe_intermediate_size", width), experts=fields.size("num_experts", experts),
        chosen=fields.size("num_experts_per_tok", chosen), shared=3 * D * own + D,
    )  # fmt: skip


def qwen2_moe(fields: Fields) -> BlockShape:
    """Reads Qwen1.5 and Qwen2 MoE: biases of queries, keys and values, a shared expert."""
    D, L, F = fields.size("hidden_size"), fields.size("num_hidden_layers"), fields.size("intermediate_size", 5632)
    n = fields.heads()
    G, d = fields.size("num_key_value_heads", 16), D // n
    fields.must_be("use_sliding_window", (False,), False)
    fields.layer_types(L, (FULL,), [FULL] * L)
    fields.read |= {"sliding_window", "max_window_layers"}
    bias = (n + 2 * G) * d if fields.flag("qkv_bias", True) else 0
    network = shared_and_routed(fields, D, width=1408, chosen=4, experts=60, shared=5632)
    attention = Attention(D, n, G, d, bias)
    sparse = sparse_layers(fields, L)
    return shape(
        fields,
        [
            block("attention with experts", sparse, attention.fields, network, norms=2 * D),
            block("attention", L - sparse, attention.fields, gated(D, F), norms=2 * D),
        ],
        final=D,
        heads=(n, G, d),
        intermediate=F,
    )


def gpt_oss(fields: Fields) -> BlockShape:
    """Reads gpt-oss: biases everywhere, a sink for each head, every other layer with a window."""
    D, L, F = fields.size("hidden_size"), fields.size("num_hidden_layers"), fields.size("intermediate_size")
    n, G, d = fields.heads(), fields.size("num_key_value_heads", 8), fields.size("head_dim", 64)
    types = fields.layer_types(L, (FULL, SLIDING), [FULL if index % 2 else SLIDING for index in range(L)])
    experts = fields.size("num_local_experts", fields.count("num_experts") or 128)
    chosen = fields.size("num_experts_per_tok", fields.count("experts_per_token") or 4)
    network = routed(D, F, experts=experts, chosen=chosen, small=experts) | {"expert_small": 2 * F + D}
    attention = Attention(D, n, G, d)
    attention = Attention(D, n, G, d, biases(fields, attention, default=True) + n)
    window, near = fields.size("sliding_window", 128), types.count(SLIDING)
    return shape(
        fields,
        [
            block("attention with experts", L - near, attention.fields, network, norms=2 * D),
            block("attention with experts", near, attention.fields, network, norms=2 * D, window=window),
        ],
        final=D,
        heads=(n, G, d),
        intermediate=F,
    )


def latent_attention(
    fields: Fields, D: int, n: int, *, ranks: tuple[int | None, int], nope: int, rope: int, values: int
) -> dict[str, int]:
    """Returns attention over latent keys and values, of which the cache keeps the latents and one rotated key.

    A prompt's keys and values are made of its latents; a decoded token reads the latents themselves, with the matrix
    that makes keys multiplied into its query, and that of values into the result.
    """
    of_queries, of_keys = ranks
    bias = fields.flag("attention_bias")
    wide = n * (nope + rope)
    queries = D * wide if of_queries is None else D * of_queries + of_queries * wide
    small = of_keys + (0 if of_queries is None else of_queries)
    if bias:
        small += of_keys + rope + D + (0 if of_queries is None else of_queries)
    return {
        "matrices": queries + D * (of_keys + rope) + of_keys * n * (nope + values) + n * values * D,
        "small": small,
        "pairs": n * (nope + rope + values),
        "decoding_pairs": n * (2 * of_keys + rope),
        "kept": of_keys + rope,
        "wide": 2 * wide + 2 * n * values,
    }


def _deepseek(defaults: dict[str, int], further: str | None) -> Callable[[Fields], BlockShape]:
    """Returns the reader of one version of DeepSeek's files."""

    def read(fields: Fields) -> BlockShape:
        D, L, F = fields.size("hidden_size"), fields.size("num_hidden_layers"), fields.size("intermediate_size")
        n = fields.size("num_attention_heads")
        fields.must_be("num_key_value_heads", (n,), n)
        fields.must_be("moe_layer_freq", (1,), 1)
        fields.must_be("mlp_bias", (False,), False)
        rank = fields.size("q_lora_rank", 1536) if fields.values.get("q_lora_rank", 1536) is not None else None
        nope, rope = fields.size("qk_nope_head_dim", 128), fields.size("qk_rope_head_dim", 64)
        values = fields.size("v_head_dim", 128)
        # The library calls the rotated part of a head its width, others the whole.
        fields.must_be("head_dim", (rope, nope + rope), rope)
        attention = latent_attention(
            fields, D, n, ranks=(rank, fields.size("kv_lora_rank", 512)), nope=nope, rope=rope, values=values
        )
        width = fields.size("moe_intermediate_size", defaults["width"])
        network = routed(
            D, width, experts=fields.size("n_routed_experts", defaults["experts"]),
            chosen=fields.size("num_experts_per_tok", defaults["chosen"]),
            shared=3 * D * width * fields.count("n_shared_experts", defaults["shared"]),
        )  # fmt: skip
        dense = min(L, fields.count("first_k_dense_replace", defaults["dense"]))
        predicts = further is not None and fields.count(further, 0)
        blocks: list[Block] = [
            block("attention over latent keys", dense, attention, gated(D, F), norms=2 * D),
            block("attention over latent keys with experts", L - dense, attention, network, norms=2 * D),
        ]
        return shape(
            fields, blocks, final=D, heads=(n, n, nope + rope), intermediate=F, unplanned=(FURTHER,) if predicts else ()
        )

    return read


deepseek_v2 = _deepseek({"width": 1407, "experts": 64, "chosen": 6, "shared": 2, "dense": 0}, None)
deepseek_v3 = _deepseek(
    {"width": 2048, "experts": 256, "chosen": 8, "shared": 1, "dense": 3}, "num_nextn_predict_layers"
)
