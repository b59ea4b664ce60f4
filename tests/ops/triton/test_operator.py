"""The backend `fused_triton`: its tests in Triton's interpreter, and here what it refuses, on tensors of a fake GPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.comparison import Inputs, make_inputs
from support.interpreter import run_in_interpreter
from torch._subclasses.fake_tensor import FakeTensorMode

from diffattn.errors import UnsupportedError
from diffattn.ops.dispatch import BACKENDS, diff_attention
from diffattn.ops.reference import Call
from diffattn.ops.triton import configs
from diffattn.ops.triton import operator as fused_triton

BF16 = torch.bfloat16
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: its interpreter runs the kernels"
)


@needs_triton
@pytest.mark.timeout(600)
def test_in_the_interpreter() -> None:
    run_in_interpreter(Path(__file__).with_name("interpreted_operator.py"), at_least=60)


@needs_triton
def test_shared_noise_heads_in_the_interpreter() -> None:
    run_in_interpreter(Path(__file__).with_name("interpreted_shared.py"), at_least=14)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors without data that say that they lie on an H100, and a Triton that is new enough."""
    monkeypatch.setattr(configs, "_facts", lambda index: ("sm_90", configs.SHARED["sm_90"], 132))
    monkeypatch.setattr(fused_triton, "triton_version", lambda: "3.6.0")
    # What else `standard` calls asks for a PyTorch with CUDA.
    next_one = BACKENDS["standard"]._replace(run=lambda call: call.v.new_empty(*call.q1.shape[:3], call.v.shape[-1]))
    monkeypatch.setitem(BACKENDS, "standard", next_one)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def on_gpu(dtype: torch.dtype = BF16, **shape: Any) -> Inputs:
    """As `make_inputs`, which draws numbers."""
    x = make_inputs(**{"T": 5, "D": 8, "Dv": 16} | shape, dtype=dtype)
    k1 = torch.empty_like(x.k1, device="cuda")
    tensors = [torch.empty_like(t, device="cuda") for t in x[:6]]
    tensors[1], tensors[3] = k1, k1 if x.k2 is x.k1 else tensors[3]
    return Inputs(*tensors)


def refused(x: Inputs, sentence: str) -> None:
    """By name in one sentence, and under "auto" served by the next backend."""
    with pytest.raises(UnsupportedError, match=rf"^fused_triton: {sentence}; wanted a backend that serves this call: "):
        diff_attention(*x[:6], backend="fused_triton")
    output = diff_attention(*x[:6])
    assert (output.shape, output.dtype) == ((*x.q1.shape[:3], x.v.shape[-1]), x.v.dtype)


def test_a_gpu_is_served(gpu: None) -> None:
    for dtype in fused_triton.DTYPES:
        for one_key in (False, True):
            x = on_gpu(dtype, one_key=one_key)
            assert fused_triton.unsupported(Call(*x[:6])) is None
            output = diff_attention(*x[:6])
            assert output.device.type == "cuda"
            assert output.shape == (2, 5, 6, 16)
    assert fused_triton.unsupported(Call(*on_gpu(D=256, Dv=256)[:6])) is None


def test_another_device_is_refused() -> None:
    x = make_inputs(T=5, dtype=BF16)
    refused(x, "cpu inputs are not supported; it serves cuda")


