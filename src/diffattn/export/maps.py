"""The outputs of an exported graph from which a program draws attention maps: queries and λ of chosen layers.

Maps of T × S numbers would be as much as all scores; queries are not, and the keys are outputs already, as a part of
the cache. For a layer N that was asked for::

    maps.N.query    (B, n, T, d)         queries of the new tokens, turned to their positions
    maps.N.lambda   (B, T, H) or (B, 1, H)   λ of each output head; not there in a model with one map
    present.N.key   (B, G, P + T, W)     keys of all tokens; those of V1, of width 2d, are [k1, k2]

n query heads stand in groups, signal heads before the noise head that they share: pairs (signal, noise), unless
``num_noise_heads`` says otherwise. Query head i meets key head ``i // (n / G)``. Under V1 a signal head meets k1, and a
noise head k2. A map is ``softmax(q kᵀ / √d)`` over the tokens that a query sees, and the subtraction
``signal − λ · noise``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from diffattn.config_fields import shown
from diffattn.errors import ConfigError, UnsupportedError
from diffattn.export.run import MAPS
from diffattn.model.attention import SoftmaxAttention
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.modeling import DiffTransformerForCausalLM


def layers_of(text: str | None, count: int) -> tuple[int, ...]:
    """Returns the layers that a text names, each once and in order.

    Args:
        text: numbers with commas between them, ``all``, or None for no layer.
        count: layers of the model.

    >>> layers_of("3,0", 4), layers_of("all", 2), layers_of(None, 2)
    ((0, 3), (0, 1), ())
    """
    if text is None:
        return ()
    if text == "all":
        return tuple(range(count))
    try:
        return tuple(sorted({int(layer) for layer in text.split(",")}))
    except ValueError:
        raise ConfigError(
            f"maps is {shown(text)}", "numbers of layers with commas between them, or all", "write 0,2"
        ) from None


def check_maps(config: DiffTransformerConfig, layers: Sequence[int], *, cache: bool) -> None:
    """Checks that a graph can return what the maps of these layers are made of.

    Raises:
        ConfigError: a layer that is not there, or a graph without a cache, which returns no keys.
        UnsupportedError: the maps of a head have values of their own, so that no subtraction of maps exists.
    """
    if not layers:
        return
    if absent := [layer for layer in layers if not 0 <= layer < config.num_hidden_layers]:
        raise ConfigError(
            f"maps of layer {absent[0]}", f"layers 0 to {config.num_hidden_layers - 1}, which the model has",
            "change --maps",
        )  # fmt: skip
    if not cache:
        raise ConfigError(
            "maps of a graph without a cache, which returns no keys", "a graph with a cache", "leave --no-cache out"
        )
    if config.subtracts_maps and not config.has_map_diff:
        raise UnsupportedError(
            "the two maps of a head have values of their own (pairs_share_group is false)",
            "a model whose maps are subtracted",
            "leave --maps out",
        )


def map_names(config: DiffTransformerConfig, layers: Sequence[int]) -> list[str]:
    """Returns the names of the outputs, in the order of :func:`read_maps`."""
    kinds = ("query", "lambda") if config.has_map_diff else ("query",)
    return [f"{MAPS}.{layer}.{kind}" for layer in layers for kind in kinds]


@contextlib.contextmanager
def read_maps(model: DiffTransformerForCausalLM, layers: Sequence[int]) -> Iterator[list[Tensor]]:
    """Gives a list that a pass of the model fills with queries and λ of these layers, for as long as this lasts."""
    read: list[Tensor] = []
    modules: list[Any] = [model.model.layers[layer].self_attn for layer in layers]
    try:
        for module in modules:
            module.lay_out = _reading_queries(module, read)
            if model.config.has_map_diff:
                module.combine = _reading_lambda(module, read)
        yield read
    finally:
        for module in modules:
            # The methods of the class show again.
            del module.lay_out
            if model.config.has_map_diff:
                del module.combine


def _reading_queries(module: SoftmaxAttention, read: list[Tensor]) -> Any:
    plain = module.lay_out

    def lay_out(q_BTNW: Tensor, *rest: Any) -> Any:
        q_BNTW = q_BTNW.transpose(1, 2)
        d = module.width
        # One half of a padded query is zeros.
        read.append(q_BNTW if q_BNTW.shape[-1] == d else q_BNTW[..., :d] + q_BNTW[..., d:])
        return plain(q_BTNW, *rest)

    return lay_out


def _reading_lambda(module: SoftmaxAttention, read: list[Tensor]) -> Any:
    plain = module.combine

    def combine(o_BTNW: Tensor, lam: Tensor) -> Tensor:
        one = lam.dim() == 0
        read.append(lam.expand(o_BTNW.shape[0], 1, module.config.output_heads) if one else lam)
        return plain(o_BTNW, lam)

    return combine
