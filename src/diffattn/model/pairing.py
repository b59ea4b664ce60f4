"""A DIFF model together with the softmax Transformer that it replaces."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffattn.errors import ConfigError
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.heads.language import language_class
from diffattn.model.modeling import DiffTransformerLanguageModel
from diffattn.model.options import MATCHES
from diffattn.plan.cost import Parameters, count_parameters, match_parameters
from diffattn.plan.shape import ModelShape
from diffattn.variants import BASELINE

# These change a variant; the twin is the plain softmax model all the same.
_SWITCHES = {"head_norm", "lambda_form", "pairs_share_group"}
_COUNTED = ("subln_affine", "head_norm", "lambda_form")
_OF_THE_SHAPE = {
    "attention",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "tie_word_embeddings",
    "vocab_size",
}


class Pair(NamedTuple):
    """``model`` is the variant that was asked for, ``twin`` the softmax Transformer with the same initial values."""

    model: DiffTransformerLanguageModel
    twin: DiffTransformerLanguageModel


def pair_config(
    shape: ModelShape, attention: str, *, match: str = "parameters", **config: Any
) -> DiffTransformerConfig:
    """The configuration of ``shape``'s variant: under ``match="parameters"`` V2's feed-forward width is narrowed, and
    gated attention's."""
    if match not in MATCHES:
        raise ConfigError(f"match={match!r}", f"one of {', '.join(MATCHES)}", "correct the name")
    if of_the_shape := sorted(_OF_THE_SHAPE & config.keys()):
        raise ConfigError(
            f"{', '.join(of_the_shape)} beside the shape, by whose numbers the pair is matched",
            "these numbers in the shape",
            "use dataclasses.replace on the shape",
        )
    if match == "parameters":
        counted = {name: config[name] for name in _COUNTED if name in config}
        shape = match_parameters(shape, attention, **counted)
    return DiffTransformerConfig.from_shape(shape, attention, **config)


def parameters_of(config: DiffTransformerConfig) -> Parameters:
    """The parameters of a configuration without biases, norms of queries and keys, and DEX, before it is built.

    >>> config = pair_config(ModelShape.preset("300K"), "diff_v2", lambda_form="one")
    >>> parameters_of(config).total == language_class(config)(config).num_parameters()
    True
    """
    return count_parameters(config.shape(), config.attention, **{name: getattr(config, name) for name in _COUNTED})


def build_pair(shape: ModelShape, attention: str, *, seed: int = 0, match: str = "parameters", **config: Any) -> Pair:
    """Build a variant and its softmax twin with the same initial value in every tensor that they share.

    V1 shares all but its λ vectors and norm gains. V2 shares all but W_λ and the noise half of W_Q (its heads
    2i + 1), gated attention all but W_g. Where a feed-forward width was narrowed, its matrices start as the leading
    columns of the twin's.
    What is not shared is drawn from a stream of its own, so that it does not repeat values of the twin.

    Args:
        shape: the softmax Transformer to be replaced.
        attention: ``"diff_v1"``, ``"diff_v2"``, ``"gated"``, or ``"softmax"`` (model and twin are then equal).
        seed: of the initial values; the global random state is left as it was.
        match: ``"parameters"``: totals match (V1 by construction, V2 within 0.5% by a narrower feed-forward
            layer, and so gated attention). ``"shape"``: every width stays, and these two have more parameters.
        config: further fields of :class:`DiffTransformerConfig`, for both models; ``head_norm``, ``lambda_form`` and
            ``pairs_share_group`` for the variant alone.

    Raises:
        ConfigError: a shape whose heads do not fit the variant, or an unknown ``match``.

    >>> model, twin = build_pair(ModelShape.preset("300K"), "diff_v1", seed=1)
    >>> bool((model.lm_head.weight == twin.lm_head.weight).all())
    True
    """
    model_config = pair_config(shape, attention, match=match, **config)
    plain = {name: value for name, value in config.items() if name not in _SWITCHES}
    twin = _build(DiffTransformerConfig.from_shape(shape, BASELINE, **plain), seed)
    own = int.from_bytes(hashlib.sha256(f"{attention}/{seed}".encode()).digest()[:7])
    model = _build(model_config, own)
    twin_state = twin.state_dict()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in twin_state:
                _share(tensor, twin_state[name], signal_half=name.endswith("q_proj.weight"), shape=shape)
    return Pair(model, twin)


def _build(config: DiffTransformerConfig, seed: int) -> DiffTransformerLanguageModel:
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed every CUDA device too, whose state is not put back.
        torch.default_generator.manual_seed(seed)
        return language_class(config)(config)


def _share(target: Tensor, source: Tensor, *, signal_half: bool, shape: ModelShape) -> None:
    """Copy a tensor of the twin into the model's, whose W_Q may be doubled and whose widths may be narrower."""
    if target.shape == source.shape:
        target.copy_(source)
    elif signal_half:
        assert shape.head_dim is not None
        pairs = target.view(shape.num_heads, 2, shape.head_dim, -1)
        pairs[:, 0] = source.view(shape.num_heads, shape.head_dim, -1)
    else:
        target.copy_(source[tuple(slice(size) for size in target.shape)])
