"""Reads what ``diffattn lens`` shows: the queries, keys and λ of every layer for one text; a page makes maps of them.

Maps of a thousand tokens are too many to put into a page; queries and keys are not. A page has them as float32 where
they take little, else as float16, from which probabilities are right to three digits.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diffattn.checkpoint_files import folder_name
from diffattn.config_fields import dtype_name, shown
from diffattn.errors import ConfigError, DataError, UnsupportedError
from diffattn.generate.generation import check_prompt
from diffattn.model.loading import check_tokens, load, positions_of
from diffattn.model.options import Device, Dtype, LoadOptions
from diffattn.probes.attention_calls import LayerCall, served_by
from diffattn.probes.options import LensOptions, fitting_length
from diffattn.progress import OnStage, Stage, unseen
from diffattn.results.lens import LensLayer, LensModel, LensResult
from diffattn.results.maps import AttentionMaps, MapSet
from diffattn.variants import ATTENTIONS, BASELINE

FLOAT32_BYTES = 12_000_000
MOST_BYTES = 48_000_000
MOST_TOKENS = 2048


def lens(
    folders: Sequence[str | Path],
    text: str,
    *,
    layers: Sequence[int] | None = LensOptions.layers,
    answer: str | None = LensOptions.answer,
    picture: tuple[int, int] | None = None,
    dtype: Dtype = LoadOptions.dtype,
    device: Device = LoadOptions.device,
    command: str = "diffattn.lens(...)",
    on_stage: OnStage = unseen,
) -> LensResult:
    """Reads one text with one model or two.

    Args:
        folders: one checkpoint, or two with the same tokenizer, such as a DIFF model and its softmax twin.
        text: at most 2,048 tokens.
        layers: the layers that the page shows, counted from 0; default: all.
        answer: a part of the text. Attention to anything but it and the first token counts as noise.
        picture: the layer and the output head whose maps themselves are wanted too.
        dtype, device: as in :func:`diffattn.model.loading.load`.
        command: the command that made the result, to be named in it.
        on_stage: called with what is being done.

    Raises:
        ConfigError: no model or more than two, an empty or too long text, a layer that is not there, or too much for a
            page.
        DataError: an answer that is not in the text; models with different tokenizers.
        UnsupportedError: a model whose attention cannot be read.
    """
    if not 1 <= len(folders) <= 2:
        raise ConfigError(f"{len(folders)} models given", "one, or two to be seen beside each other", "name fewer")
    if text:
        check_prompt(text, "text")
    if answer is not None and (not answer.strip() or answer not in text):
        given = f"the answer {shown(answer)} is not in the text"
        raise DataError(given, "a part of the text, letter by letter", "copy it from the text")
    loaded = []
    for folder in folders:
        on_stage(Stage(f"loading {folder}"))
        loaded.append(load(folder, dtype, device))
    on_stage(Stage("reading the text with the model"))
    tokenizer = loaded[0][1]
    ids = tokenizer(text)["input_ids"]
    if any(other(text)["input_ids"] != ids for _, other in loaded[1:]):
        raise DataError(
            "the two models read the text in different tokens", "models with one tokenizer", "look at each by itself"
        )
    if not 2 <= len(ids) <= MOST_TOKENS:
        raise ConfigError(
            f"the text has {len(ids)} tokens", f"2 to {MOST_TOKENS:,}, so that a map can be looked at",
            f"give a {'longer' if len(ids) < 2 else 'shorter'} text",
        )  # fmt: skip
    for model, _ in loaded:
        check_tokens(model, ids)
    names = names_of(folders)
    tokens = token_labels(tokenizer, ids)
    models = [_read(model, name, ids, layers) for (model, _), name in zip(loaded, names, strict=True)]
    maps = None
    if picture is not None:
        variants = {
            facts.name: _maps(model, facts, ids, *picture) for (model, _), facts in zip(loaded, models, strict=True)
        }
        maps = MapSet(tokens=tokens, variants=variants)
    return LensResult(
        tokens=tokens,
        answer=None if answer is None else _span(tokenizer, text, answer, ids),
        models=models,
        command=command,
        picture=maps,
    )


def names_of(folders: Sequence[str | Path]) -> list[str]:
    """Returns the names of the models: those of their folders, or the whole paths where two folders share a name."""
    names = [folder_name(folder) for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _maps(model: PreTrainedModel, facts: LensModel, ids: list[int], layer: int, head: int) -> AttentionMaps:
    """Returns the maps of one head.

    Raises:
        ConfigError: a layer or a head that the model does not have.
    """
    layers = len(model.get_decoder().layers)
    if not (0 <= layer < layers and 0 <= head < facts.heads):
        raise ConfigError(
            f"layer {layer} and head {head} given for the picture",
            f"layers 0 to {layers - 1} and heads 0 to {facts.heads - 1}, which {facts.name} has",
            "change --layer or --head",
        )
    return attention_maps(model, torch.tensor([ids], device=model.device), layer=layer, head=head)


@torch.no_grad()
def _read(model: PreTrainedModel, name: str, ids: list[int], layers: Sequence[int] | None) -> LensModel:
    """Returns what the page needs of one model.

    Raises:
        ConfigError: layers that the model does not have, or too much for a page.
        UnsupportedError: a mask that a page cannot show.
    """
    fitting_length(len(ids), positions_of(model.config))
    count = len(model.get_decoder().layers)
    wanted = list(range(count)) if layers is None else list(layers)
    if not wanted or not set(wanted) <= set(range(count)):
        raise ConfigError(f"layers are {wanted}", f"layers 0 to {count - 1}, which {name} has", "change --layers")
    calls: dict[int, LayerCall] = {}
    with served_by(model, lambda call: calls.update({call.layer: call})):
        model(input_ids=torch.tensor([ids], device=model.device), use_cache=False, logits_to_keep=1)
    if any(calls[layer].mask is not None for layer in wanted):
        raise UnsupportedError(
            f"{name} uses a mask that is not causal, such as a sliding window, which this page cannot show",
            "a causal mask",
            "give a text that is shorter than the window",
        )
    first = calls[wanted[0]]
    numbers = sum(x.numel() for layer in wanted for x in (*calls[layer].queries, *_different(calls[layer].keys)))
    kind = torch.float32 if 4 * numbers <= FLOAT32_BYTES else torch.float16
    if kind.itemsize * numbers > MOST_BYTES:
        raise ConfigError(
            f"the queries and keys of {len(wanted)} layers of {name} take {kind.itemsize * numbers / 1e6:.0f} MB",
            f"at most {MOST_BYTES / 1e6:.0f} MB in a page",
            "name fewer layers with --layers, or give a shorter text",
        )
    attention = getattr(model.config, "attention", BASELINE)
    return LensModel(
        name=name,
        attention=attention if isinstance(attention, str) else BASELINE,
        heads=first.heads,
        noise_heads=first.noise_heads,
        groups=first.keys[0].shape[2],
        width=first.queries[0].shape[3],
        scale=first.scale,
        dtype=dtype_name(kind),
        layers=[_layer(model, calls[layer], kind) for layer in wanted],
    )


def _different(keys: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Returns the keys of each map, once where V2's two maps share them."""
    return keys[:1] if len(keys) > 1 and keys[0] is keys[1] else keys


