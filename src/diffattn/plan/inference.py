"""The bytes that prefill and decoding hold where the peak may lie. Letters as in ``activations.py``."""

from __future__ import annotations

from dataclasses import dataclass

from diffattn.plan.activations import FUSED, resolve
from diffattn.plan.cost import ByKind, bytes_of, count_parameters, float32_parameters
from diffattn.plan.setting import BYTES, Setting
from diffattn.plan.shape import ModelShape
from diffattn.variants import VARIANTS

# The fewest keys of a span, and the most spans of a call, as ``diffattn.ops.triton.configs`` cuts the keys; a test
# compares.
LEAST_SPAN, MOST_SPANS = 64, 128


@dataclass(frozen=True)
class InferenceMemory(ByKind):
    """Bytes alive at the peak of prefill or of one decoding step, by kind.

    >>> InferenceMemory(1, 2, 3, 4, 5).total
    15
    """

    weights: int
    """Bytes of the parameters."""
    cache: int
    """Bytes of the keys and values of the context's tokens; in decoding those that a layer's window still needs."""
    activations: int
    """Bytes of the results of layers, at the widest place."""
    scores: int
    """Bytes of the maps that a backend writes out."""
    workspace: int
    """Bytes of autocast's copies of weights."""


class Inference:
    """The sizes that prefill and decoding share, and the bytes of both at each point at which the peak may lie."""

    def __init__(self, shape: ModelShape, attention: str, setting: Setting) -> None:
        setting = setting.for_model(shape, attention)
        dtypes = setting.precision
        self.shape, self.variant = shape, VARIANTS[attention]
        self.batch, self.context = setting.batch, setting.context
        self.backend = resolve(attention, setting.backend)
        self.size, self.autocast = int(BYTES[dtypes.activations]), dtypes.autocast
        counted = count_parameters(shape, attention)
        self.weights = bytes_of(counted.total, float32_parameters(shape, attention), dtypes.weights)
        small = counted.norms + self.variant.small_parameters(shape) * shape.num_layers
        # Autocast's copies, made on the way: those of the layers, and at the end that of the output projection.
        self.copies = 2 * (counted.non_embedding - small) if self.autocast else 0
        self.head_copy = 2 * shape.vocab_size * shape.hidden_size if self.autocast else 0
        self.keys = shape.num_kv_heads * shape.head_dim
        self.cache_bytes = BYTES[dtypes.cache]

    def cache(self, tokens: int) -> int:
        """Returns the bytes of the keys and values of that many tokens in every layer."""
        return int(2 * self.keys * self.shape.num_layers * tokens * self.cache_bytes)

    def kept(self) -> int:
        """Returns the bytes of the keys and values that are still needed behind the context: of a window, its own."""
        tokens = self.batch * self.shape.tokens_kept(self.context)
        return int(2 * self.keys * tokens * self.cache_bytes)

    def at(self, cache: int, activations: int, scores: int = 0, head: bool = False) -> InferenceMemory:
        """Returns the bytes at one point; ``head`` where the output projection is read there."""
        copies = self.copies + (self.head_copy if head else 0)
        return InferenceMemory(self.weights, cache, activations, scores, copies)

    def maps(self, queries: int, keys: int) -> int:
        """Returns the bytes of two float32 copies of the scores, or three in half precision, and of the mask."""
        N = self.variant.heads(self.shape).queries
        return self.batch * queries * keys * ((8 if self.size == 4 else 10) * N + self.size)

    def spread(self, keys: int) -> int:
        """Returns the bytes of keys and values repeated for every query head."""
        N, _, W = self.variant.heads(self.shape)
        return 2 * self.size * N * W * self.batch * keys if self.keys < N * W else 0

    def partial(self, keys: int) -> int:
        """Returns the bytes at most of what the Triton kernel's programs find for one query, each in a span of keys.

        Of the map of each query head: a part of the result in float32, its largest score and the sum.
        """
        spans = min(-(-keys // LEAST_SPAN), MOST_SPANS)
        return self.variant.heads(self.shape).queries * spans * 4 * (self.variant.heads(self.shape).width + 2)

    def prefill(self) -> list[InferenceMemory]:
        """Returns the bytes at each point of prefill at which the peak may lie.

        The keys and values of the whole prompt are there in every layer: a window of them is a view until the next
        token.
        """
        shape, variant, a = self.shape, self.variant, self.size
        tokens = self.batch * self.context
        D, F, keys, width = shape.hidden_size, shape.intermediate_size, self.keys, shape.num_heads * shape.head_dim
        N, _, W = variant.heads(shape)
        residual = normed = 4 if self.autocast else a
        rope = 2 * a * shape.head_dim * self.context * (2 if self.autocast else 1)
        queries = variant.query_width(shape)
        padded = variant.pads_queries and self.backend in ("standard", "materialised")
        cache, hidden = self.cache(tokens), (residual + normed) * D
        call = a * ((N * W if padded else queries) + 2 * keys)
        # It is made beside q, k and v, and waits for the call's result.
        gate = a * width if variant.gated else 0
        if variant.maps == 1 or self.backend in FUSED:
            # And the product with the gate.
            result = a * width + 2 * gate
        else:
            # The call's result, the difference, and in half precision its signal and noise parts, in float32.
            result = a * N * W + 4 * width + (0 if a == 4 else 4 * N * W)
        if variant.norm:
            # In the norm: x̂ and the result in float32, and the cast input.
            result = a * (width if self.backend in FUSED else N * W) + (8 if a == 4 else 12) * width
            result += 4 * width if self.backend not in FUSED and a == 4 else 0
        # Rotating the queries of the last layer, its combine step, its feed-forward layer; the final norm; the logits.
        found = [
            self.at(cache - cache // shape.num_layers, (hidden + a * (4 * queries + 2 * keys) + gate) * tokens + rope),
            self.at(cache, (hidden + call + result) * tokens + rope),
            self.at(cache, (residual * D + hidden + a * (D + 3 * F)) * tokens + rope),
            self.at(cache, (residual + 8 + (2 * a if residual < 4 else 0)) * D * tokens + rope),
            self.at(cache, normed * D * tokens + rope + a * shape.vocab_size * self.batch, head=True),
        ]
        if self.backend == "materialised":
            maps = self.maps(self.context, self.context)
            found.append(self.at(cache, (hidden + call + gate) * tokens + rope + self.spread(self.context), maps))
        return found

    def decoding(self) -> list[InferenceMemory]:
        """Returns the bytes at each point of a decoding step at which the peak may lie."""
        shape, a, B = self.shape, self.size, self.batch
        keys = self.context + 1
        new = self.cache(B)
        cache = self.kept()
        once_more = int(B * keys * self.keys * self.cache_bytes)
        small = 8 * a * B * (shape.hidden_size + shape.intermediate_size)
        found = [
            self.at(cache, new + small + once_more),
            self.at(cache, new + small + a * B * shape.vocab_size, head=True),
        ]
        if self.backend == "fused_triton":
            found.append(self.at(cache, new + small + B * self.partial(keys)))
        if self.backend == "materialised":
            found.append(self.at(cache, new + small + self.spread(keys), self.maps(1, keys)))
        return found
