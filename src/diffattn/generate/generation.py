"""Writes text with a model in a folder, piece by piece: greedy, drawn, by beams, or drafted by a smaller model.

The decoding itself is ``generate`` of ``transformers``; this file checks its options before anything is loaded, and
measures the time. Only the given options count: from a checkpoint's own ``generation_config.json`` only the tokens that
end a text are taken.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation.streamers import BaseStreamer

from diffattn.errors import CheckpointError, ConfigError, one_line
from diffattn.generate.decoding import Decoding, check_assisted, generation_config
from diffattn.generate.options import GenerateOptions
from diffattn.model.loading import check_tokens, load, positions_of
from diffattn.model.options import Device, Dtype, LoadOptions
from diffattn.progress import OnStage, Stage, unseen


@dataclass(frozen=True, kw_only=True)
class Generated:
    """A text and the time that it took, in seconds of the wall clock; a time that was not measured is None."""

    prompt: str
    text: str
    """The text after the prompt."""
    prompt_tokens: int
    new_tokens: int
    """The tokens of the text, with the end-of-text token if there was one."""
    load_seconds: float | None
    """The seconds to load the model."""
    first_token_seconds: float | None
    """The seconds from the call to the first token: the prompt's forward pass. Beams have no first token."""
    seconds: float
    """The seconds of the whole generation, without loading."""
    tokens_per_second: float | None
    """The speed of the tokens after the first."""
    weight_bytes: int
    """The bytes that are read for each token: all weights, except an embedding of which only one row is read."""


def generate(
    folder: str | Path,
    prompt: str,
    decoding: Decoding | None = None,
    *,
    chat: bool = GenerateOptions.chat,
    dtype: Dtype = LoadOptions.dtype,
    device: Device = LoadOptions.device,
    attn_implementation: str | None = GenerateOptions.attn_implementation,
    assistant: str | Path | None = GenerateOptions.assistant,
    on_text: Callable[[str], None] | None = None,
    on_stage: OnStage = unseen,
) -> Generated:
    """Continues a prompt with the model in a folder.

    Args:
        folder: folder of a model, as :func:`diffattn.model.loading.load` takes it.
        prompt: the text to continue, or with ``chat`` the user's message.
        decoding: the choice of the next token. Default: that of :class:`diffattn.generate.decoding.Decoding`.
        chat, attn_implementation, assistant: see :class:`diffattn.generate.options.GenerateOptions`.
        dtype, device: see :class:`diffattn.model.options.LoadOptions`.
        on_text: called with each piece of text as soon as it is whole, in this thread; with beams once, at the end.
        on_stage: called with each stage of the work before the first piece of text.

    Returns:
        The text, which ``on_text`` got in pieces, and the counts and times.

    Raises:
        ConfigError: a prompt that is empty or too long for the model's positions, or options that exclude each other.
        CheckpointError, UnsupportedError: the same as ``load``; or a tokenizer or an assistant of another model.
    """
    decoding = decoding or Decoding()
    check_prompt(prompt)
    if assistant is not None:
        check_assisted(decoding)
    on_stage(Stage("loading the model"))
    began = time.perf_counter()
    model, tokenizer = load(folder, dtype, device, attn_implementation)
    draft = None
    if assistant is not None:
        draft, spoken = load(assistant, dtype, device)
        if spoken.get_vocab() != tokenizer.get_vocab():
            raise CheckpointError(
                f"the tokenizer of the assistant {str(assistant)!r} is not that of {str(folder)!r}",
                "a smaller model with the same tokenizer, whose tokens can be checked",
                "choose another --assistant, or leave it out",
            )
    load_seconds = time.perf_counter() - began
    on_stage(Stage("reading the prompt" if decoding.num_beams == 1 else "writing the text"))
    result = continue_text(model, tokenizer, prompt, decoding, chat=chat, assistant=draft, on_text=on_text)
    return replace(result, load_seconds=load_seconds)


def continue_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    decoding: Decoding | None = None,
    *,
    chat: bool = False,
    assistant: PreTrainedModel | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Generated:
    """Continues a prompt like :func:`generate`, with a model and a tokenizer that are loaded already."""
    decoding = decoding or Decoding()
    check_prompt(prompt)
    if assistant is not None:
        check_assisted(decoding)
    ids = _encode(model, tokenizer, prompt, chat)
    _check_length(model, ids, decoding)
    stream = _Stream(tokenizer, on_text or (lambda text: None))
    ends = model.generation_config.eos_token_id
    config = generation_config(model, decoding, tokenizer.eos_token_id if ends is None else ends)
    beams = decoding.num_beams > 1
    began = time.perf_counter()
    with _own_options(model), torch.random.fork_rng(_devices(model)):
        torch.manual_seed(decoding.seed)
        output: Any = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            streamer=None if beams else stream,
            logits_processor=LogitsProcessorList([_Numbers()]),
            **({} if assistant is None else {"assistant_model": assistant}),
        )
    seconds = time.perf_counter() - began
    if beams:
        stream.write(output[0, ids.shape[1] :].tolist())
        stream.end()
    first = None if stream.first is None or beams else stream.first - began
    later = len(stream.tokens) - stream.first_count
    return Generated(
        prompt=prompt,
        text="".join(stream.pieces),
        prompt_tokens=ids.shape[1],
        new_tokens=len(stream.tokens),
        load_seconds=None,
        first_token_seconds=first,
        seconds=seconds,
        tokens_per_second=later / (seconds - first) if first is not None and later else None,
        weight_bytes=_weight_bytes(model),
    )


