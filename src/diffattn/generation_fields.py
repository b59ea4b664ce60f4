"""The values that each field of a model's ``generation_config.json`` may have."""

from __future__ import annotations

from collections.abc import Callable

from diffattn.config_fields import FIELDS, Field, integer, is_number

_TOKENS = FIELDS["eos_token_id"]
_FLAG = Field(lambda value: isinstance(value, bool), "true, false or null", optional=True)


def _number(wanted: str, allows: Callable[[float], bool]) -> Field:
    return Field(lambda value: is_number(value) and allows(value), wanted, optional=True)


GENERATION: dict[str, Field] = {
    "bos_token_id": _TOKENS,
    "eos_token_id": _TOKENS,
    "pad_token_id": _TOKENS,
    "temperature": _number("a finite number from 0, or null", lambda value: value >= 0),
    "top_p": _number("a number from 0 to 1, or null", lambda value: 0 <= value <= 1),
    "min_p": _number("a number from 0 to 1, or null", lambda value: 0 <= value <= 1),
    "top_k": integer(10**9, 0, optional=True),
    "repetition_penalty": _number(
        "a finite number above 0 (1e-30 to 1e30), or null", lambda value: 1e-30 <= value <= 1e30
    ),
    "length_penalty": _number("a finite number, or null", lambda value: True),
    "max_length": integer(10**9, 0, optional=True),
    "max_new_tokens": integer(10**9, optional=True),
    "num_beams": integer(10**5, optional=True),
    "do_sample": _FLAG,
    "use_cache": _FLAG,
}
