"""The options of decoding, checked before anything is loaded, and as ``transformers`` takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from transformers import GenerationConfig, PreTrainedModel

from diffattn.errors import ConfigError, UnsupportedError
from diffattn.model.decoding_ranges import DECODING, GREEDY_BELOW

CACHES = ("dynamic", "static", "quantized")
Cache = Literal["dynamic", "static", "quantized"]
# Of 4-bit keys and values that share one scale, at most.
_LONGEST_GROUP = 64


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How the next token is chosen, and where keys and values wait for it.

    Args:
        max_new_tokens: where to stop if no end-of-text token comes first, from 1. Default: 128.
        temperature: the logits are divided by it and a token is drawn; 0 takes the likeliest token, and so does less
            than ``ranges.GREEDY_BELOW``. Default: 0.
        top_p: draw from the likeliest tokens that together have this probability, above 0, to 1. Default: 1, all.
        top_k: draw from this many likeliest tokens. Default: 0, all.
        min_p: draw from the tokens that have at least this part of the likeliest one's probability. Default: 0, all.
        repetition_penalty: divides the logits above 0 of tokens that the text has already, and multiplies the others.
            Default: 1, none.
        seed: of the draws. Default: 0.
        num_beams: texts that are kept, the likeliest of which is the result. Default: 1.
        cache: ``"dynamic"`` grows; ``"static"`` is as long as the text may become, for which a GPU's step is
            compiled; ``"quantized"`` holds the prompt and all but the last 128 tokens in 4 bits (needs optimum-quanto).
            Default: dynamic.

    Raises:
        ConfigError: a value out of its range, or options that exclude each other.

    >>> Decoding(temperature=0.8, top_p=0.95).top_k
    0
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    num_beams: int = 1
    cache: Cache = "dynamic"

    def __post_init__(self) -> None:
        for name, wanted in DECODING.items():
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, wanted.read(value))
            except ValueError:
                raise ConfigError(f"{name} is {value!r}; wanted {wanted}") from None
        if self.cache not in CACHES:
            raise ConfigError(f"cache is {self.cache!r}; wanted one of {', '.join(CACHES)}")
        filters = {"top_p": 1, "top_k": 0, "min_p": 0}
        given = next((name for name, all_of_them in filters.items() if getattr(self, name) != all_of_them), None)
        if self.temperature == 0 and given is not None:
            raise ConfigError(
                f"{given} is {getattr(self, given)} and temperature 0, which always takes the likeliest token; wanted "
                f"a temperature above 0 to draw with: add a temperature of 1, or leave {given} out"
            )
        if self.temperature and self.num_beams > 1:
            raise ConfigError(
                f"num_beams is {self.num_beams} and temperature {self.temperature}; beams look for the likeliest text "
                "and draw nothing: leave one of the two out"
            )

    @property
    def draws(self) -> bool:
        return self.temperature >= GREEDY_BELOW


def check_assisted(decoding: Decoding) -> None:
    """Raise a ``ConfigError`` for options that an assistant cannot work with."""
    for given, what in ((decoding.num_beams > 1, f"num_beams is {decoding.num_beams}"),
                        (decoding.cache != "dynamic", f"cache is {decoding.cache!r}")):  # fmt: skip
        if given:
            raise ConfigError(
                f"{what} beside an assistant, whose refused drafts are taken back out of one text's growing cache; "
                "leave one of the two out"
            )


def generation_config(model: PreTrainedModel, decoding: Decoding, ends: int | list[int] | None) -> GenerationConfig:
    """The options as ``generate`` of ``transformers`` takes them; ``ends`` are the ids that end a text.

    Raises:
        UnsupportedError: a quantised cache without the package that quantises.
    """
    # A cache by name excludes the one that an assistant's drafts are kept in, and dynamic is what no name gives.
    options: dict[str, Any] = {} if decoding.cache == "dynamic" else {"cache_implementation": decoding.cache}
    if decoding.draws:
        options |= {name: getattr(decoding, name) for name in ("temperature", "top_p", "top_k", "min_p")}
    if decoding.repetition_penalty != 1:
        options["repetition_penalty"] = decoding.repetition_penalty
    if decoding.cache == "quantized":
        from transformers.utils import is_optimum_quanto_available

        if not is_optimum_quanto_available():
            raise UnsupportedError("cache is 'quantized', which needs optimum-quanto: pip install optimum-quanto")
        options["cache_config"] = {"backend": "quanto", "nbits": 4, "q_group_size": _group_size(model)}
    pad = model.generation_config.pad_token_id
    if pad is None and ends is not None:
        # Behind the end of a beam that is done; nobody reads it.
        pad = ends if isinstance(ends, int) else ends[0]
    return GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=decoding.draws,
        num_beams=decoding.num_beams,
        # One text is shorter than a CPU's compiler takes.
        disable_compile=model.device.type == "cpu",
        eos_token_id=ends,
        pad_token_id=pad,
        bos_token_id=model.generation_config.bos_token_id,
        **options,
    )


def _group_size(model: PreTrainedModel) -> int:
    """The longest group up to 64 that ends where a head ends, so that any number of tokens is whole groups."""
    config = model.config.get_text_config(decoder=True)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return max(size for size in range(1, _LONGEST_GROUP + 1) if width % size == 0)
