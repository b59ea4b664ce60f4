"""The graphs that the tests of the export trace are shared by the processes of a run."""

import os

import pytest
from support.small_exports import TRACES


@pytest.fixture(scope="session", autouse=True)
def shared_traces(tmp_path_factory: pytest.TempPathFactory) -> None:
    base = tmp_path_factory.getbasetemp()
    # Each process of pytest-xdist has a folder of its own in the run's.
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "traces"
    folder.mkdir(exist_ok=True)
    TRACES.share(folder)
