"""Loaded before any test or doctest runs."""

import gc
import os
import signal
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

# It hashes all that `builtins` holds, to which a doctest adds its last result, when it is first imported.
import tyro  # noqa: F401

HERE = Path(__file__).parent
# The files that take longest, which begin first: the processes that share the tests then end together.
SLOWEST = (
    "ops/triton/test_operator.py", "model/test_fused_triton.py",
    "ops/cpu/test_processors.py", "export/test_onnx.py", "model/test_compile.py", "study/test_compare.py",
    "ops/cpu/test_registered.py", "scaling/test_ladder.py", "ops/cpu/test_operator.py", "ops/cpu/test_build.py",
    "train/test_kill.py", "report/test_plan_page.py", "report/test_compare_page.py", "model/test_registration.py",
    "serve/test_transformers_engine.py", "cli/test_resume.py", "scaling/test_fit.py", "model/test_fused_serving.py",
    "train/test_continued.py", "train/test_interruption.py", "model/test_modeling.py", "cli/test_outputs.py",
    "cli/test_printed_commands.py", "cli/test_damaged_runs.py", "model/test_decoding_strategies.py",
    "study/test_plan_check.py", "model/test_packed_rows.py", "model/test_masks.py", "model/test_tensor_parallel.py",
    "ops/cpu/test_runs.py", "report/test_lens_page.py", "ops/cpu/test_wheel.py", "test_examples.py", "test_dist.py",
)  # fmt: skip

# What inductor compiled for an earlier version of an operator, whose results lay otherwise in memory, is of no use.
_compiled = tempfile.TemporaryDirectory(prefix="diffattn-inductor-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _compiled.name

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would every process that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """quanto unpacks in Python, instead of compiling an extension for 40 seconds."""
    import torch
    from optimum.quanto.library.extensions import get_extension

    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        return torch.cat([packed >> shift & 2**bits - 1 for shift in range(0, 8, bits)])

    monkeypatch.setattr(get_extension("quanto_cpp"), "_lib", SimpleNamespace(unpack=unpack))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files of :data:`SLOWEST` first, in its order."""
    rank = {HERE / name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Takes what collecting made, and the libraries that it imported, out of the sight of the garbage collector.

    Every run of training ends with a collection, which took half of a small run's time to look at all of them.
    """
    gc.collect()
    gc.freeze()
