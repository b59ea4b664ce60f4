"""Orders of heads and channels, one into another, and what a checkpoint must hold.

Rows of a projection are heads of width d, one after another; a bias has the same rows. Every order here is a transpose,
so that each weight keeps its bits, and the inverse of each function is beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from diffattn.checkpoint_files import printable
from diffattn.errors import CheckpointError, ConfigError, UnsupportedError
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.tensors import check_layers, tensor_shapes

LAMBDAS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def halves_to_pairs(rows: Tensor, width: int) -> Tensor:
    """Heads i and i + n/2 become neighbours 2i and 2i + 1. ``(n·width, …)`` to the same shape.

    >>> halves_to_pairs(torch.tensor([0, 1, 2, 3]), 1).tolist()
    [0, 2, 1, 3]
    """
    return rows.unflatten(0, (2, -1, width)).transpose(0, 1).flatten(0, 2)


def pairs_to_halves(rows: Tensor, width: int) -> Tensor:
    """Neighbours 2i and 2i + 1 become heads i and i + n/2; undoes :func:`halves_to_pairs`."""
    return rows.unflatten(0, (-1, 2, width)).transpose(0, 1).flatten(0, 2)


def interleaved_to_half(rows: Tensor, width: int) -> Tensor:
    """Channels 2i and 2i + 1 of each head, which rotary positions turn together, become i and i + width/2.

    >>> interleaved_to_half(torch.tensor([0, 1, 2, 3, 4, 5]), 6).tolist()
    [0, 2, 4, 1, 3, 5]
    """
    return rows.unflatten(0, (-1, width // 2, 2)).transpose(1, 2).flatten(0, 2)


def half_to_interleaved(rows: Tensor, width: int) -> Tensor:
    """Channels i and i + width/2 of each head become 2i and 2i + 1; undoes :func:`interleaved_to_half`."""
    return rows.unflatten(0, (-1, 2, width // 2)).transpose(1, 2).flatten(0, 2)


def twice_each_head(rows: Tensor, width: int) -> Tensor:
    """Head i becomes heads 2i and 2i + 1. ``(n·width, …)`` to ``(2n·width, …)``."""
    return rows.unflatten(0, (-1, width)).repeat_interleave(2, dim=0).flatten(0, 1)


def float32_exactly(name: str, tensor: Tensor) -> Tensor:
    """The tensor in float32, in which λ is kept whatever the dtype of a model.

    Raises:
        UnsupportedError: float32 cannot hold its values.
    """
    rounded = tensor.float()
    if not same_values(rounded.to(tensor.dtype), tensor):
        raise UnsupportedError(
            f"{name} is {str(tensor.dtype).removeprefix('torch.')} and would be rounded: λ is computed in float32 "
            "here; wanted weights that float32 holds: cast the model first"
        )
    return rounded


def same_values(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of one shape hold the same numbers; NaN is one."""
    return bool(((left == right) | (left.isnan() & right.isnan())).all())


def our_shapes(ours: DiffTransformerConfig, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in a checkpoint of the configuration; a tied output head is not in it.

    Raises:
        CheckpointError: more layers than there are ``tensors``, which would be built for nothing, by the million.
    """
    check_layers(ours.num_hidden_layers, len(tensors))
    return tensor_shapes(ours)


def shapes_of(config: PreTrainedConfig, build: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in a checkpoint of a model, which is built without storage.

    Raises:
        ConfigError: a configuration that passed for one and that no model can be built of.
    """
    try:
        with torch.device("meta"):
            shapes = {name: tuple(tensor.shape) for name, tensor in build().state_dict().items()}
    except Exception as error:
        raise no_model(config.model_type, error) from error
    if config.tie_word_embeddings:
        del shapes[HEAD]
    return shapes


def no_model(kind: str, error: Exception) -> ConfigError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ConfigError(f"config.json is no {kind} model ({reason}); wanted a whole one")


def check_shapes(wanted: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], kind: str) -> None:
    """Raise unless the tensors are those that are wanted, by name and shape.

    Raises:
        CheckpointError: tensors that are missing, unknown, or of another shape; the message calls the model ``kind``.
    """
    for what, names in (("lack", wanted.keys() - tensors.keys()), ("hold", tensors.keys() - wanted.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            reason = "" if what == "lack" else ", for which the model has no place"
            raise CheckpointError(
                f"the weights {what} {printable(min(names))}{more}{reason}; wanted the {len(wanted)} tensors of the "
                f"{kind} model that config.json describes: check that both are of one checkpoint"
            )
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{name} is {_sizes(tensors[name].shape)}; wanted {_sizes(shape)}, which config.json implies: check "
                "that both are of one checkpoint"
            )


def _sizes(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape)) or "a number"
