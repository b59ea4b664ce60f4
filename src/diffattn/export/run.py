"""Run an exported model with onnxruntime: logits, the cache as flat tensors, greedy and sampled text.

Needs numpy and onnxruntime alone, so it also shows what a program without torch has to do.

Shape suffixes: B batch, T new tokens, P cached tokens, S = P + T, G key/value heads, W their width, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diffattn.errors import CheckpointError, ConfigError, UnsupportedError, one_line

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
PAST, PRESENT, MAPS = "past_key_values", "present", "maps"
Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


def require(*packages: str) -> None:
    """Checks that packages of the extra are installed.

    Raises:
        UnsupportedError: one of them cannot be found.
    """
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise UnsupportedError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed",
            "the packages that the ONNX export needs",
            "pip install 'diffattn[onnx]'",
        )


@dataclass
class Cache:
    """Keys and values of all layers as onnxruntime's own values: key 0, value 0, key 1, ...; each (B, G, S, W)."""

    values: list[Any]
    length: int


class OnnxDecoder:
    """A model folder or file that ``diffattn export --onnx`` wrote, ready to run on the CPU.

    Args:
        path: the folder, or its ``model.onnx``.
        threads: threads of onnxruntime within one operator; ``None`` for as many as it chooses.
        optimize: whether onnxruntime may rewrite the graph when it loads; else every node runs as it was exported.

    Raises:
        UnsupportedError: onnxruntime is missing.
        CheckpointError: there is no such file, or it is no decoder's graph.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None, optimize: bool = True) -> None:
        require("onnxruntime")
        import onnxruntime

        file = Path(path) / MODEL_FILE if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise CheckpointError(
                f"{str(path)!r} holds no {MODEL_FILE}",
                "the folder of an exported model",
                "write one with diffattn export --onnx",
            )
        if threads is not None and threads < 1:
            raise ConfigError(f"threads is {threads}", "a whole number from 1", "leave it out for onnxruntime's choice")
        options = onnxruntime.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        # Threads that spin while they wait take the time of whatever shares the cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if not optimize:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self.session = onnxruntime.InferenceSession(os.fspath(file), options, providers=["CPUExecutionProvider"])
        # The library has one type for each of its states, all of them bare exceptions.
        except Exception as error:
            raise CheckpointError(
                f"{str(file)!r} cannot be loaded by onnxruntime ({one_line(error, 300)})",
                "a model that diffattn export wrote",
                "export it again",
            ) from error
        self._value = onnxruntime.OrtValue.ortvalue_from_numpy
        shapes = {value.name: value.shape for value in self.session.get_inputs()}
        self.past_names = [name for name in shapes if name.startswith(f"{PAST}.")]
        self.inputs = [name for name in shapes if name not in self.past_names]
        # Maps, which only a program that draws them needs, are left out.
        self.outputs = [value.name for value in self.session.get_outputs() if not value.name.startswith(f"{MAPS}.")]
        if "input_ids" not in shapes or self.outputs[0] != "logits":
            raise CheckpointError(
                f"{str(file)!r} is no decoder", "a model that takes input_ids and gives logits", "export it again"
            )
        self._past_shapes = [shapes[name] for name in self.past_names]

    @property
    def has_cache(self) -> bool:
        """True where the graph takes keys and values of earlier tokens and returns those of all."""
        return bool(self.past_names)

    def empty_cache(self, batch: int) -> Cache:
        """Returns a cache of length 0 for ``batch`` rows."""
        return Cache(
            [self._value(np.zeros((batch, heads, 0, width), np.float32)) for _, heads, _, width in self._past_shapes], 0
        )

    def logits(
        self, input_ids: Ids, attention_mask: Ids | None = None, cache: Cache | None = None
    ) -> tuple[Floats, Cache]:
        """Returns the logits of new tokens, and the cache of all tokens so far.

        Args:
            input_ids: (B, T).
            attention_mask: (B, P + T), 1 for a token and 0 for padding, which may stand on the left; ``None`` for ones.
            cache: what the last call returned. Default: none yet.

        Returns:
            (B, T, V) in float32, and the cache; of a graph without one, an empty cache.
        """
        batch, new = input_ids.shape
        cache = self.empty_cache(batch) if cache is None else cache
        if attention_mask is None:
            attention_mask = np.ones((batch, cache.length + new), np.int64)
        if attention_mask.shape != (batch, cache.length + new):
            raise ConfigError(
                f"attention_mask is {attention_mask.shape}",
                f"{(batch, cache.length + new)}",
                "give a column for each cached and each new token",
            )
        # Positions count tokens, not padding, as in transformers' generate.
        positions = np.maximum(attention_mask.cumsum(axis=1) - 1, 0)[:, cache.length :]
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions}
        feed = {name: self._value(np.ascontiguousarray(given[name], np.int64)) for name in self.inputs}
        feed |= dict(zip(self.past_names, cache.values, strict=True))
        logits, *present = self.session.run_with_ort_values(self.outputs, feed)
        return logits.numpy(), Cache(present, cache.length + new if self.has_cache else 0)

    def generate(
        self,
        input_ids: Ids,
        max_new_tokens: int,
        *,
        attention_mask: Ids | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[int] = (),
    ) -> Ids:
        """Returns the prompt and ``max_new_tokens`` more of every row, fewer where all rows have stopped.

        Args:
            input_ids: (B, T), padded on the left.
            max_new_tokens: at most this many more.
            attention_mask: (B, T); ``None`` for ones.
            temperature: 0 for the likeliest token (greedy), else the logits are divided by it and one is drawn.
            top_p: draw from the likeliest tokens that together have this probability.
            seed: the seed of the draws.
            stop: tokens that end a row, which is filled up with the first of them.
        """
        if temperature < 0 or not 0 < top_p <= 1:
            raise ConfigError(
                f"temperature is {temperature} and top_p {top_p}",
                "a temperature from 0, and a top_p above 0 and up to 1",
                "leave both out for the likeliest token",
            )
        random = np.random.default_rng(seed)
        mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
        text, cache, going = input_ids, None, np.ones(len(input_ids), bool)
        for _ in range(max_new_tokens):
            new = text[:, cache.length :] if cache is not None else text
            logits, cache = self.logits(new, mask, cache)
            token = _choose(logits[:, -1], temperature, top_p, random)
            if len(stop):
                token = np.where(going, token, stop[0])
                going &= ~np.isin(token, stop)
            text = np.concatenate([text, token[:, None]], axis=1)
            mask = np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)
            if not going.any():
                break
        return text


def _choose(logits_BV: Floats, temperature: float, top_p: float, random: np.random.Generator) -> Ids:
    if temperature == 0:
        return logits_BV.argmax(axis=-1)
    scaled = logits_BV.astype(np.float64) / temperature
    p = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    order = np.argsort(-p, axis=-1, kind="stable")
    sorted_p = np.take_along_axis(p, order, axis=-1)
    # A token stays while those before it have not reached top_p.
    kept = np.where(sorted_p.cumsum(axis=-1) - sorted_p < top_p, sorted_p, 0.0)
    drawn = random.random((len(p), 1)) * kept.sum(axis=-1, keepdims=True)
    index = (kept.cumsum(axis=-1) <= drawn).sum(axis=-1, keepdims=True)
    # Rounding may leave the draw at the very end of what is kept.
    index = np.minimum(index, (kept > 0).sum(axis=-1, keepdims=True) - 1)
    return np.take_along_axis(order, index, axis=-1)[:, 0]
