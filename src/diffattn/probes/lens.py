"""What ``diffattn lens`` shows: the queries, keys and λ of every layer for one text, from which a page makes the maps.

Maps of a thousand tokens are too many to put into a page; queries and keys are not. A page has them as float32 where
they take little, else as float16, from which probabilities are right to three digits.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diffattn.checkpoint_files import folder_name
from diffattn.config_fields import shown
from diffattn.errors import ConfigError, DataError, UnsupportedError
from diffattn.generate.generation import check_prompt
from diffattn.model.attention import DiffV1Attention
from diffattn.model.loading import Device, Dtype, check_tokens, load, positions_of
from diffattn.probes.attention_calls import LayerCall, served_by
from diffattn.probes.maps import attention_maps, token_labels
from diffattn.probes.options import fitting_length
from diffattn.progress import OnStage, Stage, unseen

FLOAT32_BYTES = 12_000_000
MOST_BYTES = 48_000_000
MOST_TOKENS = 2048


def lens(
    folders: Sequence[str | Path],
    text: str,
    *,
    layers: Sequence[int] | None = None,
    answer: str | None = None,
    picture: tuple[int, int] | None = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    command: str = "diffattn.lens(...)",
    on_stage: OnStage = unseen,
) -> dict[str, Any]:
    """Read one text with one model or two.

    Args:
        folders: one checkpoint, or two with the same tokenizer, such as a DIFF model and its softmax twin.
        text: at most 2,048 tokens.
        layers: of the models, from 0; default: all.
        answer: a part of the text. What the last tokens attend to beside it and beside the first token is noise.
        picture: layer and output head of which the maps themselves are wanted too.
        dtype, device: as in :func:`diffattn.model.loading.load`.
        command: what is said to have made the result.
        on_stage: called with what is being done.

    Returns:
        ``tokens`` as they are to be read, ``answer`` as the range of its tokens or None, and ``models``: ``name``,
        ``attention``, ``heads`` (output heads), ``groups``, ``width``, ``scale``, ``dtype`` of the numbers, and
        ``layers``: number, base64 of ``queries`` (maps, T, heads, width), ``keys`` (maps, T, groups, width) and
        ``lam`` ((T or 1, heads), None for one map). With ``picture``, under that name, ``tokens`` and under
        ``variants`` each model's ``attention_maps``.

    Raises:
        ConfigError: no model or more than two, an empty or too long text, a layer that is not there, or too much for a
            page.
        DataError: an answer that is not in the text; models with different tokenizers.
        UnsupportedError: a model whose attention cannot be read.
    """
    if not 1 <= len(folders) <= 2:
        raise ConfigError(f"{len(folders)} models given; wanted one, or two to be seen beside each other")
    if text:
        check_prompt(text, "text")
    if answer is not None and (not answer.strip() or answer not in text):
        raise DataError(f"the answer {shown(answer)} is not in the text; wanted a part of it, letter by letter")
    loaded = []
    for folder in folders:
        on_stage(Stage(f"loading {folder}"))
        loaded.append(load(folder, dtype, device))
    on_stage(Stage("reading the text with the model"))
    tokenizer = loaded[0][1]
    ids = tokenizer(text)["input_ids"]
    if any(other(text)["input_ids"] != ids for _, other in loaded[1:]):
        raise DataError("the two models read the text in different tokens; wanted models with one tokenizer")
    if not 2 <= len(ids) <= MOST_TOKENS:
        raise ConfigError(f"the text has {len(ids)} tokens; wanted 2 to {MOST_TOKENS}, so that a map can be looked at")
    for model, _ in loaded:
        check_tokens(model, ids)
    names = names_of(folders)
    result: dict[str, Any] = {
        "tokens": token_labels(tokenizer, ids),
        "answer": None if answer is None else _span(tokenizer, text, answer, ids),
        "models": [_read(model, name, ids, layers) for (model, _), name in zip(loaded, names, strict=True)],
        "command": command,
    }
    if picture is not None:
        result["picture"] = {
            "tokens": result["tokens"],
            "variants": {
                facts["name"]: _maps(model, facts, ids, *picture)
                for (model, _), facts in zip(loaded, result["models"], strict=True)
            },
        }
    return result


def names_of(folders: Sequence[str | Path]) -> list[str]:
    """What the models are called: short where that tells them apart."""
    names = [folder_name(folder) for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _maps(model: PreTrainedModel, facts: dict[str, Any], ids: list[int], layer: int, head: int) -> dict[str, Any]:
    layers, heads = len(model.get_decoder().layers), facts["heads"]
    if not (0 <= layer < layers and 0 <= head < heads):
        raise ConfigError(
            f"layer {layer} and head {head} are wanted as a picture; {facts['name']} has layers 0 to {layers - 1} and "
            f"heads 0 to {heads - 1}"
        )
    return attention_maps(model, torch.tensor([ids], device=model.device), layer=layer, head=head)


@torch.no_grad()
def _read(model: PreTrainedModel, name: str, ids: list[int], layers: Sequence[int] | None) -> dict[str, Any]:
    fitting_length(len(ids), positions_of(model.config))
    count = len(model.get_decoder().layers)
    wanted = list(range(count)) if layers is None else list(layers)
    if not wanted or not set(wanted) <= set(range(count)):
        raise ConfigError(f"layers are {wanted} and {name} has {count}; wanted of 0 to {count - 1}")
    calls: dict[int, LayerCall] = {}
    with served_by(model, lambda call: calls.update({call.layer: call})):
        model(input_ids=torch.tensor([ids], device=model.device), use_cache=False, logits_to_keep=1)
    if any(calls[layer].mask is not None for layer in wanted):
        raise UnsupportedError(
            f"{name} hides more from a query than what lies behind it, as a sliding window does; wanted a text shorter "
            "than the window"
        )
    first = calls[wanted[0]]
    numbers = sum(x.numel() for layer in wanted for x in (*calls[layer].queries, *_different(calls[layer].keys)))
    kind = torch.float32 if 4 * numbers <= FLOAT32_BYTES else torch.float16
    if kind.itemsize * numbers > MOST_BYTES:
        raise ConfigError(
            f"the queries and keys of {len(wanted)} layers of {name} take {kind.itemsize * numbers / 1e6:.0f} MB in a "
            f"page; wanted at most {MOST_BYTES / 1e6:.0f}: name fewer layers, or give a shorter text"
        )
    attention = getattr(model.config, "attention", "softmax")
    return {
        "name": name,
        "attention": attention if isinstance(attention, str) else "softmax",
        "heads": first.heads,
        "groups": first.keys[0].shape[2],
        "width": first.queries[0].shape[3],
        "scale": first.scale,
        "dtype": str(kind).removeprefix("torch."),
        "layers": [_layer(model, calls[layer], kind) for layer in wanted],
    }


def _different(keys: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """V2's maps share their keys, which are written once."""
    return keys[:1] if len(keys) > 1 and keys[0] is keys[1] else keys


