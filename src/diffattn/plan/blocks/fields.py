"""The fields of a ``config.json`` as a reader of blocks asks for them: each checked, and each remembered as read."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from diffattn.config_fields import shown
from diffattn.errors import ConfigError
from diffattn.plan.shape import check_positive_int


class Fields:
    """Reads one configuration; ``read`` are the names that were asked for.

    >>> fields = Fields({"hidden_size": 8})
    >>> fields.size("hidden_size"), fields.size("num_experts", 4), sorted(fields.read)
    (8, 4, ['hidden_size', 'num_experts'])
    """

    def __init__(self, values: Mapping[str, object]) -> None:
        self.values, self.read = values, set[str]()

    def get(self, key: str, default: object = None) -> object:
        """Returns the value of a field as it is; the default where it is not there or null."""
        self.read.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def size(self, key: str, default: int | None = None) -> int:
        """Returns a field that is a whole number from 1.

        Raises:
            ConfigError: another value, or no value where there is no default.
        """
        value = self.get(key, default)
        check_positive_int(key, value)
        assert isinstance(value, int)
        return value

    def count(self, key: str, default: int = 0) -> int:
        """Returns a field that is a whole number from 0."""
        return 0 if self.get(key, default) == 0 else self.size(key, default)

    def flag(self, key: str, default: bool = False) -> bool:
        """Returns a field that is true or false.

        Raises:
            ConfigError: another value.
        """
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{key}={shown(value)}", "a truth value", "use true or false")
        return value

    def heads(self, count: str = "num_attention_heads", width: str = "hidden_size") -> int:
        """Returns the heads, which divide the width where the file has no ``head_dim``.

        Raises:
            ConfigError: a width that they do not divide.
        """
        heads, whole = self.size(count), self.size(width)
        if whole % heads and self.values.get("head_dim") is None:
            raise ConfigError(
                f"{width}={whole} with {count}={heads}", f"a {width} that they divide", "correct the file"
            )
        return heads

    def must_be(self, key: str, wanted: Collection[object], default: object) -> None:
        """Raises unless a field has one of the values that are counted."""
        value = self.get(key, default)
        if value not in wanted:
            raise ConfigError(
                f"{key}={shown(value)}", f"{' or '.join(map(str, wanted))}, which alone is planned", "correct the file"
            )

    def layer_types(self, layers: int, known: Collection[str], default: list[str]) -> list[str]:
        """Returns the kind of each layer.

        Raises:
            ConfigError: a list of another length, or a kind that is not known.
        """
        value = self.get("layer_types", default)
        check_layer_types(value, layers, known)
        assert isinstance(value, list)
        return value


def check_layer_types(value: object, layers: int, known: Collection[str]) -> None:
    """Raises unless a value is a list with a known kind for each layer.

    Raises:
        ConfigError: another value; or a list of another length.

    >>> check_layer_types(["full_attention"], 1, ["full_attention"])
    """
    if not isinstance(value, list) or any(not isinstance(each, str) or each not in known for each in value):
        raise ConfigError(f"layer_types={shown(value)}", f"a list of {' and '.join(known)}", "correct the file")
    if len(value) != layers:
        raise ConfigError(
            f"layer_types of {len(value)} layers with num_hidden_layers={layers}",
            "as many of one as of the other",
            "correct the file",
        )
