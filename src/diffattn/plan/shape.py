"""The shape of a model: the softmax Transformer that is being replaced, in numbers.

One shape describes a whole pair. The variant of attention is not a part of it, so that a DIFF Transformer and its
softmax twin are planned and built from the same object and differ in one word.
"""

from __future__ import annotations

import functools
import importlib.resources
import tomllib
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path

from diffattn.config_fields import FIELDS, check, integer
from diffattn.errors import ConfigError, did_you_mean
from diffattn.quantities import COUNTS, MOST, whole
from diffattn.variants import VARIANTS

# More query heads than this for one key/value head are a mistake.
_MOST_GROUP = 256
# What a number of a shape is called in a configuration.
_FIELDS = {
    "hidden_size": "hidden_size", "intermediate_size": "intermediate_size", "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim",
    "vocab_size": "vocab_size", "max_position_embeddings": "max_position_embeddings",
    "tie_word_embeddings": "tie_word_embeddings", "rope_theta": "rope_theta", "signals_per_noise": "signals_per_noise",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of the softmax Transformer that a DIFF Transformer replaces.

    ``D = hidden_size``, ``n = num_heads``, ``G = num_kv_heads``, ``d = head_dim``: the query and output projections are
    ``n·d × D`` and ``D × n·d``, the key and value projections ``G·d × D``. V1 turns these n heads into n/2 output heads
    (the paper's "heads"), V2 into n output heads with 2n queries; neither changes a number here.

    Args:
        hidden_size: width D of the residual stream.
        num_layers: decoder layers.
        num_heads: softmax heads n; twice the number of V1 heads that the paper prints.
        num_kv_heads: key/value heads G, a divisor of n. Default: n.
        head_dim: head width d, even. Default: ``hidden_size / num_heads``, which must be whole.
        intermediate_size: width of the SwiGLU feed-forward network.
        vocab_size: rows of the embedding.
        tie_word_embeddings: whether the output projection is the embedding. Default: True.
        max_position_embeddings: longest sequence, in tokens. Default: 2048.
        rope_theta: base of the rotary frequencies, above 0. Default: 10000.
        signals_per_noise: signal heads r that share a noise head in grouped differential attention, a divisor of n / G;
            no other variant reads it. Default: None, which is n / G: one noise head for each key/value head.
        name: what the shape is called. Default: empty; the file's stem when read from a file.
        source: where the numbers come from. Default: empty.

    Raises:
        ConfigError: a number that no model can have.

    Source: arXiv 2410.05258v2, section 2 and Table 10.

    >>> shape = ModelShape(hidden_size=64, num_layers=2, num_heads=4, intermediate_size=176, vocab_size=256)
    >>> shape.num_kv_heads, shape.head_dim
    (4, 16)
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    # None stands for "not given" in the call alone: after __post_init__ both are always integers.
    num_kv_heads: int = None  # type: ignore[assignment]
    head_dim: int = None  # type: ignore[assignment]
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    signals_per_noise: int | None = None
    name: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        for key, field in _FIELDS.items():
            check(FIELDS, field, getattr(self, key), called=key)
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.head_dim is None:
            if self.hidden_size % self.num_heads:
                raise ConfigError(
                    f"hidden_size={self.hidden_size} with num_heads={self.num_heads}, without head_dim",
                    "a hidden_size that num_heads divides",
                    "change one of them or set head_dim",
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads={self.num_heads} with num_kv_heads={self.num_kv_heads}",
                "a num_kv_heads that divides num_heads",
                f"leave it out for num_kv_heads={self.num_heads}",
            )
        group = self.num_heads // self.num_kv_heads
        if self.signals_per_noise is not None and group % self.signals_per_noise:
            raise ConfigError(
                f"signals_per_noise={self.signals_per_noise} with num_heads={self.num_heads} and "
                f"num_kv_heads={self.num_kv_heads}",
                f"a divisor of {group}, the query heads of each key/value head",
                f"leave it out for signals_per_noise={group}",
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"head_dim={self.head_dim}",
                "an even width, because RoPE rotates pairs of channels",
                f"set head_dim={self.head_dim + 1}",
            )
        for key in ("name", "source"):
            if not isinstance(getattr(self, key), str):
                raise ConfigError(f"{key}={getattr(self, key)!r}", "text", "put it in quotes")

    def grouped(self, group: int | None) -> ModelShape:
        """Returns the shape with ``group`` query heads for each key/value head; None: the shape as it is.

        Raises:
            ConfigError: a number that does not divide the heads.

        >>> ModelShape.preset("3M").grouped(3).num_kv_heads
        2
        """
        if group is None:
            return self
        if self.num_heads % group:
            raise ConfigError(
                f"group is {group} with num_heads={self.num_heads}",
                "a number that divides the heads",
                "change --group, or the shape",
            )
        return replace(self, num_kv_heads=self.num_heads // group)

    def beside(self, part: str) -> int:
        """Returns the parameters of a part that a checkpoint of this shape has beside those that a shape says.

        >>> ModelShape.preset("3M").beside("norms")
        0
        """
        return 0

    def plain(self) -> ModelShape:
        """Returns the shape without what a checkpoint of it has beside it.

        >>> ModelShape.preset("3M").plain() is ModelShape.preset("3M")
        True
        """
        return self

    def pairs_seen(self, context: int) -> int:
        """Returns twice the query-key pairs of all layers in one causal sequence.

        >>> ModelShape.preset("3M").pairs_seen(4) == ModelShape.preset("3M").num_layers * 2 * (1 + 2 + 3 + 4)
        True
        """
        return self.num_layers * context * (context + 1)

    def keys_seen(self, context: int) -> int:
        """Returns the keys that the last of ``context`` tokens sees in all layers, its own among them."""
        return self.num_layers * context

    def tokens_kept(self, context: int) -> int:
        """Returns the tokens that the cache keeps behind ``context`` tokens, summed over the layers."""
        return self.num_layers * context

    def check_variant(self, attention: str) -> None:
        """Raises unless this shape can carry the variant; returns nothing.

        V1 joins heads two by two: (q1, q2) of one output head, (k1, k2) of one key head, and two values of width d into
        one of width 2d. So n and G must be even. Grouped differential attention shares noise heads among the query
        heads of a key/value head, so these must be several, unless ``signals_per_noise`` says 1. The others take every
        shape.

        Args:
            attention: one of ``VARIANTS``.

        Raises:
            ConfigError: an unknown variant, V1 with an odd n or G, or noise heads that no two signal heads can share.

        Source: arXiv 2410.05258v2, section 2.1.

        >>> ModelShape.preset("3M").check_variant("diff_v1")
        """
        if attention not in VARIANTS:
            raise ConfigError(
                f"attention={attention!r}", f"one of {', '.join(VARIANTS)}", _nearest(attention, VARIANTS)
            )
        join = VARIANTS[attention].join
        if self.num_heads % join:
            raise ConfigError(
                f"num_heads={self.num_heads} for {attention}",
                f"a multiple of {join}, because it joins that many heads",
                'change num_heads or pass attention="diff_v2"',
            )
        if self.num_kv_heads % join:
            # n is a multiple of join and of G, and G is none of join, a prime: so join · G divides n as well.
            raise ConfigError(
                f"num_kv_heads={self.num_kv_heads} for {attention}",
                f"a multiple of {join}, because it joins that many key/value heads",
                f'set num_kv_heads={join * self.num_kv_heads} or pass attention="diff_v2"',
            )
        if VARIANTS[attention].shares_noise and self.num_heads == self.num_kv_heads and self.signals_per_noise is None:
            raise ConfigError(
                f"num_kv_heads={self.num_kv_heads} with num_heads={self.num_heads} for {attention}",
                "several query heads for each key/value head, which share a noise head",
                "lower num_kv_heads in the shape (compare, scale run and plan do that by --group), or set "
                "signals_per_noise=1",
            )

    @classmethod
    def preset(cls, name: str) -> ModelShape:
        """Returns a shape that comes with the package, by its name in any case; ``presets()`` lists them.

        Raises:
            ConfigError: no preset has this name.

        >>> ModelShape.preset("1.4b").num_heads
        16
        """
        known = _presets()
        name = find_preset(name) or name
        if name not in known:
            raise ConfigError(
                f"preset {name!r}",
                f"one of {', '.join(known)}, or the path of a .toml file",
                _nearest(name, known),
            )
        return known[name]

    @classmethod
    def from_toml(cls, path: str | Path) -> ModelShape:
        """Reads a shape from a TOML file whose keys are the fields of this class.

        Raises:
            ConfigError: the file is missing, unreadable or no TOML, or has an unknown, missing or impossible key.

        >>> ModelShape.from_toml("absent.toml")
        Traceback (most recent call last):
        diffattn.errors.ConfigError: 'absent.toml' is not there; wanted a TOML file: check the path
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ConfigError(f"{str(path)!r} is not there", "a TOML file", "check the path") from None
        except OSError as error:
            raise ConfigError(
                f"{str(path)!r} cannot be read ({error.strerror})", "a TOML file", "check the path and its rights"
            ) from error
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{str(path)!r} is not UTF-8 (byte {error.start})", "a TOML file in UTF-8", "save it again as UTF-8"
            ) from error
        return _parse(text, str(path), path.stem)


def presets() -> tuple[str, ...]:
    """Returns the names of the shapes that come with the package, smallest first.

    >>> presets()[:3]
    ('300K', '3M', '30M')
    """
    return tuple(_presets())


def find_preset(text: str) -> str | None:
    """Returns the preset that a text means: its name in any case, or its count written otherwise; None: no preset.

    >>> find_preset("6,8b"), find_preset("6800M"), find_preset("7B")
    ('6.8B', '6.8B', None)
    """
    wanted = whole(text, COUNTS)
    return text if text in _presets() else next((name for name in _presets() if whole(name, COUNTS) == wanted), None)


def check_positive_int(key: str, value: object, *, most: int = MOST) -> None:
    """Raises a ``ConfigError`` unless the value is an integer from 1 to ``most``; True is no integer here.

    >>> check_positive_int("context", 1)
    """
    check({key: integer(most)}, key, value)


def check_group(group: int | None) -> None:
    """Raises a ``ConfigError`` unless there can be so many query heads for each key/value head; None is the shape's.

    >>> check_group(None)
    """
    if group is not None and not 1 <= group <= _MOST_GROUP:
        raise ConfigError(f"group is {group}", f"a number from 1 to {_MOST_GROUP}", "change --group")


@dataclass(frozen=True, kw_only=True)
class BuiltShape(ModelShape):
    """The shape of a checkpoint, with what it has beside it.

    ``extras``: parameters, each ``(part of Parameters, what it is, how many of all layers)``; negative where there are
    fewer than the shape says. ``window``: in how many layers a token sees how many tokens alone, itself among them; the
    cache of such a layer keeps one token fewer, because the next one comes with its own key.

    >>> shape = BuiltShape(**vars(ModelShape.preset("3M")), extras=(("norms", "further norms", 96),))
    >>> shape.beside("norms"), shape.plain() == ModelShape.preset("3M")
    (96, True)
    """

    extras: tuple[tuple[str, str, int], ...] = ()
    window: tuple[int, int] | None = None

    def beside(self, part: str) -> int:
        return sum(number for name, _, number in self.extras if name == part)

    def pairs_seen(self, context: int) -> int:
        layers, width = self.window or (0, 0)
        near = min(context, width)
        in_window = near * (near + 1) + 2 * (context - near) * width
        return (self.num_layers - layers) * context * (context + 1) + layers * in_window

    def keys_seen(self, context: int) -> int:
        layers, width = self.window or (0, 0)
        return (self.num_layers - layers) * context + layers * min(context, width)

    def tokens_kept(self, context: int) -> int:
        layers, width = self.window or (0, 1)
        return (self.num_layers - layers) * context + layers * min(context, width - 1)

    def plain(self) -> ModelShape:
        return ModelShape(**{one.name: getattr(self, one.name) for one in fields(ModelShape)})


@functools.cache
def _presets() -> dict[str, ModelShape]:
    folder = importlib.resources.files("diffattn.plan").joinpath("presets")
    files = {file.name.removesuffix(".toml"): file for file in folder.iterdir() if file.name.endswith(".toml")}
    shapes = {name: _parse(file.read_text(encoding="utf-8"), file.name, name) for name, file in files.items()}
    return dict(sorted(shapes.items(), key=lambda item: (item[1].num_layers * item[1].hidden_size ** 2, item[0])))


def _parse(text: str, origin: str, name: str) -> ModelShape:
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{origin!r} is no TOML ({error})", "valid TOML", "correct that place") from error
    keys = [field.name for field in fields(ModelShape)]
    for key in values:
        if key not in keys:
            raise ConfigError(
                f"{origin!r} has the unknown key {key!r}", f"one of {', '.join(keys)}", _nearest(key, keys)
            )
    required = [field.name for field in fields(ModelShape) if field.default is MISSING]
    if missing := [key for key in required if key not in values]:
        raise ConfigError(
            f"{origin!r} has no {', '.join(missing)}", f"{', '.join(required)} in it", "add what is missing"
        )
    try:
        return ModelShape(**{"name": name, **values})
    except ConfigError as error:
        raise error.at(repr(origin)) from None


def _nearest(given: object, known: Iterable[str]) -> str:
    return did_you_mean(str(given).lower(), {name.lower(): name for name in known}, otherwise="correct the name")
