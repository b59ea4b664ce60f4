"""The values that each field of a model's ``config.json`` may have, in one table for all that make, read or plan one.

A file can hold anything: a NaN, a size in quotes, a number that would take years to build. Each field is looked up here
before anything is computed with it, so that every impossible value is refused in the same form, in one line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from diffattn.errors import ConfigError
from diffattn.layer_kinds import LAYER_TYPES, check_unrotated, layer_types_of
from diffattn.variants import ATTENTIONS, DEFAULT

OURS = "diff_transformer"
LAMBDA_FORMS = ("sigmoid", "linear", "one")
POLY_NORM = "poly_norm"
"""The activation function with parameters that is ours, beside those of ``transformers``."""
DTYPES = ("float32", "bfloat16", "float16", "float64")
# The content of a config.json, of our model or of another library's: it may hold anything.
Config = dict[str, Any]


@dataclass(frozen=True)
class Field:
    """The values that a field may have: a test of a value, and the words for it in an error."""

    allows: Callable[[Any], bool]
    """Returns whether a value is allowed."""
    wanted: str
    """The allowed values in words, for an error."""
    optional: bool = False
    """True where null (None) is allowed and means the default."""
    way_out: str = "correct it"
    """The last part of an error: what the reader can do."""
    most: int | None = None
    """The largest allowed integer, if there is one."""


def is_whole(value: object) -> TypeGuard[int]:
    """Returns whether a value is an integer; True and 4.0 are not.

    >>> is_whole(4), is_whole(4.0), is_whole(True), is_whole("4")
    (True, False, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[int | float]:
    """Returns whether a value is a finite number that a float can hold.

    >>> is_number(1e-5), is_number(float("nan")), is_number("1"), is_number(10**400)
    (True, False, False, False)
    """
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def is_count(value: object) -> bool:
    """Returns whether a value is a count as our files hold them: a whole number from 0 that 64 bits can hold."""
    return is_whole(value) and 0 <= value < 2**63


def is_measure(value: object) -> bool:
    """Returns whether a value is a measured number as our files hold them: finite, and far from the largest float."""
    return is_number(value) and abs(value) < 1e300


def shown(value: object) -> str:
    """Returns a value of any kind as a few words on one line.

    >>> shown("a\\nb"), shown([1] * 999)
    ("'a\\\\nb'", '[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1 …')
    """
    if is_whole(value) and abs(value) >= 10**30:
        # Python itself refuses to write a number of thousands of digits.
        return f"{'-' if value < 0 else ''}1e{value.bit_length() * 3 // 10}"
    try:
        text = " ".join(repr(value).split())
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} of thousands of digits or parts"
    return text if len(text) <= 60 else f"{text[:59]} …"


