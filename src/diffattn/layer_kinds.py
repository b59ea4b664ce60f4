"""Says which layers of a model see a window of the text, and which turn no positions, and checks the fields for it.

The names of the types are those of ``transformers``, by which it makes caches and vLLM its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffattn.errors import ConfigError

FULL = "full_attention"
SLIDING = "sliding_attention"
LAYER_TYPES = (FULL, SLIDING)


def layer_types_of(window: int | None, given: Sequence[str] | None, layers: int) -> list[str]:
    """Returns the type of each layer: as given, else all with the window, or all without one.

    Args:
        window: the configuration's ``sliding_window``.
        given: its ``layer_types``.
        layers: the number of layers.

    Raises:
        ConfigError: the fields contradict each other.

    >>> layer_types_of(4, None, 2), layer_types_of(None, None, 1)
    (['sliding_attention', 'sliding_attention'], ['full_attention'])
    """
    if given is None:
        return [FULL if window is None else SLIDING] * layers
    if len(given) != layers:
        raise ConfigError(
            f"layer_types with {len(given)} names", f"one for each of the {layers} layers", "correct the list"
        )
    if window is None and SLIDING in given:
        raise ConfigError(
            f"layer_types with {SLIDING} and no sliding_window",
            "the number of tokens that such a layer sees",
            "set sliding_window",
        )
    if window is not None and SLIDING not in given:
        raise ConfigError(
            f"sliding_window={window} with layer_types that do not have {SLIDING}",
            "at least one layer with the window",
            "correct layer_types, or leave out sliding_window",
        )
    return list(given)


def check_unrotated(given: Sequence[int] | None, layers: int) -> None:
    """Raises a ``ConfigError`` unless each number is that of a layer, from 0, and stands there once."""
    if given is not None and (len(set(given)) < len(given) or not set(given) <= set(range(layers))):
        raise ConfigError(
            f"unrotated_layers is {str(list(given))[:60]}",
            f"each of 0 to {layers - 1} at most once",
            "correct the list",
        )
