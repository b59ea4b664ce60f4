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
PAST, PRESENT, MAPS, KEEP = "past_key_values", "present", "maps", "num_logits_to_keep"
HEAD = "lm_head"
SHARED_KEY = "shares_cache_buffers"
LEAST_PLACES = 64
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
    """Keys and values of all layers as onnxruntime's own values: key 0, value 0, key 1, ...; each (B, G, places, W).

    Where a graph writes into them, there may be more places than tokens, and a cache that goes on has the same values
    as the one before. Each stays what it was: of two that go on from one, the second gets values of its own.
    """

    values: list[Any]
    """Keys and values."""
    length: int
    """Tokens of which they are."""
    written: list[int]
    """The tokens that the values hold by now: one number, which all caches with the same values share."""


class OnnxDecoder:
    """A model folder or file that ``diffattn export --onnx`` wrote, ready to run on the CPU.

    Args:
        path: the folder, or its ``model.onnx``.
        threads: threads of onnxruntime within one operator; ``None`` for as many as it chooses.
        optimize: whether onnxruntime may rewrite the graph when it loads; else every node runs as it was exported.
        profile: where onnxruntime writes down how long each operator takes, and its time, behind this name. Default:
            nowhere.

    Raises:
        UnsupportedError: onnxruntime is missing.
        CheckpointError: there is no such file, or it is no decoder's graph.
    """

    def __init__(
        self, path: str | Path, *, threads: int | None = None, optimize: bool = True, profile: Path | None = None
    ) -> None:
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
        # Mistakes come as exceptions. It warns that the number of logits is no constant, as it should be.
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        # Threads that spin while they wait take the time of whatever shares the cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, os.fspath(profile)
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
        self.value = onnxruntime.OrtValue.ortvalue_from_numpy
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
        self._keeps = any(value.name == KEEP for value in self.session.get_overridable_initializers())
        self.shares_buffers = self.session.get_modelmeta().custom_metadata_map.get(SHARED_KEY) == "yes"
        self._bound: tuple[Any, Any] | None = None

    @property
    def has_cache(self) -> bool:
        """True where the graph takes keys and values of earlier tokens and returns those of all."""
        return bool(self.past_names)

    def empty_cache(self, batch: int, places: int = 0) -> Cache:
        """Returns a cache of length 0 for ``batch`` rows.

        Args:
            batch: rows.
            places: tokens that it will hold; where a graph writes into a cache, it then need not grow.
        """
        return Cache([self.value(array) for array in self._zeros(batch, places if self.shares_buffers else 0)], 0, [0])

    def _zeros(self, batch: int, places: int) -> list[Floats]:
        return [np.zeros((batch, heads, places, width), np.float32) for _, heads, _, width in self._past_shapes]

    def logits(
        self,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        cache: Cache | None = None,
        *,
        last: int = 0,
    ) -> tuple[Floats, Cache]:
        """Returns the logits of new tokens, and the cache of all tokens so far.

        Args:
            input_ids: (B, T).
            attention_mask: (B, P + T), 1 for a token and 0 for padding, which may stand on the left; ``None`` for ones.
            cache: what the last call returned. Default: none yet.
            last: the tokens at the end whose logits are wanted; 0 for all.

        Returns:
            (B, T or ``last``, V) in float32, and the cache; of a graph without one, an empty cache.
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
        if self.shares_buffers and min(batch - 1, new - 1, cache.length) > 0:
            # onnxruntime's kernel takes several tokens behind a cache in one row only.
            return self._one_by_one(input_ids, attention_mask, cache, last)
        feed = {name: self.value(np.ascontiguousarray(given[name], np.int64)) for name in self.inputs}
        if self._keeps:
            feed[KEEP] = self.value(np.array(last, np.int64))
        if self.shares_buffers:
            logits, cache = self._run_in_place(feed, cache, cache.length + new)
        else:
            feed |= dict(zip(self.past_names, cache.values, strict=True))
            found, *present = self.session.run_with_ort_values(self.outputs, feed)
            length = cache.length + new if self.has_cache else 0
            logits, cache = found.numpy(), Cache(present, length, [length])
        return (logits if self._keeps else logits[:, -last:]), cache

    def _one_by_one(self, input_ids: Ids, attention_mask: Ids, cache: Cache, last: int) -> tuple[Floats, Cache]:
        found = []
        for place in range(input_ids.shape[1]):
            seen = attention_mask[:, : cache.length + 1]
            logits, cache = self.logits(input_ids[:, place : place + 1], seen, cache)
            found.append(logits)
        return np.concatenate(found[-last:], axis=1), cache

    def _run_in_place(self, feed: dict[str, Any], cache: Cache, length: int) -> tuple[Floats, Cache]:
        """Runs with one buffer for past and present of each key and value."""
        values, written = cache.values, cache.written
        batch, _, places, _ = values[0].shape()
        if length > places or written[0] != cache.length:
            # Doubled, so that all copies together are no more than the buffers.
            grown = self._zeros(batch, max(length, 2 * places, LEAST_PLACES) if length > places else places)
            for array, value in zip(grown, values, strict=True):
                array[:, :, : cache.length] = value.numpy()[:, :, : cache.length]
            values, written = [self.value(array) for array in grown], [cache.length]
        if self._bound is None or self._bound[0] is not values:
            binding = self.session.io_binding()
            for name, value in zip(self.past_names, values, strict=True):
                binding.bind_ortvalue_input(name, value)
                binding.bind_ortvalue_output(name.replace(PAST, PRESENT), value)
            self._bound = values, binding
        binding = self._bound[1]
        for name, value in feed.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding)
        written[0] = length
        return binding.get_outputs()[-1].numpy(), Cache(values, length, written)

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
        text, going = input_ids, np.ones(len(input_ids), bool)
        cache = self.empty_cache(len(input_ids), input_ids.shape[1] + max_new_tokens)
        for _ in range(max_new_tokens):
            logits, cache = self.logits(text[:, cache.length :], mask, cache, last=1)
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
