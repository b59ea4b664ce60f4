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
    "num_noise_heads",
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
    """The configuration of ``shape``'s variant: under ``match="parameters"`` the feed-forward network is narrower or
    wider where W_Q or a gate has more or fewer parameters."""
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
    2i + 1), gated attention all but W_g. Where noise heads are shared, each has the queries of the first of V1's pairs
    that it stands for, or under V2's rule its own. Where a feed-forward width is another, its matrices start as the
    leading columns of the twin's, or the twin's are their leading columns.
    What is not shared is drawn from a stream of its own, so that it does not repeat values of the twin.

    Args:
        shape: the softmax Transformer to be replaced.
        attention: a name in ``VARIANTS``; with ``"softmax"`` model and twin are equal.
        seed: of the initial values; the global random state is left as it was.
        match: ``"parameters"``: totals match (V1 by construction, the others within 0.5% by a feed-forward
            layer of another width). ``"shape"``: every width stays, and V2 and gated attention have more parameters.
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
                _share(tensor, twin_state[name], queries=".q_proj." in name, config=model_config)
    return Pair(model, twin)


def _build(config: DiffTransformerConfig, seed: int) -> DiffTransformerLanguageModel:
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed every CUDA device too, whose state is not put back.
        torch.default_generator.manual_seed(seed)
        return language_class(config)(config)


def _share(target: Tensor, source: Tensor, *, queries: bool, config: DiffTransformerConfig) -> None:
    """Copy a tensor of the twin into the model's, whose W_Q may have other heads and whose widths may differ."""
    if target.shape == source.shape:
        target.copy_(source)
    elif queries:
        _share_queries(target, source, config)
    else:
        common = tuple(slice(min(sizes)) for sizes in zip(target.shape, source.shape, strict=True))
        target[common] = source[common]


def _share_queries(target: Tensor, source: Tensor, config: DiffTransformerConfig) -> None:
    shared, join, width = config.signals_per_noise, config.record.join, config.rope_width
    groups = target.view(-1, shared + 1, width, *target.shape[1:])
    # For each noise head so many heads of the twin; where V1 joins two of them, the first makes the signal.
    heads = source.view(-1, shared, join, width, *source.shape[1:])
    groups[:, :shared] = heads[:, :, 0]
    if join > 1:
        groups[:, shared] = heads[:, 0, 1]
