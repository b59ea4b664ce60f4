"""The graphs that the tests of the export trace are shared by the processes of a run."""

import os

import pytest
from support.small_exports import ATTENTIONS, TRACES, decoder, model_of, traced

from diffattn.export.run import OnnxDecoder
from diffattn.model.modeling import DiffTransformerForCausalLM


@pytest.fixture(scope="session", autouse=True)
def shared_traces(tmp_path_factory: pytest.TempPathFactory) -> None:
    base = tmp_path_factory.getbasetemp()
    # Each process of pytest-xdist has a folder of its own in the run's.
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "traces"
    folder.mkdir(exist_ok=True)
    TRACES.share(folder)


@pytest.fixture(params=ATTENTIONS, scope="module")
def cached(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[DiffTransformerForCausalLM, OnnxDecoder]:
    return model_of(request.param), decoder(traced(request.param, True), tmp_path_factory.mktemp("model"))
