"""Decoders whose feed-forward network has two matrices: GPT-2, GPT-NeoX, Phi, StarCoder2 and Nemotron."""

from __future__ import annotations

from diffattn.plan.blocks.block import BlockShape
from diffattn.plan.blocks.fields import Fields
from diffattn.plan.blocks.parts import Attention, biases, block, plain, shape


def gpt2(fields: Fields) -> BlockShape:
    """Reads GPT-2: learned positions, biases everywhere, a tied output head."""
    D, L = fields.size("n_embd", 768), fields.size("n_layer", 12)
    n, F = fields.heads("n_head", "n_embd"), fields.size("n_inner", 4 * D)
    positions = fields.size("n_positions", 1024)
    fields.must_be("add_cross_attention", (False,), False)
    attention = Attention(D, n, n, D // n, bias=4 * D)
    return shape(
        fields, [block("attention", L, attention.fields, plain(D, F, bias=True), norms=4 * D)], tied=True, final=2 * D,
        heads=(n, n, D // n), intermediate=F, extras=(("embedding", "learned positions", positions * D),),
        hidden="n_embd", layers="n_layer", positions="n_positions",
    )  # fmt: skip


def gpt_neox(fields: Fields) -> BlockShape:
    """Reads GPT-NeoX, such as Pythia: biases, two norms with biases."""
    D, L, F = fields.size("hidden_size"), fields.size("num_hidden_layers"), fields.size("intermediate_size")
    n = fields.heads()
    fields.must_be("num_key_value_heads", (n,), n)
    attention = Attention(D, n, n, D // n)
    attention = Attention(D, n, n, D // n, biases(fields, attention, default=True))
    return shape(
        fields, [block("attention", L, attention.fields, plain(D, F, bias=True), norms=4 * D)], final=2 * D,
        heads=(n, n, D // n), intermediate=F,
    )  # fmt: skip


def phi(fields: Fields) -> BlockShape:
    """Reads Phi-1 to Phi-2: one norm for attention and the network beside it, an output head with a bias."""
    D, L, F = fields.size("hidden_size"), fields.size("num_hidden_layers"), fields.size("intermediate_size")
    n = fields.heads()
    G, d = fields.size("num_key_value_heads", n), D // n
    normed = 4 * d if fields.flag("qk_layernorm") else 0
    attention = Attention(D, n, G, d, (n + 2 * G) * d + D)
    return shape(
        fields, [block("attention", L, attention.fields, plain(D, F, bias=True), norms=2 * D + normed)], final=2 * D,
        heads=(n, G, d), intermediate=F,
        extras=(("lm_head", "the bias of the output head", fields.size("vocab_size")),),
    )  # fmt: skip


def starcoder2(fields: Fields) -> BlockShape:
    """Reads StarCoder2: norms with biases, all layers with a window where the file has one."""
    D, L, F = fields.size("hidden_size"), fields.size("num_hidden_layers"), fields.size("intermediate_size")
    n = fields.heads()
    G, d, bias = fields.size("num_key_value_heads", 2), D // n, fields.flag("use_bias", True)
    window = fields.size("sliding_window") if fields.get("sliding_window") is not None else None
    fields.must_be("mlp_type", ("default",), "default")
    fields.must_be("norm_type", ("layer_norm",), "layer_norm")
    attention = Attention(D, n, G, d)
    attention = Attention(D, n, G, d, biases(fields, attention, default=True, key="use_bias"))
    return shape(
        fields, [block("attention", L, attention.fields, plain(D, F, bias=bias), norms=4 * D, window=window)],
        tied=True, final=2 * D, heads=(n, G, d), intermediate=F,
    )  # fmt: skip


def nemotron(fields: Fields) -> BlockShape:
    """Reads Nemotron and Minitron: norms with biases, squared ReLU."""
    D, L, F = fields.size("hidden_size"), fields.size("num_hidden_layers"), fields.size("intermediate_size")
    n = fields.heads()
    G, d = fields.size("num_key_value_heads", n), fields.size("head_dim", max(1, D // n))
    attention = Attention(D, n, G, d)
    attention = Attention(D, n, G, d, biases(fields, attention))
    network = plain(D, F, bias=fields.flag("mlp_bias"))
    return shape(
        fields, [block("attention", L, attention.fields, network, norms=4 * D)], final=2 * D, heads=(n, G, d),
        intermediate=F,
    )  # fmt: skip
