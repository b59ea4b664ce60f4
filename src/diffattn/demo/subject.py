"""One model of a page: its graph with a cache and maps, the facts that the page shows, and where its maps show most."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from diffattn.checkpoint_files import folder_name, read_config, read_tensors
from diffattn.data.needles import NeedlePrompt
from diffattn.demo.embedding import plain_embedding
from diffattn.demo.options import DEMO_BITS
from diffattn.errors import ConfigError, UnsupportedError
from diffattn.export.onnx import export_onnx
from diffattn.export.run import MODEL_FILE
from diffattn.humanize import size
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.loading import load_config
from diffattn.probes.attention_calls import LayerCall, served_by
from diffattn.probes.noise import SPANS, span_sums
from diffattn.progress import OnStage

LIMIT = 100_000_000
"""The bytes of weights that a page may carry; browsers open one as large in some seconds."""
# The bits of float32, which leave the weights as they are.
FLOATS = DEMO_BITS[-1]


def check_models(folders: Sequence[str | Path], bits: int) -> None:
    """Checks what is known of models before a weight is read.

    Raises:
        UnsupportedError: a model that is not ours, that is no decoder, or whose maps cannot be subtracted.
        ConfigError: more bytes than a page carries.
        CheckpointError: a folder that holds no checkpoint.
    """
    held = sum(map(_checked_parameters, folders)) * bits // 8
    if held > LIMIT:
        smaller = [f"--bits {fewer}" for fewer in sorted(DEMO_BITS, reverse=True) if fewer < bits]
        names = " and ".join(map(folder_name, folders))
        raise ConfigError(
            f"the weights of {names} take at least {held:,} bytes in {bits} bits each",
            f"at most {LIMIT:,} ({size(LIMIT)}) in a page",
            " or ".join([*smaller, "smaller models" if len(folders) == 1 else "one model, or smaller ones"]),
        )


def _checked_parameters(folder: str | Path) -> int:
    name = repr(folder_name(folder))
    kind = read_config(folder).get("model_type")
    if kind != DiffTransformerConfig.model_type:
        raise UnsupportedError(
            f"{name} is a model of the type {kind!r}", "a model of diffattn",
            "convert it first: see diffattn convert --help",
        )  # fmt: skip
    config = load_config(folder)
    if not config.is_causal:
        raise UnsupportedError(
            f"{name} is an encoder, which writes no text", "a model that names the next token", "give another model"
        )
    if config.subtracts_maps and not config.has_map_diff:
        raise UnsupportedError(
            f"the two maps of a head of {name} have values of their own (pairs_share_group is false)",
            "a model whose maps are subtracted, which a page can show", "give another model",
        )  # fmt: skip
    return sum(math.prod(entry["shape"]) for entry in read_tensors(folder).values())


@torch.no_grad()
def facts(model: PreTrainedModel, ids: Sequence[int], end: int | None) -> dict[str, Any]:
    """Returns what a page has to know of a model to run it and to draw its maps.

    Args:
        model: the model.
        ids: some tokens, which it reads to show its attention calls.
        end: the token that ends a text where the model itself names none.
    """
    calls: list[LayerCall] = []
    with served_by(model, calls.append):
        model(input_ids=torch.tensor([ids]), use_cache=False, logits_to_keep=1)
    config, first = model.config, calls[0]
    # V2's two maps have one tensor of keys.
    keys = list({id(key): key for key in first.keys}.values())
    ends = model.generation_config.eos_token_id
    ends = end if ends is None else ends
    cached = sum(key.shape[3] for key in keys) + first.value.shape[3]
    return {
        "attention": config.attention,
        "heads": first.heads,
        "noise_heads": first.noise_heads,
        "groups": first.keys[0].shape[2],
        "width": first.queries[0].shape[3],
        "key_width": sum(key.shape[3] for key in keys),
        "scale": first.scale,
        "layers": list(range(len(calls))),
        "windows": [config.layer_window(layer) for layer in range(len(calls))],
        "parameters": model.num_parameters(),
        "cache_bytes_per_token": 4 * len(calls) * first.keys[0].shape[2] * cached,
        "stop": ends if isinstance(ends, list) else [] if ends is None else [ends],
    }


def best_head(model: PreTrainedModel, ids: Sequence[int], answer: tuple[int, int]) -> dict[str, int]:
    """Returns the layer and the head whose last token looks most at the answer: the head by which a text is shown.

    That is the share of the answer in the sizes of what the last row of its map, or difference of maps, gives to the
    first token, the text before the answer, the answer, and the text behind it.

    Args:
        model: the model.
        ids: the tokens of the text.
        answer: the first token of the answer, and the one behind its last.
    """
    ends = [0, 1, *answer, len(ids), len(ids)]
    spans = {name: (ends[i], ends[i + 1]) for i, name in enumerate(SPANS)}
    sums = span_sums(model, [NeedlePrompt(list(ids), spans, ())])
    used = sums["map_diff" if "map_diff" in sums else "map_pos"][0]
    shares = used[..., SPANS.index("answer")] / used.abs().sum(-1).clamp_min(1e-9)
    layer, head = divmod(int(shares.argmax()), shares.shape[1])
    return {"layer": layer, "head": head}


def graph(folder: str | Path, bits: int, on_stage: OnStage) -> tuple[bytes, dict[str, int]]:
    """Returns the model as an ONNX file with a cache and the maps of all layers, and the bytes of weights and file.

    The browser's engine lacks the operator by which a quantised embedding is looked up, so others take its place.
    """
    with tempfile.TemporaryDirectory() as scratch:
        done = export_onnx(
            folder, Path(scratch) / "onnx", bits=None if bits == FLOATS else bits, maps="all", on_stage=on_stage
        )
        content = plain_embedding((done.folder / MODEL_FILE).read_bytes())
        return content, {"bits": done.bits, "weight_bytes": done.weight_bytes, "file_bytes": len(content)}
