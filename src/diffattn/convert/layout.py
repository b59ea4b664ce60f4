"""The orders of heads and channels, changed one into another, and the tensors that a checkpoint must hold.

Rows of a projection are heads of width d, one after another; a bias has the same rows. Every change of order here is a
transpose, so that each weight keeps its bits, and the inverse of each function is beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from diffattn.checkpoint_files import printable
from diffattn.config_fields import dtype_name
from diffattn.errors import CheckpointError, ConfigError, UnsupportedError, one_line
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.tensors import check_layers, tensor_shapes

# The weights of a checkpoint by name.
Tensors = dict[str, Tensor]
LAMBDAS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def halves_to_pairs(rows: Tensor, width: int) -> Tensor:
    """Returns the rows with heads i and i + n/2 as neighbours 2i and 2i + 1; the shape ``(n·width, …)`` stays.

    >>> halves_to_pairs(torch.tensor([0, 1, 2, 3]), 1).tolist()
    [0, 2, 1, 3]
    """
    return rows.unflatten(0, (2, -1, width)).transpose(0, 1).flatten(0, 2)


def pairs_to_halves(rows: Tensor, width: int) -> Tensor:
    """Returns the rows with neighbours 2i and 2i + 1 as heads i and i + n/2; undoes :func:`halves_to_pairs`."""
    return rows.unflatten(0, (-1, 2, width)).transpose(0, 1).flatten(0, 2)


def interleaved_to_half(rows: Tensor, width: int) -> Tensor:
    """Returns the rows with channels 2i and 2i + 1 of each head, which RoPE turns together, at i and i + width/2.

    >>> interleaved_to_half(torch.tensor([0, 1, 2, 3, 4, 5]), 6).tolist()
    [0, 2, 4, 1, 3, 5]
    """
    return rows.unflatten(0, (-1, width // 2, 2)).transpose(1, 2).flatten(0, 2)


def half_to_interleaved(rows: Tensor, width: int) -> Tensor:
    """Returns the rows with channels i and i + width/2 at 2i and 2i + 1; undoes :func:`interleaved_to_half`."""
    return rows.unflatten(0, (-1, 2, width // 2)).transpose(1, 2).flatten(0, 2)


def twice_each_head(rows: Tensor, width: int) -> Tensor:
    """Returns the rows with head i as heads 2i and 2i + 1: ``(n·width, …)`` becomes ``(2n·width, …)``."""
    return rows.unflatten(0, (-1, width)).repeat_interleave(2, dim=0).flatten(0, 1)


def split_rows(name: str, tensor: Tensor, rows: Mapping[str, int]) -> Tensors:
    """Returns the parts of a projection that are several, one after another, each in memory of its own.

    Raises:
        CheckpointError: the rows of the parts are not those of the tensor.

    >>> parts = split_rows("qk", torch.tensor([1, 2, 3]), {"q": 2, "k": 1})
    >>> parts["q"].tolist(), parts["k"].tolist()
    ([1, 2], [3])
    """
    if tensor.dim() == 0 or tensor.shape[0] != sum(rows.values()):
        raise CheckpointError(
            f"{printable(name)} is {_sizes(tensor.shape)}",
            f"{sum(rows.values())} rows, as config.json says",
            "check that both files belong to one checkpoint",
        )
    # A writer of safetensors leaves out a tensor that shares its memory with another.
    return {part: values.clone() for part, values in zip(rows, tensor.split(list(rows.values())), strict=True)}


def float32_exactly(name: str, tensor: Tensor) -> Tensor:
    """Returns the tensor in float32, in which λ is kept whatever the dtype of a model.

    Raises:
        UnsupportedError: float32 cannot hold its values.
    """
    rounded = tensor.float()
    if not same_values(rounded.to(tensor.dtype), tensor):
        raise UnsupportedError(
            f"{name} is {dtype_name(tensor.dtype)} and would be rounded, since λ is computed in float32",
            "weights that float32 holds",
            "cast the model first",
        )
    return rounded


def same_values(left: Tensor, right: Tensor) -> bool:
    """Returns whether two tensors of one shape hold the same numbers, where NaN equals NaN."""
    return bool(((left == right) | (left.isnan() & right.isnan())).all())


def our_shapes(ours: DiffTransformerConfig, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in a checkpoint of the configuration; a tied output head is not in it.

    Raises:
        CheckpointError: more layers than there are ``tensors``; a damaged file can ask for millions of them.
    """
    check_layers(ours.num_hidden_layers, len(tensors))
    return tensor_shapes(ours)


def shapes_of(config: PreTrainedConfig, build: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in a checkpoint of a model, which is built without storage.

    Raises:
        ConfigError: a configuration from which no model can be built.
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
    """Returns the error that says why ``config.json`` describes no model of a kind."""
    what = f"config.json is no {kind} model"
    if isinstance(error, ConfigError):
        return error.at(what)
    return ConfigError(f"{what} ({one_line(error)})", "a whole configuration", "correct config.json")


def check_shapes(wanted: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], kind: str) -> None:
    """Raises unless the tensors have the names and shapes that are wanted.

    Raises:
        CheckpointError: tensors that are missing, unknown, or of another shape; the message calls the model ``kind``.
    """
    for what, names in (("lack", wanted.keys() - tensors.keys()), ("hold", tensors.keys() - wanted.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            reason = "" if what == "lack" else ", for which the model has no place"
            raise CheckpointError(
                f"the weights {what} {printable(min(names))}{more}{reason}",
                f"the {len(wanted)} tensors of the {kind} model that config.json describes",
                "check that both files belong to one checkpoint",
            )
    for name, shape in wanted.items():
        same_sizes(name, tensors[name].shape, shape)


def same_sizes(name: str, given: Iterable[int], wanted: Iterable[int]) -> None:
    """Raises a ``CheckpointError`` unless a tensor has the sizes that its configuration says."""
    if tuple(given) != tuple(wanted):
        raise CheckpointError(
            f"{printable(name)} is {_sizes(given)}",
            f"{_sizes(wanted)}, as config.json says",
            "check that both files belong to one checkpoint",
        )


def _sizes(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape)) or "a number"