def check_prompt(prompt: str, what: str = "prompt") -> None:
    """Raises a ``ConfigError`` for a prompt that is empty or no text, before anything is loaded for it."""
    if not prompt:
        raise ConfigError(f"the {what} is empty", "a text to continue", "write at least one character")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"character {error.start} of the {what} is no text", f"a {what} in UTF-8", "convert it to UTF-8"
        ) from None


class _Numbers(LogitsProcessor):
    """Refuses a model whose logits are no numbers; it would write the first token of the vocabulary again and again."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if bool((scores.isnan() | scores.isposinf()).any()):
            raise CheckpointError(
                "the model's logits are no finite numbers, since its weights are too large for their dtype, or damaged",
                "finite logits",
                "take --dtype float32, or an earlier checkpoint",
            )
        return scores


class _Stream(BaseStreamer):
    """Turns tokens into text as soon as its characters are whole, and notes the time of the first token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        self.tokenizer = tokenizer
        self.on_text = on_text
        self.tokens: list[int] = []
        self.pieces: list[str] = []
        self.first: float | None = None
        # The tokens that came together with the first; with an assistant several come at once.
        self.first_count = 0
        self._prompt_is_next = True
        self._decoder = None
        if tokenizer.is_fast:
            from tokenizers.decoders import DecodeStream

            self._decoder = DecodeStream(skip_special_tokens=True)

    def put(self, value: Tensor) -> None:
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        self.write(value.flatten().tolist())

    def write(self, tokens: list[int]) -> None:
        if self.first is None:
            self.first, self.first_count = time.perf_counter(), len(tokens)
        self.tokens.extend(tokens)
        if self._decoder is not None:
            backend = self.tokenizer.backend_tokenizer
            self._emit("".join(self._decoder.step(backend, token) or "" for token in tokens))

    def end(self) -> None:
        # Write the rest: half a character, or everything if the tokenizer cannot decode piece by piece.
        whole: Any = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        self._emit(whole[len("".join(self.pieces)) :])

    def _emit(self, text: str) -> None:
        if text:
            self.pieces.append(text)
            self.on_text(text)


def _encode(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> Tensor:
    """Returns the ids ``(1, T)`` of the prompt, on the model's device."""
    if chat:
        if not tokenizer.chat_template:
            raise ConfigError(
                "the tokenizer has no chat template", "a model that was trained to chat", "leave --chat out"
            )
        said = [{"role": "user", "content": prompt}]
        try:
            encoded: Any = tokenizer.apply_chat_template(
                said, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        # A template is a program from the model's folder, so it can raise anything.
        except Exception as error:
            raise CheckpointError(
                f"the tokenizer's chat template fails ({one_line(error)})",
                "a template that takes one message of a user",
                "correct it, or leave --chat out",
            ) from error
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    ids: Tensor = encoded["input_ids"]
    if ids.numel() == 0:
        raise ConfigError(f"the prompt {prompt!r} has no tokens", "a text to continue", "write another prompt")
    check_tokens(model, ids.flatten().tolist())
    return ids.to(model.device)


def _check_length(model: PreTrainedModel, ids: Tensor, decoding: Decoding) -> None:
    positions = positions_of(model.config)
    length, new = ids.shape[1], decoding.max_new_tokens
    if positions is None or length + new <= positions:
        return
    way = f"max_new_tokens of at most {positions - length}" if length < positions else "a shorter prompt"
    raise ConfigError(
        f"the prompt has {length:,} tokens and {new:,} more are asked for",
        f"at most {positions:,} together, the positions of the model",
        f"take {way}",
    )


@contextlib.contextmanager
def _own_options(model: PreTrainedModel) -> Iterator[None]:
    """Removes the checkpoint's own options (such as a penalty) inside the block; they would replace missing ones."""
    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


def _devices(model: PreTrainedModel) -> list[int]:
    """The GPUs whose random state is restored after the draws; that of the CPU is always restored."""
    return [model.device.index or 0] if model.device.type == "cuda" else []


def _weight_bytes(model: PreTrainedModel) -> int:
    weights = {parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    if head is not None and head.weight is not embedding:
        weights.pop(embedding.data_ptr(), None)
    return sum(weights.values())
