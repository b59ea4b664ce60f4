"""What served the calls of a model under ``diff_fused``."""

import pytest

from diffattn.model import fused
from diffattn.ops.cpu import operator as fused_cpu
from diffattn.ops.triton import operator as fused_triton


def recorded_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list to which every call of ``diff_fused`` adds who served it: "kernel", "triton" or "standard"."""
    served: list[str] = []

    def record(name, module, function):
        call = getattr(module, function)

        def recording(*args, **kwargs):
            served.append(name)
            return call(*args, **kwargs)

        monkeypatch.setattr(module, function, recording)

    record("kernel", fused_cpu, "fused_cpu_diff_attention")
    record("kernel", fused_cpu, "decode")
    record("triton", fused_triton, "attend")
    record("triton", fused_triton, "decode")
    record("standard", fused, "sdpa_attention_forward")
    return served