def _layer(model: PreTrainedModel, call: LayerCall, kind: torch.dtype) -> LensLayer:
    """Returns the numbers of one layer."""
    lam = call.lam
    if lam is not None and _one_lambda(model):
        lam = lam[:, :1]
    return LensLayer(
        layer=call.layer,
        queries=_encoded(torch.cat([each.flatten() for each in call.queries]), kind),
        keys=_encoded(torch.cat(_different(call.keys)), kind),
        lam=None if lam is None else _encoded(lam[0], torch.float32),
    )


def _one_lambda(model: PreTrainedModel) -> bool:
    """Tells if a differential model has one λ for all tokens of a layer."""
    return ATTENTIONS[model.config.attention].weights == "layer"


def _encoded(numbers: Tensor, kind: torch.dtype) -> str:
    """Returns numbers of this kind as the base64 of their bytes."""
    return base64.b64encode(numbers.to(kind).contiguous().cpu().numpy().tobytes()).decode("ascii")


def _span(tokenizer: PreTrainedTokenizerBase, text: str, answer: str, ids: list[int]) -> list[int]:
    """Returns the first token that holds a part of the text, and the one behind its last.

    Raises:
        DataError: a part that is less than a token.
        UnsupportedError: a tokenizer that cannot say.
    """
    start = text.index(answer)
    if not tokenizer.is_fast:
        given = "the tokenizer cannot say which letters a token holds"
        raise UnsupportedError(given, "a fast tokenizer (tokenizer.json)", "leave --answer out")
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    inside = [i for i, (begin, end) in enumerate(offsets) if begin < start + len(answer) and end > start]
    if not inside:
        given = f"the answer {shown(answer)} has no token of its own in the text"
        raise DataError(given, "a word or more of the text", "give a longer part of it")
    return [inside[0], inside[-1] + 1]


@torch.no_grad()
def attention_maps(model: PreTrainedModel, input_ids: Tensor, *, layer: int, head: int) -> AttentionMaps:
    """Returns the maps of one output head, and its λ.

    Args:
        model: a model whose attention can be read (``attention_calls.py``); its implementation and mode are left as
            they were.
        input_ids: ``(1, T)`` token ids; short, since the maps of all heads of a layer exist at once.
        layer: the layer, counted from 0.
        head: the output head, counted from 0.

    Raises:
        UnsupportedError: a model whose attention cannot be read.
    """
    found: list[AttentionMaps] = []

    def read(call: LayerCall) -> None:
        if call.layer != layer:
            return
        rows = range(input_ids.shape[1])
        pos, *noise = call.maps(rows)
        lam = call.lam_of(rows)
        if lam is None:
            found.append(AttentionMaps(map_pos=pos[0, head].tolist()))
            return
        maps = pos[0, head], noise[0][0, head * call.noise_heads // call.heads]
        lam_T1 = lam[0, head]
        found.append(
            AttentionMaps(
                map_pos=maps[0].tolist(),
                lam_map_neg=(lam_T1 * maps[1]).tolist(),
                map_diff=(maps[0] - lam_T1 * maps[1]).tolist(),
                lam=lam_T1[0, 0].item() if _one_lambda(model) else lam_T1[:, 0].tolist(),
            )
        )

    training = model.training
    try:
        with served_by(model.eval(), read):
            model(input_ids=input_ids, use_cache=False)
    finally:
        model.train(training)
    return found[-1]


def token_labels(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Returns tokens as they are to be read: a leading space as ``·``, a line break as ``↵``."""
    return [tokenizer.decode([token]).replace(" ", "·").replace("\n", "↵") for token in ids]
