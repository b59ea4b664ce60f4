"""A browser for the pages of a file."""

from support.browser import browser

__all__ = ["browser"]
