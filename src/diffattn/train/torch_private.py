"""The names of PyTorch's profiler that measuring memory uses although PyTorch does not promise to keep them."""

from __future__ import annotations

from typing import Any

from torch.profiler import profile

from diffattn.private_names import PrivateName

# The name that the profiler gives each allocation and each release.
_MEMORY = "[memory]"


def memory_events(profiler: profile) -> list[Any]:
    """Returns the allocations and releases that a profile has seen, in order; ``nbytes()`` of a release is below 0."""
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == _MEMORY]
    return sorted(events, key=lambda event: event.start_ns())


_TESTED = ">=2.13,<2.14"
_MEASURED = (
    "every measured memory on a CPU, as compare and plan --measure report it",
    "torch.profiler lists allocations, or torch reports a CPU's peak as it does a GPU's",
)
NAMES = (
    PrivateName("torch.profiler:profile.profiler", _TESTED, *_MEASURED),
    PrivateName("torch.autograd.profiler:profile.kineto_results", _TESTED, *_MEASURED),
    *(
        PrivateName(f"torch._C._autograd:_KinetoEvent.{name}", _TESTED, *_MEASURED)
        for name in ("name", "nbytes", "start_ns")
    ),
)
