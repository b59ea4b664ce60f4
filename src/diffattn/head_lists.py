"""Checks what a configuration says of its heads: groups of them, noise heads, heads that subtract, λ_init by layer."""

from __future__ import annotations

from collections.abc import Sequence

from diffattn.errors import ConfigError
from diffattn.variants import ATTENTIONS


def noise_heads_of(attention: str, given: int | None, heads: int, groups: int) -> int | None:
    """Returns the noise heads of a variant that may share them, one for each key/value head by default; else None.

    Args:
        attention: the variant.
        given: the configuration's ``num_noise_heads``.
        heads: its ``num_attention_heads``, which counts both kinds.
        groups: its ``num_key_value_heads``.

    Raises:
        ConfigError: numbers that contradict each other.

    >>> noise_heads_of("diff_gda", None, 40, 8), noise_heads_of("diff_v1", None, 40, 8)
    (8, None)
    """
    if not ATTENTIONS[attention].shares_noise:
        if given is not None:
            raise ConfigError(
                f"num_noise_heads={given} with attention={attention!r}",
                " or ".join(name for name, record in ATTENTIONS.items() if record.shares_noise),
                "leave it out",
            )
        return None
    noise = groups if given is None else given
    if heads % noise or noise == heads:
        possible = [str(size) for size in range(1, heads // 2 + 1) if heads % size == 0 and size % groups == 0]
        raise ConfigError(
            f"num_noise_heads={noise} with num_attention_heads={heads}, which counts both kinds",
            "equally many signal heads, at least one, for each noise head",
            f"take {', '.join(possible)}" if possible else "change num_attention_heads",
        )
    if noise % groups:
        raise ConfigError(
            f"num_noise_heads={noise} with num_key_value_heads={groups}",
            f"a multiple of {groups}, because a noise head and its signal heads share one key/value head",
            "change one of them",
        )
    return noise


def check_groups(attention: str, heads: int, groups: int) -> None:
    """Raises a ``ConfigError`` unless each key/value head has equally many query heads, and whole pairs of them."""
    if heads % groups:
        raise ConfigError(
            f"num_key_value_heads={groups} with num_attention_heads={heads}",
            "a number of key/value heads that divides that of the query heads",
            f"choose a divisor of {heads}",
        )
    record = ATTENTIONS[attention]
    if record.maps > 1 and not record.shares_noise and heads // groups % 2:
        raise ConfigError(
            f"num_key_value_heads={groups} with num_attention_heads={heads} and attention={attention!r}",
            "an even ratio of the two, because both maps of a head share one key/value head",
            "halve the key/value heads",
        )


def check_lambda_init(given: float | Sequence[float] | None, layers: int) -> None:
    """Raises a ``ConfigError`` where ``lambda_init`` is a list that has not one number for each layer."""
    if isinstance(given, list) and len(given) != layers:
        raise ConfigError(
            f"lambda_init with {len(given)} numbers",
            f"one for each of the {layers} layers",
            "correct the list, or give one number for all layers",
        )


def check_dex_heads(attention: str, given: Sequence[Sequence[int]] | None, layers: int, heads: int) -> None:
    """Raises a ``ConfigError`` unless ``dex_heads`` names some heads of each layer of a DEX model, each once."""
    if given is None:
        return
    if not ATTENTIONS[attention].chosen_heads:
        raise ConfigError(f"dex_heads with attention={attention!r}", "attention='dex'", "leave out dex_heads")
    if len(given) != layers:
        raise ConfigError(
            f"dex_heads with {len(given)} lists",
            f"one list for each of the {layers} layers",
            "give an empty list to a layer in which no head subtracts",
        )
    for layer, chosen in enumerate(given):
        if len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(heads)):
            raise ConfigError(
                f"dex_heads of layer {layer} is {chosen}",
                f"each of 0 to {heads - 1} at most once",
                "correct the list",
            )
