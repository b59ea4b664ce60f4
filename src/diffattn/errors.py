"""The errors that a user can meet. Each message is one line of one form: ``GIVEN; wanted WANTED: WAY OUT``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Self


def one_line(words: object, most: int | None = None) -> str:
    """Returns the text of an error, or of anything else, on one line: that of another library may have many.

    Args:
        words: an exception, which is named by its class where it has no text, or a text.
        most: characters that are kept. Default: all.

    >>> one_line(ValueError("one\\n  two")), one_line(KeyError())
    ('one two', 'KeyError')
    """
    text = " ".join(str(words).split())
    return text[:most] if text or not isinstance(words, BaseException) else type(words).__name__


def did_you_mean(written: str, known: Mapping[str, str], *, otherwise: str) -> str:
    """Returns a question with the known name that is nearest to a written one, or another way out if none is near.

    Args:
        written: the spelling that was found.
        known: the spellings that are known, and the name that each stands for.
        otherwise: the way out if no spelling is near.

    >>> did_you_mean("diffv3", {"softmax": "softmax", "diffv2": "diff_v2"}, otherwise="correct the name")
    'did you mean diff_v2?'
    """
    near = difflib.get_close_matches(written, known, n=1)
    return f"did you mean {known[near[0]]}?" if near else otherwise


class DiffattnError(Exception):
    """Base of every error that this package raises on purpose; the command line prints it as one line.

    Args:
        given: what was given or found, such as ``head_dim is 3``.
        wanted: what is wanted instead, such as ``an even number``.
        way_out: what the reader can do, such as ``set head_dim=64``.

    >>> print(ConfigError("head_dim is 3", "an even number", "set head_dim=64"))
    head_dim is 3; wanted an even number: set head_dim=64
    """

    def __init__(self, given: str, wanted: str, way_out: str) -> None:
        super().__init__(given, wanted, way_out)
        self.given, self.wanted, self.way_out = given, wanted, way_out

    def __str__(self) -> str:
        return f"{self.given}; wanted {self.wanted}: {self.way_out}"

    def at(self, where: str) -> Self:
        """Returns the same error with the name of the file or part in front: ``WHERE: GIVEN; wanted …``."""
        return type(self)(f"{where}: {self.given}", self.wanted, self.way_out)


class ConfigError(DiffattnError, ValueError):
    """A shape, an option or a configuration that cannot work."""


class UnsupportedError(DiffattnError, RuntimeError):
    """A backend, machine or engine that cannot do what was asked of it by name."""


class DataError(DiffattnError, ValueError):
    """Text that cannot be read, found or turned into at least one block of tokens."""


class CheckpointError(DiffattnError, RuntimeError):
    """A checkpoint that is missing, incomplete, damaged, or of another shape."""


class TrainingError(DiffattnError, RuntimeError):
    """A run that had to end: its loss is not a number, or the disk is full. The last good checkpoint is kept."""


def error_to_json(error: DiffattnError) -> list[str]:
    """Returns the kind and the three parts of an error, for the process that called the one that met it.

    >>> error_to_json(ConfigError("no text", "some", "give it"))
    ['ConfigError', 'no text', 'some', 'give it']
    """
    # A kind that a room defines is one of those of the whole package.
    kind = next(base.__name__ for base in type(error).__mro__ if base.__module__ == __name__)
    return [kind, error.given, error.wanted, error.way_out]


def error_from_json(content: Sequence[str]) -> DiffattnError:
    """Returns the error that another process met.

    >>> error_from_json(["DataError", "no text", "some", "give it"])
    DataError('no text', 'some', 'give it')
    """
    kind, *parts = content
    error: DiffattnError = globals()[kind](*parts)
    return error
