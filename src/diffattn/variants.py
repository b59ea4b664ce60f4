"""The record of each attention variant: the one place that says what a variant is, for every room that asks.

A new variant is a record here and a layer in ``model/attention.py``. Letters: D is the hidden size, n, G and d are the
query heads, the key/value heads and the width of the softmax Transformer that is replaced, H counts the output heads of
a layer (the rows of λ) and V is the width of one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, NamedTuple, Protocol

from diffattn.attention_flops import ONE_MAP, V1_MORE, V1_PAIRS, V1_SHARED, V2_PAIRS, V2_SHARED, Form, Shared

Axis = Literal["D", "d", "H", "V", "HV"]


class Sizes(Protocol):
    """The numbers that a variant needs of the softmax Transformer that it replaces; a ``ModelShape`` has them."""

    @property
    def hidden_size(self) -> int:
        """The width D of the residual stream."""

    @property
    def num_heads(self) -> int:
        """The query heads n."""

    @property
    def num_kv_heads(self) -> int:
        """The key/value heads G."""

    @property
    def head_dim(self) -> int:
        """The width d of a head."""

    @property
    def signals_per_noise(self) -> int | None:
        """The signal heads r that share a noise head, where a variant shares them; None: n / G."""


class Heads(NamedTuple):
    """The heads of one attention call: of the call that a variant makes, or of the softmax call that it replaces."""

    queries: int
    groups: int
    width: int


class Look(NamedTuple):
    """The look of a variant in charts: either its colour or its line and mark alone tell it from the others.

    Attributes:
        colour: on a light page, as ``#rrggbb``; Okabe and Ito's set, safe for the colour-blind.
        dark_colour: the same hue on a dark page.
        dash: lengths of the line's strokes and gaps in pixels; empty for a solid line.
        mark: the shape of a point, by Vega's names.
    """

    colour: str
    dark_colour: str
    dash: tuple[float, ...]
    mark: str


@dataclass(frozen=True, kw_only=True)
class OwnTensor:
    """A tensor that each layer of a variant has and softmax attention has not.

    Attributes:
        name: its name below ``self_attn.`` in a checkpoint.
        axes: the letters of its shape; ``HV`` is H·V. A tensor that ends in D is a matrix that reads hidden states.
        split: whether tensor parallelism gives each rank a part of its rows; otherwise every rank holds all of it.
        float32: whether it stays float32 when the model around it is cast.
        trained: whether it is a parameter; otherwise it is a buffer.
        unless: a field of the configuration and the value with which a model does without the tensor.
    """

    name: str
    axes: tuple[Axis, ...]
    split: bool = False
    float32: bool = False
    trained: bool = True
    unless: tuple[str, str] | None = None

    def shape(self, *, D: int, d: int, H: int, V: int) -> tuple[int, ...]:
        """Returns its shape, with H the output heads that have it."""
        sizes: dict[Axis, int] = {"D": D, "d": d, "H": H, "V": V, "HV": H * V}
        return tuple(sizes[axis] for axis in self.axes)

    def exists(self, switches: Mapping[str, object]) -> bool:
        """Tells whether a model with these fields in its configuration has the tensor."""
        return self.unless is None or switches.get(self.unless[0]) != self.unless[1]

    @property
    def reads_hidden_states(self) -> bool:
        """True where the hidden states are multiplied by it."""
        return self.axes[-1:] == ("D",)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The record of a variant: all that distinguishes it from softmax attention.

    Attributes:
        name: the value of the configuration's field ``attention``.
        title: its name for a reader.
        source: the paper or post that defines it.
        summary: what it changes, as the list of a ladder's arms says it.
        query_factor: query heads of the one call for each softmax head.
        join: softmax heads that lie side by side in one head of the call's keys and values, and in an output head.
        maps: softmax maps of one output head; where they are two, the query heads of the call are groups of signal
            heads and, behind them, the noise head whose map is subtracted: pairs, where noise heads are not shared.
        shares_noise: whether several signal heads may share a noise head; the shape says how many.
        weights: what its output heads are combined with: nothing, one λ per layer, one λ per token and head, or a gate
            per token and channel.
        subtracts: what is subtracted, in words; empty where nothing is.
        norm: whether each output head passes an RMSNorm, unless the configuration's ``head_norm`` says otherwise.
        takes_norm: whether ``head_norm=True`` is possible.
        fitted_to: the variant whose pretrained models it is fitted to, and whose plan is its own; None for a variant
            that is trained from its start.
        chosen_heads: whether ``dex_heads`` of the configuration says which heads have its own tensors.
        switches: the fields of the configuration that it alone has, with their published values.
        tensors: the tensors of its own.
        flops: for each backend that it has, the FLOPs of attention by pass, where noise heads are not shared.
            ``definition`` is the arithmetic of the formula, which a model's FLOPs are counted by.
        shared_flops: the FLOPs of its signal heads, and of as many noise heads, where noise heads are shared.
        look: how charts draw it.
    """

    name: str
    title: str
    source: str
    summary: str
    query_factor: int = 1
    join: int = 1
    maps: int = 1
    shares_noise: bool = False
    weights: Literal["none", "layer", "head", "channel"] = "none"
    subtracts: str = ""
    norm: bool = False
    takes_norm: bool = True
    fitted_to: str | None = None
    chosen_heads: bool = False
    switches: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    tensors: tuple[OwnTensor, ...] = ()
    flops: Mapping[str, Form]
    shared_flops: Shared = field(default_factory=lambda: MappingProxyType({}))
    look: Look

    def heads(self, shape: Sizes) -> Heads:
        """Returns the heads of the one call, as every engine and tensor parallelism see them.

        Its result has one row per query head, as wide as the call's values.
        """
        queries = self.output_heads(shape) + self.noise_heads(shape)
        return Heads(queries, shape.num_kv_heads // self.join, self.join * shape.head_dim)

    def replaced(self, call: Heads, noise_heads: int | None = None) -> Heads:
        """Returns n, G and d of the softmax Transformer whose variant makes this call: the inverse of ``heads``.

        ``noise_heads`` is needed where they may be shared.
        """
        outputs = call.queries // self.maps if noise_heads is None else call.queries - noise_heads
        return Heads(outputs * self.maps // self.query_factor, call.groups * self.join, call.width // self.join)

    def output_heads(self, shape: Sizes) -> int:
        """Returns H, the output heads of a layer."""
        return self.query_factor * shape.num_heads // self.maps

    def signals_per_noise(self, shape: Sizes) -> int:
        """Returns r, the signal heads of a noise head; 1 where they are not shared."""
        return (shape.signals_per_noise or shape.num_heads // shape.num_kv_heads) if self.shares_noise else 1

    def noise_heads(self, shape: Sizes) -> int:
        """Returns the query heads of the call whose maps are subtracted."""
        return self.output_heads(shape) // self.signals_per_noise(shape) if self.maps > 1 else 0

    def query_width(self, shape: Sizes) -> int:
        """Returns the rows of the query projection, which are the widths of all queries before any padding."""
        return self.heads(shape).queries * shape.head_dim

    def forms(self, shape: Sizes) -> Mapping[str, Form]:
        """Returns the FLOPs of attention by backend and pass for a model of this shape."""
        shared = self.signals_per_noise(shape)
        if shared == 1:
            return self.flops
        return {name: signal.beside(noise, shared) for name, (signal, noise) in self.shared_flops.items()}

    @property
    def pads_queries(self) -> bool:
        """True where the standard call's queries are half zeros, so that each one meets its own half of a key."""
        return self.join > 1

    @property
    def gated(self) -> bool:
        """True where the call's result is multiplied by a gate."""
        return self.weights == "channel"

    @property
    def readers(self) -> int:
        """The number of products that read the normed input of attention: those of q, k and v, and its own."""
        return 3 + sum(tensor.reads_hidden_states for tensor in self.tensors)

    @property
    def own_parameters(self) -> int:
        """The number of parameter tensors that a layer has and softmax attention has not."""
        return sum(tensor.trained for tensor in self.tensors) + self.norm

    def matrix_parameters(self, shape: Sizes, **switches: object) -> int:
        """Counts what a layer has beyond softmax attention in products with the hidden states; below 0 if it has less.

        Args:
            shape: the sizes of the softmax Transformer.
            switches: fields of the configuration that are not as published, such as ``lambda_form``.
        """
        matrices = [tensor for tensor in self.tensors if tensor.reads_hidden_states]
        queries = (self.query_width(shape) - shape.num_heads * shape.head_dim) * shape.hidden_size
        return queries + self._count(shape, matrices, switches)

    def small_parameters(
        self, shape: Sizes, *, head_norm: bool | None = None, subln_affine: bool = True, **switches: object
    ) -> int:
        """Counts what a layer has beyond softmax attention beside those matrices: λ vectors and the gain of its norm.

        Autocast leaves these as they are.

        Args:
            shape: the sizes of the softmax Transformer.
            head_norm: whether output heads pass a norm; None for the variant's own.
            subln_affine: whether that norm has a gain.
            switches: further fields of the configuration that are not as published.
        """
        others = [tensor for tensor in self.tensors if tensor.trained and not tensor.reads_hidden_states]
        gain = (self.norm if head_norm is None else head_norm) and subln_affine
        return self._count(shape, others, switches) + (self.heads(shape).width if gain else 0)

    def float32_parameters(self, shape: Sizes) -> int:
        """Counts the parameters of a layer that stay float32 whatever the dtype of the model is."""
        return self._count(shape, [tensor for tensor in self.tensors if tensor.trained and tensor.float32], {})

    def _count(self, shape: Sizes, tensors: list[OwnTensor], switches: Mapping[str, object]) -> int:
        D, d, H, V = shape.hidden_size, shape.head_dim, self.output_heads(shape), self.heads(shape).width
        there = [tensor for tensor in tensors if tensor.exists(switches)]
        return sum(math.prod(tensor.shape(D=D, d=d, H=H, V=V)) for tensor in there)


_V1_LAMBDA = tuple(
    OwnTensor(name=f"lam.lambda_{which}", axes=("d",), float32=True) for which in ("q1", "k1", "q2", "k2")
)
_V2_LAMBDA = (OwnTensor(name="lambda_proj.weight", axes=("H", "D"), split=True, unless=("lambda_form", "one")),)

_RECORDS = (
    Variant(
        name="softmax",
        title="softmax attention",
        source="arXiv 1706.03762",
        summary="the Transformer that is replaced",
        flops=ONE_MAP,
        look=Look("#222222", "#e6e9ed", (), "circle"),
    ),
    Variant(
        name="diff_v1",
        title="Differential attention V1",
        source="arXiv 2410.05258",
        summary="differential attention V1",
        join=2,
        maps=2,
        weights="layer",
        subtracts="λ times the map of the second head of each pair",
        norm=True,
        tensors=_V1_LAMBDA,
        flops=V1_PAIRS | V1_MORE,
        look=Look("#0072B2", "#56b4e9", (5, 2), "square"),
    ),
    Variant(
        name="diff_v2",
        title="Differential attention V2",
        source='"Differential Transformer V2", 20 January 2026',
        summary="differential attention V2, a narrower feed-forward network",
        query_factor=2,
        maps=2,
        weights="head",
        subtracts="sigmoid(λ) times the map of the second query of each head",
        switches=MappingProxyType({"lambda_form": "sigmoid", "pairs_share_group": True}),
        tensors=_V2_LAMBDA,
        # Its widths are equal, so the form of unequal ones is the standard call.
        flops=V2_PAIRS | {"unequal": V2_PAIRS["standard"]},
        look=Look("#D55E00", "#ff9e4a", (6, 2, 1.5, 2), "triangle-up"),
    ),
    Variant(
        name="diff_gda",
        title="grouped differential attention",
        source="arXiv 2510.06949",
        summary="V1 whose signal heads share noise heads, a wider feed-forward network",
        join=2,
        maps=2,
        shares_noise=True,
        weights="layer",
        subtracts="λ times the map of the noise head of each group of signal heads",
        norm=True,
        tensors=_V1_LAMBDA,
        flops=V1_PAIRS,
        shared_flops=V1_SHARED,
        look=Look("#CC79A7", "#f0a6d2", (8, 2, 2, 2, 2, 2), "cross"),
    ),
    Variant(
        name="diff_gda_v2",
        title="grouped differential attention V2",
        source="arXiv 2510.06949 with the rule of V2",
        summary="V2 whose signal heads share noise heads, a narrower feed-forward network",
        query_factor=2,
        maps=2,
        shares_noise=True,
        weights="head",
        subtracts="sigmoid(λ) times the map of the noise head of each group of signal heads",
        switches=MappingProxyType({"lambda_form": "sigmoid"}),
        tensors=_V2_LAMBDA,
        flops=V2_PAIRS,
        shared_flops=V2_SHARED,
        look=Look("#7a6000", "#e3c64b", (12, 2), "triangle-left"),
    ),
    Variant(
        name="gated",
        title="gated attention",
        source="arXiv 2505.06708",
        summary="sigmoid(x W_g) ⊙ attention, a narrower feed-forward network",
        weights="channel",
        takes_norm=False,
        tensors=(OwnTensor(name="g_proj.weight", axes=("HV", "D"), split=True),),
        flops=ONE_MAP,
        look=Look("#009E73", "#3ddba4", (1.5, 1.5), "triangle-down"),
    ),
    Variant(
        name="dex",
        title="DEX",
        source="arXiv 2505.16333",
        summary="a pretrained softmax model that learns to subtract a projection of its heads' outputs",
        subtracts="λ times a projection of the head's own output",
        takes_norm=False,
        fitted_to="softmax",
        chosen_heads=True,
        tensors=(
            OwnTensor(name="dex.weight", axes=("H", "d", "d"), float32=True),
            OwnTensor(name="dex.lam", axes=("H",), float32=True),
            OwnTensor(name="dex.annealed", axes=(), float32=True, trained=False),
        ),
        flops=ONE_MAP,
        look=Look("#6a3d9a", "#c9a6f0", (9, 3), "diamond"),
    ),
)

ATTENTIONS: dict[str, Variant] = {record.name: record for record in _RECORDS}
"""Every variant by its name."""
VARIANTS: dict[str, Variant] = {name: record for name, record in ATTENTIONS.items() if record.fitted_to is None}
"""The variants that a shape can be planned and trained as, in the order in which they are shown."""
BASELINE = "softmax"
"""The variant that the others replace: the twin of every pair."""
DEFAULT = "diff_v1"
"""The variant that is meant where none is named."""
DEFAULT_VARIANTS = (BASELINE, DEFAULT, "diff_v2")
"""The variants that a comparison trains unless others are asked for."""


def own_modules() -> tuple[str, ...]:
    """Returns the modules of a layer's attention that hold the variants' own tensors, by their names.

    >>> own_modules()
    ('lam', 'lambda_proj', 'g_proj', 'dex')
    """
    return tuple(dict.fromkeys(t.name.split(".")[0] for record in ATTENTIONS.values() for t in record.tensors))
