"""Half precision in float32 where the processor does not multiply it: when, and that the numbers are the same."""

import pytest
import torch
import torch.nn.functional as F
from support.backends import standard_diff_attention
from support.comparison import compare, make_inputs
from torch import Tensor

from diffattn.ops import half
from diffattn.ops.reference import diff_attention_reference

HALVES = (torch.bfloat16, torch.float16)
X86 = {"architecture": "x86_64"}
# Capabilities, what PyTorch uses of them, and the dtypes that are multiplied and that are slow.
PROCESSORS = {
    "AVX2": (X86 | {"avx2": True}, "AVX2", (), HALVES),
    "AVX512 without BF16": (X86 | {"avx512_f": True, "avx512_bf16": False}, "AVX512", (), HALVES),
    "AVX512-BF16": (X86 | {"avx512_bf16": True}, "AVX512", (torch.bfloat16,), (torch.float16,)),
    "AMX": (X86 | {"avx512_bf16": True, "amx_bf16": True, "avx512_fp16": True}, "AVX512", HALVES, ()),
    "AMX alone": (X86 | {"amx_bf16": True}, "AVX512", (torch.bfloat16,), (torch.float16,)),
    "AMX-FP16": (X86 | {"amx_bf16": True, "amx_fp16": True}, "AVX512", HALVES, ()),
    "AVX512-BF16, told to use AVX2": (X86 | {"avx512_bf16": True}, "AVX2", (), HALVES),
    "AVX-NE-CONVERT": (X86 | {"avx_ne_convert": True}, "AVX2", (), ()),
    "ARM": ({"architecture": "aarch64", "neon": True}, "DEFAULT", (), ()),
}


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this processor multiplied neither."""
    monkeypatch.setattr(half, "is_slow", lambda dtype: True)


@pytest.mark.parametrize("processor", PROCESSORS)
def test_the_processor_is_asked_for_products_of_each_dtype(processor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities, used, multiplied, slow = PROCESSORS[processor]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: used)
    assert tuple(filter(half.multiplies, HALVES)) == multiplied
    # Past what is remembered of this processor.
    assert tuple(filter(half.is_slow.__wrapped__, HALVES)) == slow


@pytest.mark.usefixtures("slow")
def test_only_half_precision_without_gradients_or_tracing_is_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2, dtype=torch.bfloat16)
    assert not half.widens(x), "its gradient would be recorded"
    with torch.no_grad():
        assert half.widens(x)
        assert half.widens(x.half())
        assert not half.widens(x.float())
        assert not half.widens(x.double())
        assert not half.widens(x.to("meta"))
        with torch.autocast("cpu", torch.bfloat16):
            assert not half.widens(x)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not half.widens(x)
    with torch.inference_mode():
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
        assert half.widens(x)
        monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
        assert not half.widens(x)


def linear_inputs(dtype: torch.dtype, bias: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 37, 61), (127, 61), (127,))
    x, weight, b = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    return x, weight, b if bias else None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("numbers", [2**21, 61 * 127, 1000, 7], ids=["whole", "one part", "parts", "single rows"])
@pytest.mark.parametrize("dtype", HALVES)
def test_wide_linear_is_linear(dtype: torch.dtype, numbers: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half, "_NUMBERS", numbers)
    inputs = linear_inputs(dtype, bias)
    expected = F.linear(*(None if x is None else x.double() for x in inputs))
    eager = F.linear(*inputs)
    compare(half.wide_linear(*inputs), expected, eager)

    x, weight, b = inputs
    wrong = {
        "parts in another order": half.wide_linear(x, weight.roll(16, 0), b),
        "rows of x in another order": half.wide_linear(x.flip(1), weight, b),
    }
    if b is not None:
        wrong["without bias"] = half.wide_linear(x, weight)
        wrong["one bias for all parts"] = half.wide_linear(x, weight, b[:16].repeat(8)[:127])
    for output in wrong.values():
        with pytest.raises(AssertionError, match="max error"):
            compare(output, expected, eager)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("dtype", HALVES)
def test_the_standard_call_in_float32_is_as_exact(
    dtype: torch.dtype, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[torch.dtype] = []
    sdpa = F.scaled_dot_product_attention

    def recording(q: Tensor, *args, **options) -> Tensor:
        called.append(q.dtype)
        return sdpa(q, *args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recording)
    x = make_inputs(T=queries, S=40, dtype=dtype)
    with torch.no_grad():
        output = standard_diff_attention(*x[:6])
        expected = diff_attention_reference(*x.to(torch.float64)[:6])
        compare(output, expected, diff_attention_reference(*x[:6]))
    assert called == [torch.float32]
    assert standard_diff_attention(*x[:6]).dtype == dtype
    assert called == [torch.float32, dtype], "with gradients it is left alone"


@pytest.mark.usefixtures("slow")
@torch.no_grad()
def test_a_mask_that_is_added_is_widened_and_one_of_bools_is_not() -> None:
    q = torch.zeros(1, 1, 3, 5, dtype=torch.bfloat16)
    added, visible = torch.zeros(3, 3, dtype=torch.bfloat16), torch.ones(3, 3, dtype=torch.bool)
    assert [x.dtype for x in half.attention_inputs(q, q, q, added)] == [torch.float32] * 4
    assert half.attention_inputs(q, q, q, visible)[3] is visible
    assert half.attention_inputs(q, q, q, None)[3] is None


@pytest.mark.usefixtures("slow")
@torch.no_grad()
def test_products_are_quick_only_for_many_rows_of_plain_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    wide = half.wide_linear

    def recording(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        made.append(x.shape[-2])
        return wide(x, weight, bias)

    class Quantised(Tensor):
        pass

    monkeypatch.setattr(half, "wide_linear", recording)
    x, weight, bias = linear_inputs(torch.bfloat16, True)
    x = x[0]
    with half.quick_products(x):
        compare(F.linear(x, weight, bias), F.linear(x.double(), weight.double(), bias.double()), wide(x, weight, bias))
        F.linear(x, weight, bias=bias)
        assert made == [37, 37]
        F.linear(x[: half.MANY_ROWS - 1], weight)
        F.linear(x, weight.as_subclass(Quantised))
        F.linear(x.float(), weight.float())
        with torch.enable_grad():
            F.linear(x, weight)
        assert made == [37, 37]
    F.linear(x, weight)
    with half.quick_products(x[: half.MANY_ROWS - 1]):
        F.linear(x, weight)
    assert made == [37, 37]