def _layer(model: PreTrainedModel, call: LayerCall, kind: torch.dtype) -> dict[str, Any]:
    lam = call.lam
    if lam is not None and isinstance(model.get_decoder().layers[call.layer].self_attn, DiffV1Attention):
        lam = lam[:, :1]
    return {
        "layer": call.layer,
        "queries": _encoded(torch.cat(call.queries), kind),
        "keys": _encoded(torch.cat(_different(call.keys)), kind),
        "lam": None if lam is None else _encoded(lam[0], torch.float32),
    }


def _encoded(numbers: Tensor, kind: torch.dtype) -> str:
    return base64.b64encode(numbers.to(kind).contiguous().cpu().numpy().tobytes()).decode("ascii")


def _span(tokenizer: PreTrainedTokenizerBase, text: str, answer: str, ids: list[int]) -> list[int]:
    """The tokens that hold a part of the text."""
    start = text.index(answer)
    if not tokenizer.is_fast:
        raise UnsupportedError("the tokenizer does not say which letters a token holds; leave out the answer")
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    inside = [i for i, (begin, end) in enumerate(offsets) if begin < start + len(answer) and end > start]
    if not inside:
        raise DataError(f"the answer {shown(answer)} has no token of its own in the text; wanted a word or more of it")
    return [inside[0], inside[-1] + 1]
