"""Loaded before any test or doctest runs."""

# It hashes all that `builtins` holds, to which a doctest adds its last result, when it is first imported.
import tyro  # noqa: F401
