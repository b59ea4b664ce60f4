import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.small_run import StoppedError, at, checkpoint_steps, prepare, run, stop

from diffattn.data.packing import PreparedData


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums of floats depend on the number of threads, so that runs are compared exactly on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text")


@pytest.fixture(scope="session")
def data(text: Path) -> PreparedData:
    return prepare(text)


@pytest.fixture(scope="session")
def whole(data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing cut."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    run(data, folder)
    return folder


@pytest.fixture(scope="session")
def _stopped_at_8(data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(StoppedError):
        run(data, folder, on_progress=at(8, stop))
    return folder


@pytest.fixture
def stopped(_stopped_at_8: Path, tmp_path: Path) -> Path:
    """A run that ended in step 8, with the checkpoints of steps 3 and 6."""
    folder = tmp_path / "run"
    shutil.copytree(_stopped_at_8, folder)
    assert checkpoint_steps(folder) == [3, 6]
    return folder
