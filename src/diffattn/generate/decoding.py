"""The options of decoding, which are checked before anything is loaded and passed on to ``transformers``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from diffattn.errors import ConfigError, UnsupportedError
from diffattn.model.options import DECODING, GREEDY_BELOW

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

CACHES = ("dynamic", "static", "quantized")
Cache = Literal["dynamic", "static", "quantized"]
# The most 4-bit keys and values that share one scale.
_LONGEST_GROUP = 64


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """The choice of the next token, and of where keys and values are kept.

    Raises:
        ConfigError: a value out of its range, or options that exclude each other.

    >>> Decoding(temperature=0.8, top_p=0.95).top_k
    0
    """

    max_new_tokens: int = 128
    """Tokens to write at most; an end-of-text token ends the text sooner."""
    temperature: float = 0.0
    """Freedom of the text: 0 always takes the likeliest token; above 0, tokens are drawn from the logits divided by
    this number."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability, 0 to 1."""
    top_k: int = 0
    """Draw from this many of the likeliest tokens; 0 means all."""
    min_p: float = 0.0
    """Draw from the tokens that have at least this part of the likeliest one's probability, 0 to 1."""
    repetition_penalty: float = 1.0
    """Factor that makes a token less likely once the text has it; 1 changes nothing."""
    seed: int = 0
    """Random seed for the tokens that are drawn."""
    num_beams: int = 1
    """Texts that are continued side by side; the likeliest is printed, once it is whole."""
    cache: Cache = "dynamic"
    """Place of keys and values of earlier tokens. dynamic: it grows. static: as long as the text may become, at once.
    quantized: all but the last 128 tokens in 4 bits each (needs optimum-quanto)."""

    def __post_init__(self) -> None:
        for name, wanted in DECODING.items():
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, wanted.read(value))
            except ValueError:
                raise ConfigError(f"{name} is {value!r}", str(wanted), f"change {_option(name)}") from None
        if self.cache not in CACHES:
            raise ConfigError(f"cache is {self.cache!r}", f"one of {', '.join(CACHES)}", "change --cache")
        filters = {"top_p": 1, "top_k": 0, "min_p": 0}
        given = next((name for name, all_of_them in filters.items() if getattr(self, name) != all_of_them), None)
        if self.temperature == 0 and given is not None:
            raise ConfigError(
                f"{given} is {getattr(self, given)} and temperature is 0, which always takes the likeliest token",
                "a temperature above 0 to draw with",
                f"add --temperature 1, or leave {_option(given)} out",
            )
        if self.temperature and self.num_beams > 1:
            raise ConfigError(
                f"num_beams is {self.num_beams} and temperature is {self.temperature}",
                "one of them, since beams look for the likeliest text and draw nothing",
                "leave --num-beams or --temperature out",
            )

    @property
    def draws(self) -> bool:
        return self.temperature >= GREEDY_BELOW


def check_assisted(decoding: Decoding) -> None:
    """Raises a ``ConfigError`` for options that an assistant cannot work with."""
    for given, what in ((decoding.num_beams > 1, f"num_beams is {decoding.num_beams}"),
                        (decoding.cache != "dynamic", f"cache is {decoding.cache!r}")):  # fmt: skip
        if given:
            raise ConfigError(
                f"{what} beside an assistant",
                "one text at a time with a cache that grows, from which tokens that the model refuses are taken out",
                f"leave --assistant or {_option(what.split()[0])} out",
            )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def generation_config(model: PreTrainedModel, decoding: Decoding, ends: int | list[int] | None) -> GenerationConfig:
    """Returns the options as ``generate`` of ``transformers`` takes them; ``ends`` are the ids that end a text.

    Raises:
        UnsupportedError: a quantised cache without the package that quantises.
    """
    from transformers import GenerationConfig

    # An assistant needs its own cache, which a cache by name would exclude; no name means the dynamic cache.
    options: dict[str, object] = {} if decoding.cache == "dynamic" else {"cache_implementation": decoding.cache}
    if decoding.draws:
        options |= {name: getattr(decoding, name) for name in ("temperature", "top_p", "top_k", "min_p")}
    if decoding.repetition_penalty != 1:
        options["repetition_penalty"] = decoding.repetition_penalty
    if decoding.cache == "quantized":
        from transformers.utils import is_optimum_quanto_available

        if not is_optimum_quanto_available():
            raise UnsupportedError(
                "cache is 'quantized'", "the package optimum-quanto", "pip install 'diffattn[quantized-cache]'"
            )
        options["cache_config"] = {"backend": "quanto", "nbits": 4, "q_group_size": _group_size(model)}
    pad = model.generation_config.pad_token_id
    if pad is None and ends is not None:
        # It pads a beam that has ended, and is not part of any text.
        pad = ends if isinstance(ends, int) else ends[0]
    return GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=decoding.draws,
        num_beams=decoding.num_beams,
        # On a CPU, compiling takes longer than writing one text.
        disable_compile=model.device.type == "cpu",
        eos_token_id=ends,
        pad_token_id=pad,
        bos_token_id=model.generation_config.bos_token_id,
        **options,
    )


def _group_size(model: PreTrainedModel) -> int:
    """Returns the largest divisor of a head's width up to 64, so that every token fills whole groups."""
    config = model.config.get_text_config(decoder=True)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return max(size for size in range(1, _LONGEST_GROUP + 1) if width % size == 0)