def dtype_name(dtype: object) -> str:
    """The name of a ``torch.dtype`` without the library's in front; torch itself is not needed for it.

    >>> dtype_name("torch.bfloat16")
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def integer(most: int, least: int = 1, *, optional: bool = False) -> Field:
    """Returns a field that is a whole number from ``least`` (1 or 0) to ``most``."""
    return Field(
        lambda value: is_whole(value) and least <= value <= most,
        "a positive integer" if least else "an integer from 0",
        optional,
        "write it without quotes or a point",
        most,
    )


def _number(wanted: str, allows: Callable[[float], bool], *, optional: bool = False) -> Field:
    return Field(lambda value: is_number(value) and allows(value), wanted, optional)


def _one_of(names: Iterable[str]) -> Field:
    return Field(lambda value: isinstance(value, str) and value in names, f"one of {', '.join(names)}")


_FLAG = Field(lambda value: isinstance(value, bool), "true or false")
_FLAG_OR_OWN = Field(_FLAG.allows, "true, false or null", optional=True)


def _below_one(value: object) -> bool:
    given = value if isinstance(value, list) else [value]
    return bool(given) and all(is_number(each) and -1e30 < each < 1 for each in given)


# A smaller ε is none in float32, and a larger one hides what it is added to.
_EPSILON = _number("a finite number above 0 (1e-37 to 1)", lambda value: 1e-37 <= value <= 1)
_SPREAD = _number("a finite number from 0 to 100", lambda value: 0 <= value <= 100)
# float32 can hold these numbers and their reciprocals.
_FACTOR = _number("a finite number above 0 (1e-30 to 1e30)", lambda value: 1e-30 <= value <= 1e30)
_FACTORS = Field(
    lambda value: isinstance(value, list | tuple) and bool(value) and all(_FACTOR.allows(each) for each in value),
    "a list of finite numbers above 0",
)
_SIZE = integer(10**7)
_NOISE = replace(integer(10**5, optional=True), way_out="leave it out for one noise head for each key/value head")
_POSITIONS = integer(10**9)
_TOKEN = Field(lambda value: is_whole(value) and value >= 0, "the id of a token, from 0, or null", optional=True)
_TOKENS = Field(
    lambda value: (
        _TOKEN.allows(value) or (isinstance(value, list) and bool(value) and all(_TOKEN.allows(each) for each in value))
    ),
    "the id of a token, from 0, a list of such ids, or null",
    optional=True,
)
# Fields that the library reads from every configuration and that no decoder of ours has.
_ABSENT = Field(lambda value: False, "null", optional=True, way_out="leave it out, since no model of ours has it")
_ROPE = Field(lambda value: isinstance(value, dict), "an object such as {'rope_type': 'default'}, or null", True)

FIELDS: dict[str, Field] = {
    "attention": _one_of(ATTENTIONS),
    "vocab_size": integer(10**9),
    "hidden_size": _SIZE,
    "intermediate_size": _SIZE,
    "num_hidden_layers": integer(10**6),
    "num_attention_heads": integer(10**5),
    "num_key_value_heads": integer(10**5, optional=True),
    "head_dim": integer(10**5, optional=True),
    "num_noise_heads": _NOISE,
    "signals_per_noise": _NOISE,
    "hidden_act": Field(lambda value: isinstance(value, str), "the name of an activation function"),
    "max_position_embeddings": _POSITIONS,
    "initializer_range": _SPREAD,
    "rms_norm_eps": _EPSILON,
    "use_cache": _FLAG,
    "pad_token_id": _TOKEN,
    "bos_token_id": _TOKEN,
    "eos_token_id": _TOKENS,
    "tie_word_embeddings": _FLAG,
    "rope_parameters": _ROPE,
    "rope_scaling": _ROPE,
    "rope_theta": replace(_FACTOR, way_out="the default is 10000.0"),
    # Each head of V1 is scaled by 1 − lambda_init.
    "lambda_init": Field(
        _below_one, "a finite number below 1, or a list with one for each layer", True, "leave it out for the schedule"
    ),
    "lambda_std": _SPREAD,
    "subln_affine": _FLAG,
    "subln_eps": _EPSILON,
    "head_norm": _FLAG_OR_OWN,
    "lambda_form": _one_of(LAMBDA_FORMS),
    "pairs_share_group": _FLAG,
    "attention_bias": _FLAG,
    "attention_output_bias": _FLAG,
    "mlp_bias": _FLAG,
    "qk_norm": _FLAG,
    "dex_heads": Field(
        lambda value: (
            isinstance(value, list)
            and all(isinstance(heads, list) and all(is_whole(head) for head in heads) for heads in value)
        ),
        "for every layer a list of heads, or null",
        optional=True,
    ),
    # The caches of transformers cannot hold a window of one token.
    "sliding_window": Field(lambda value: is_whole(value) and 2 <= value <= 10**9, "an integer from 2, or null", True),
    "layer_types": Field(
        lambda value: isinstance(value, list) and all(each in LAYER_TYPES for each in value),
        f"a list of {' and '.join(LAYER_TYPES)}, one for each layer, or null",
        optional=True,
    ),
    "unrotated_layers": Field(
        lambda value: isinstance(value, list) and all(is_whole(each) for each in value),
        "a list of layers, from 0, or null",
        optional=True,
    ),
    "is_causal": _FLAG,
    **dict.fromkeys(("attention_chunk_size", "per_layer_config"), _ABSENT),
    "is_encoder_decoder": Field(lambda value: value is False, "false", way_out=_ABSENT.way_out),
    # The library makes a name for each label, so a huge number would fill the memory.
    "num_labels": integer(10**6, 0, optional=True),
    # The value may be a torch.dtype, whose name begins with the library's.
    "dtype": Field(
        lambda value: value in DTYPES if isinstance(value, str) else dtype_name(value) in DTYPES,
        f"one of {', '.join(DTYPES)}, or null",
        optional=True,
    ),
}
_LONG_SCALE = _number("a finite number from 0, or null", lambda value: 0 <= value < 1e30, optional=True)
_OPTIONAL_FACTOR = Field(_FACTOR.allows, "a finite number above 0 (1e-30 to 1e30), or null", optional=True)
# The fields of rope_parameters, and below it, for each type, those that must be there.
_ROPE_FIELDS: dict[str, Field] = {
    "rope_theta": _FACTOR,
    "factor": _FACTOR,
    "low_freq_factor": _FACTOR,
    "high_freq_factor": _FACTOR,
    "original_max_position_embeddings": _POSITIONS,
    "short_factor": _FACTORS,
    "long_factor": _FACTORS,
    "attention_factor": _OPTIONAL_FACTOR,
    "beta_fast": _OPTIONAL_FACTOR,
    "beta_slow": _OPTIONAL_FACTOR,
    "mscale": _LONG_SCALE,
    "mscale_all_dim": _LONG_SCALE,
    "truncate": _FLAG,
}
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

# The names that configurations of other libraries have for the fields above.
_OTHER_NAMES = {
    "hidden_size": ("n_embd", "d_model"),
    "intermediate_size": ("n_inner", "d_ff", "ffn_dim"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "max_position_embeddings": ("n_positions", "n_ctx"),
    "rms_norm_eps": ("layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon"),
}
_SAME_NAMES = ("vocab_size", "num_key_value_heads", "head_dim", "initializer_range", "rope_theta", "num_labels")
_LAYERS = ("num_hidden_layers", *_OTHER_NAMES["num_hidden_layers"])


def check(fields: Mapping[str, Field], name: str, value: object, *, called: str | None = None) -> None:
    """Raises a ``ConfigError`` unless the field may have the value; an unknown field may have any.

    Args:
        fields: the table of fields.
        name: the field's name in the table.
        value: the value to check.
        called: the field's name in an error. Default: ``name``.

    >>> check(FIELDS, "rms_norm_eps", float("nan"))
    Traceback (most recent call last):
    diffattn.errors.ConfigError: rms_norm_eps=nan; wanted a finite number above 0 (1e-37 to 1): correct it
    """
    field = fields.get(name)
    if field is None or (value is None and field.optional) or field.allows(value):
        return
    wanted, way_out = field.wanted, field.way_out
    if field.most is not None and is_whole(value) and value > field.most:
        wanted, way_out = f"an integer of at most {field.most}", "correct it"
    raise ConfigError(f"{called or name}={shown(value)}", wanted, way_out)


def check_rope(rope: Config, width: int) -> None:
    """Raises a ``ConfigError`` unless rotary positions have a known type, all fields that it needs, and usable numbers.

    Args:
        rope: ``rope_parameters``; a field that is missing and not needed has the library's default.
        width: the width d of a head, all of whose channels are rotated.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise ConfigError(f"rope_type is {shown(kind)}", f"one of {', '.join(ROPE_TYPES)}", "correct it")
    for name in ROPE_TYPES[kind]:
        if name not in rope:
            raise ConfigError(f"rope_parameters of rope_type {kind} lack {name}", "that field", f"add {name}")
    for name, value in rope.items():
        check(_ROPE_FIELDS, name, value, called=f"rope_parameters: {name}")
    share = rope.get("partial_rotary_factor")
    if share is not None and not (is_number(share) and share == 1):
        raise ConfigError(
            f"partial_rotary_factor is {shown(share)}", "1, since our models rotate whole heads", "choose another model"
        )
    if rope.get("mrope_section"):
        raise ConfigError(
            "rope_parameters have mrope_section, for pictures", "positions of text alone", "choose a model of text"
        )
    if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise ConfigError(
            f"high_freq_factor of rope_parameters is {rope['high_freq_factor']}",
            f"a number above low_freq_factor, {rope['low_freq_factor']}",
            "correct it",
        )
    if kind == "longrope":
        for name in ROPE_TYPES[kind]:
            if len(rope[name]) != width // 2:
                raise ConfigError(
                    f"{name} of rope_parameters has {len(rope[name])} numbers",
                    f"{width // 2}, one for each pair of channels of a head",
                    "correct it",
                )


