"""What served the calls of a model under ``diff_fused``, and whether the compiled kernel can serve any here."""

import pytest
import torch

from diffattn.model import fused
from diffattn.ops import fused_cpu


def why_no_kernel(dtype: torch.dtype = torch.float32) -> str | None:
    x = torch.zeros(1, 1, 1, 2, dtype=dtype)
    return fused_cpu.unsupported(x, x, x, x, x, 0.5)


needs_the_kernel = pytest.mark.skipif(why_no_kernel() is not None, reason=str(why_no_kernel()))


def recorded_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list to which every call of ``diff_fused`` adds who served it: "kernel" or "standard"."""
    served: list[str] = []

    def record(name, module, function):
        call = getattr(module, function)

        def recording(*args, **kwargs):
            served.append(name)
            return call(*args, **kwargs)

        monkeypatch.setattr(module, function, recording)

    record("kernel", fused_cpu, "fused_cpu_diff_attention")
    record("standard", fused, "sdpa_attention_forward")
    return served
