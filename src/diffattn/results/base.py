"""The base of all results: a frozen record that writes itself as JSON, its fields in the order of the class."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """A record of what was measured; its fields are the keys of its JSON, in their order."""

    def to_json(self) -> dict[str, object]:
        """Returns the record as objects, lists, numbers, words and None, as ``json.dumps`` takes them."""
        return {field.name: as_json(getattr(self, field.name)) for field in dataclasses.fields(self)}


def as_json(value: object) -> object:
    """Returns a value with every record in it written as JSON, and every tuple as a list.

    >>> as_json({"shots": (1, 2)})
    {'shots': [1, 2]}
    """
    if isinstance(value, Result):
        return value.to_json()
    if isinstance(value, Mapping):
        return {key: as_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        # Maps hold millions of numbers, for each of which a call would take its time.
        return [each if isinstance(each, float) else as_json(each) for each in value]
    return value