def check_ids(values: Mapping[str, Any], rows: int) -> None:
    """Raises a ``ConfigError`` unless every id of a special token is a row of the embedding."""
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        given = values.get(name)
        for index in given if isinstance(given, list) else [given]:
            if index is not None and index >= rows:
                raise ConfigError(
                    f"{name} is {shown(given)}",
                    f"ids from 0 to {rows - 1:,}, the rows of the vocabulary",
                    "correct it",
                )


def check_config(values: Config) -> None:
    """Raises a ``ConfigError`` for an impossible field of a ``config.json``, of our model or of another library's.

    >>> check_config({"model_type": "llama", "rms_norm_eps": -1})
    Traceback (most recent call last):
    diffattn.errors.ConfigError: rms_norm_eps=-1; wanted a finite number above 0 (1e-37 to 1): correct it
    """
    if values.get("model_type") != OURS:
        check_foreign(values)
        return
    for name, value in values.items():
        check(FIELDS, name, value)
    rope = values.get("rope_parameters")
    if rope and is_whole(values.get("head_dim")):
        check_rope(rope, values["head_dim"] // ATTENTIONS[values.get("attention", DEFAULT)].join)
    if is_whole(values.get("vocab_size")):
        check_ids(values, values["vocab_size"])
    if is_whole(layers := values.get("num_hidden_layers")):
        layer_types_of(values.get("sliding_window"), values.get("layer_types"), layers)
        check_unrotated(values.get("unrotated_layers"), layers)


def check_foreign(values: Config) -> None:
    """Raises a ``ConfigError`` for sizes, ε and rotary positions that no decoder of any architecture can have.

    The architecture's own class checks the other fields, lists (such as a size for each layer) and nulls. A size may be
    0, for a part that the model does not have.

    Args:
        values: the ``config.json`` of another library's model.
    """
    names = {name: name for name in _SAME_NAMES}
    for ours, others in _OTHER_NAMES.items():
        names |= dict.fromkeys((ours, *others), ours)
    for name, value in values.items():
        # The library writes a NaN or an infinity, which JSON does not have, as such an object.
        if isinstance(value, dict) and "__float__" in value:
            value = float("nan")
        absent = name not in ("rope_theta", *_OTHER_NAMES["rms_norm_eps"]) and is_whole(value) and value == 0
        left_open = value is None or isinstance(value, list | dict) or absent
        if name in names and not left_open:
            check(FIELDS, names[name], value, called=name)
        if name in ("rope_parameters", "rope_scaling"):
            _check_foreign_rope(value)
        if name in ("text_config", "llm_config", "language_config") and isinstance(value, dict):
            check_foreign(value)


def _check_foreign_rope(rope: object) -> None:
    # Some architectures have rotary positions for each kind of layer.
    for name, value in rope.items() if isinstance(rope, dict) else ():
        if isinstance(value, dict):
            _check_foreign_rope(value)
        elif value is not None:
            check(_ROPE_FIELDS, name, value, called=f"rope_parameters: {name}")


def layers_of(values: Config) -> int:
    """The number of layers in a ``config.json`` of any architecture; 0 where the file does not say it.

    >>> layers_of({"n_layer": 12}), layers_of({"text_config": {"num_hidden_layers": 3}}), layers_of({})
    (12, 3, 0)
    """
    nested = values.get("text_config")
    found = [values[name] for name in _LAYERS if is_whole(values.get(name))]
    return max([*found, layers_of(nested) if isinstance(nested, dict) else 0])
