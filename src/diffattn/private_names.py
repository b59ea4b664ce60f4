"""The record of one name of another library that we use although the library does not promise to keep it.

Such names stand in files that end in ``_private.py``, one for each library and room, each with a table ``NAMES`` of
these records. A test finds every name in the installed release, and finds no use of one anywhere else.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PrivateName:
    """One name that its library may rename or remove in any release."""

    name: str
    """The place of the name: ``package.module:attribute``, with more attributes behind points."""
    tested: str
    """The releases of the library with which our tests passed, as pip writes a range."""
    breaks: str
    """The part of ours that no longer works once the name is gone or means something else."""
    remove_when: str
    """The event after which the name is no longer needed here."""