DTYPES = {
    torch.float32: "float32 inputs are not supported, because .* TF32; it serves bfloat16 and float16",
    torch.float64: "float64 inputs are not supported; it serves bfloat16 and float16",
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_another_dtype_is_refused(dtype: torch.dtype, gpu: None) -> None:
    refused(on_gpu(dtype), DTYPES[dtype])


def test_several_dtypes_are_refused(gpu: None) -> None:
    x = on_gpu()
    sentence = "fused_triton: inputs of several dtypes are not supported; cast them to one"
    assert fused_triton.unsupported(Call(*x[:4], x.v.half(), x.lam)) == sentence


@pytest.mark.parametrize("widths", [{"D": 257}, {"Dv": 300}], ids=str)
def test_wide_heads_are_refused(widths: dict[str, int], gpu: None) -> None:
    (width,) = widths.values()
    refused(on_gpu(**widths), f"heads of {width} are not supported; it serves widths up to 256")


def test_a_machine_without_triton_is_told_how_to_get_it(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_triton, "triton_version", lambda: None)
    refused(on_gpu(), "Triton is not installed; install it with pip install triton")


# Those of 3.4 to 3.7.0 miscompile on Hopper what the kernels do not do; older than 3.6 was not tried.
@pytest.mark.parametrize(("version", "served"), [("3.4.0", False), ("3.5.1", False), ("3.6.0", True), ("3.10.0", True)])
def test_an_old_triton_is_refused(version: str, served: bool, gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_triton, "triton_version", lambda: version)
    if served:
        assert fused_triton.unsupported(Call(*on_gpu()[:6])) is None
    else:
        refused(
            on_gpu(), f"Triton {version} is too old, 3.6 is the oldest that it runs on; install a newer PyTorch, .*"
        )


def test_a_chip_without_a_block_table_is_refused(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "_facts", lambda index: ("sm_52", 49152, 24))
    refused(on_gpu(), "a GPU of type sm_52 is not supported; it serves sm_80, .*")


def test_a_card_with_too_little_shared_memory_is_refused(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "_facts", lambda index: ("sm_90", 49152, 24))
    refused(on_gpu(), "a GPU with 49152 bytes of shared memory for a program is not supported; it needs .* on sm_90")


def chosen(x: Inputs, **options: Any) -> str:
    """The first backend of "auto" that a GPU's call is left to."""
    call = Call(*x[:6], **options)
    return next(name for name, one in BACKENDS.items() if not (one.refuses(call) or one.passed_over(call)))


def test_auto_passes_over_what_another_backend_is_faster_for(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a chip that nobody timed, V2 without a mask; V1, masks and decoding are the kernels' everywhere."""
    monkeypatch.setattr(configs, "_facts", lambda index: ("sm_80", configs.SHARED["sm_80"], 108))
    v1, v2 = on_gpu(T=16), on_gpu(T=16, one_key=True)
    padding = torch.zeros(2, 16, dtype=torch.bool, device="cuda")
    assert chosen(v1) == "fused_triton"
    assert chosen(v2) == "standard"
    reason = fused_triton.passed_over(Call(*v2[:6]))
    assert str(reason).startswith("fused_triton: V2 without a mask is left to")
    assert chosen(v2, key_padding=padding) == "fused_triton"
    assert chosen(on_gpu(T=1, S=16, one_key=True)) == "fused_triton"
    # By its name it serves.
    assert diff_attention(*v2[:6], backend="fused_triton").shape == (2, 16, 6, 16)


def test_a_layer_asks_for_the_same(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "_facts", lambda index: ("sm_80", configs.SHARED["sm_80"], 108))

    def refusal(queries: int, one_key: bool, masked: bool) -> str | None:
        query, lam = (torch.empty(2, 4, queries, 8, dtype=BF16, device="cuda"), torch.empty((), device="cuda"))
        key = torch.empty(2, 2, 16, 8 if one_key else 16, dtype=BF16, device="cuda")
        ranges = torch.empty(2, 2, 16, dtype=torch.int32, device="cuda") if masked else None
        return fused_triton.refuses(query, key, key.new_empty(2, 2, 16, 16), lam, ranges)

    assert refusal(16, one_key=False, masked=False) is None
    assert refusal(16, one_key=True, masked=True) is None
    assert refusal(1, one_key=True, masked=False) is None
    assert str(refusal(16, one_key=True, masked=False)).startswith("fused_triton: V2 without a mask is left to")


def test_triton_is_not_imported_before_a_kernel_is() -> None:
    script = (
        "import sys, torch, diffattn\n"
        "from diffattn.ops.dispatch import BACKENDS, diff_attention\n"
        "x = torch.ones(1, 2, 1, 8, dtype=torch.float64)\n"
        "diff_attention(x, x, x, x, x, 0.5)\n"
        "assert 'diffattn.ops.triton.operator' in sys.modules\n"
        "assert 'triton' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
