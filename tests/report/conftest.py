"""A browser for the pages of a file."""

from collections.abc import Iterator
from typing import Any

import pytest
from support.browser import CHROMIUM


# Not for the whole session: the loop that drives it would run on under every later test of the process.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as tools:
        running = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()
