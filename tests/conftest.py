"""Loaded before any test or doctest runs."""

import gc
import os
import signal
import tempfile
from types import SimpleNamespace

import pytest

# It hashes all that `builtins` holds, to which a doctest adds its last result, when it is first imported.
import tyro  # noqa: F401

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


def pytest_collection_finish(session: pytest.Session) -> None:
    """Takes what collecting made, and the libraries that it imported, out of the sight of the garbage collector.

    Every run of training ends with a collection, which took half of a small run's time to look at all of them.
    """
    gc.collect()
    gc.freeze()
