"""What a call of the compiled kernel reads and writes: strides, memory that nobody set, threads, and how much of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.backends import fused_cpu_diff_attention
from support.comparison import Inputs, compare_forward_and_gradients, forward_and_gradients, make_inputs
from support.fused_cases import CASES, both_dtypes, padded, require_kernel
from torch import Tensor

from diffattn.ops.reference import diff_attention_reference
from diffattn.train.measure import peak_bytes


@pytest.fixture(autouse=True)
def _kernel(request: pytest.FixtureRequest) -> None:
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    require_kernel(parameters.get("dtype", torch.float32))


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts back the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poison() -> Iterator[None]:
    """Memory that is asked for holds NaN until something is written to it."""
    before = torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def run(inputs: Inputs) -> list[Tensor]:
    return forward_and_gradients(fused_cpu_diff_attention, inputs)


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(a.equal(b) for a, b in zip(one, other, strict=True))


@both_dtypes
@pytest.mark.parametrize("case", CASES)
def test_every_element_is_written_and_none_is_read_before(case: str, dtype: torch.dtype, poison: None) -> None:
    """Outputs, gradients and the workers' memory start as NaN, and the results are those of clean memory."""
    inputs = make_inputs(dtype=dtype, **CASES[case])
    poisoned = run(inputs)
    assert all(result.isfinite().all() for result in poisoned)
    torch.use_deterministic_algorithms(False)
    assert same_bits(poisoned, run(inputs))


def laid_out(x: Tensor, layout: str, offset: int) -> Tensor:
    """The values of x in another layout of memory, `offset` elements behind the start of a storage."""
    order = {"heads first": (0, 2, 1, 3), "width second": (0, 3, 2, 1), "reversed": (3, 2, 1, 0)}.get(layout)
    if order is not None:
        shape = [x.shape[i] for i in order]
        return torch.empty(offset + x.numel(), dtype=x.dtype)[offset:].view(shape).permute(order).copy_(x)
    if layout == "slice of width":
        wide = torch.full((*x.shape[:3], x.shape[3] + offset + 3), float("nan"), dtype=x.dtype)
        return wide[..., offset : offset + x.shape[3]].copy_(x)
    if layout == "every second":
        return torch.full((*x.shape[:3], 2 * x.shape[3]), float("nan"), dtype=x.dtype)[..., 1::2].copy_(x)
    if layout == "part of a cache":
        cache = torch.full((x.shape[0] + 1, x.shape[1] + offset + 2, *x.shape[2:]), float("nan"), dtype=x.dtype)
        return cache[1:, offset : offset + x.shape[1]].copy_(x)
    return torch.empty(offset + x.numel(), dtype=x.dtype)[offset:].view(x.shape).copy_(x)


LAYOUTS = ["heads first", "width second", "reversed", "slice of width", "every second", "part of a cache", "offset"]


@both_dtypes
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_and_layout(dtype: torch.dtype, data: st.DataObject) -> None:
    """NaN lies wherever a view does not point."""

    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    causal, one_key = data.draw(st.booleans()), data.draw(st.booleans())
    B, T, G = draw(1, 3), data.draw(st.sampled_from([1, 2, 5, 8, 9, 16, 17, 40, 65])), draw(1, 3)
    S = T + draw(0, 90) if causal else draw(1, 150)
    x = make_inputs(
        B, T, S, G * draw(1, 3), G, draw(1, 19), draw(1, 19),
        causal=causal, one_key=one_key, seed=draw(0, 99), dtype=dtype,
    )  # fmt: skip
    leaves = [laid_out(t, data.draw(st.sampled_from(LAYOUTS)), draw(0, 5)) for t in x[:5]]
    lam = torch.full((B, T + 1, 2 * x.lam.shape[2]), float("nan"))[:, 1:, ::2].copy_(x.lam)
    views = x._replace(**dict(zip(x._fields[:5], leaves, strict=True)), lam=lam)
    views = views._replace(k2=views.k1 if one_key else views.k2)
    arguments = [t.detach().requires_grad_() for t in views[:6]]
    arguments[3] = arguments[1] if one_key else arguments[3]
    output = fused_cpu_diff_attention(*arguments, causal=causal)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    cotangent = laid_out(cotangent, data.draw(st.sampled_from(LAYOUTS)), draw(0, 5))
    results = [output.detach(), *torch.autograd.grad(output, arguments, cotangent)]
    assert same_bits(results, run(x))


EXPANDED = {"batch": 0, "sequence": 1, "heads": 2, "width": 3}


@both_dtypes
@pytest.mark.parametrize("queries", [3, 20])
@pytest.mark.parametrize("width", [1, 6])
@pytest.mark.parametrize("dimension", EXPANDED)
def test_expanded_inputs(dimension: str, width: int, queries: int, dtype: torch.dtype) -> None:
    """A stride of 0, in the inputs and in the gradient of the output, as a sum or a mean gives it."""
    x = make_inputs(T=queries, S=140, D=width, Dv=width, dtype=dtype)
    axis = EXPANDED[dimension]
    views = [t.narrow(axis, 0, 1).expand(t.shape) for t in x[:5]]
    lam = x.lam.narrow(min(axis, 2), 0, 1).expand(x.lam.shape)

    def gradients(inputs: list[Tensor]) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in inputs]
        output = fused_cpu_diff_attention(*leaves)
        return [output.detach(), *torch.autograd.grad(output.sum(), leaves)]

    contiguous = [t.contiguous() for t in (*views, lam)]
    assert same_bits(gradients([*views, lam]), gradients(contiguous))


@both_dtypes
def test_the_storage_may_end_with_the_last_element(dtype: torch.dtype) -> None:
    """Views into the very end of a storage, whose strides reach beyond it: nothing is read there."""
    x = make_inputs(T=20, D=6, dtype=dtype)
    rows = [
        torch.cat([t.flatten(2), t.flatten(2)], -1)[:, :, t[0, 0].numel() :].unflatten(2, t.shape[2:]) for t in x[:5]
    ]
    assert same_bits(run(Inputs(*rows, x.lam)), run(x))


REPEATED: dict[str, dict[str, Any]] = {
    "one group, cut into parts": {"B": 1, "T": 521, "H": 2, "G": 1, "D": 8, "Dv": 16},
    "several groups": {"T": 150, "H": 6, "G": 3, "D": 8, "Dv": 16},
    "padded": {"T": 150, "H": 6, "G": 3, "D": 8, "Dv": 16, "key_padding": padded(150, 13, 31)},
    "decoding": {"T": 1, "S": 1100, "H": 2, "G": 1, "D": 8, "Dv": 16},
    "four signal heads to a noise head": {"T": 70, "H": 8, "noise_heads": 2, "G": 1, "D": 8, "Dv": 16},
}


@both_dtypes
@pytest.mark.parametrize("case", REPEATED)
def test_a_hundred_times_the_same_bits(case: str, dtype: torch.dtype, threads: None) -> None:
    torch.set_num_threads(2)
    inputs = make_inputs(dtype=dtype, **REPEATED[case])
    first = run(inputs)
    for _ in range(99):
        assert same_bits(run(inputs), first)


@both_dtypes
@pytest.mark.parametrize("case", REPEATED)
def test_any_number_of_threads(case: str, dtype: torch.dtype, threads: None) -> None:
    """The output has the same bits; gradients are summed in parts, whose number depends on the threads."""
    inputs = make_inputs(dtype=dtype, **REPEATED[case])
    torch.set_num_threads(1)
    one = run(inputs)[0]
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        compare_forward_and_gradients(fused_cpu_diff_attention, diff_attention_reference, inputs)
        assert run(inputs)[0].equal(one)


@both_dtypes
def test_several_python_threads_at_once(dtype: torch.dtype) -> None:
    inputs = [make_inputs(dtype=dtype, **(CASES[case])) for case in ("several tiles", "decoding, several spans")]
    alone = [run(x) for x in inputs]
    wrong: list[BaseException] = []

    def work(index: int) -> None:
        try:
            for _ in range(5):
                assert same_bits(run(inputs[index]), alone[index])
        except BaseException as error:
            wrong.append(error)

    workers = [threading.Thread(target=work, args=(i % 2,)) for i in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def peak(length: int, dtype: torch.dtype) -> int:
    """Bytes of tensors alive at once in a training step of one layer, above its inputs."""
    x = make_inputs(B=1, T=length, H=8, G=4, D=32, Dv=64, dtype=dtype)
    leaves = [t.requires_grad_() for t in x[:6]]
    kept: list[Tensor] = []

    def step() -> None:
        output = fused_cpu_diff_attention(*leaves)
        kept.extend(torch.autograd.grad(output, leaves, torch.ones_like(output)))

    step()
    kept.clear()
    return peak_bytes(step, leaves, "cpu") - sum(t.untyped_storage().nbytes() for t in leaves)


@both_dtypes
def test_memory_grows_with_the_length_and_not_with_its_square(dtype: torch.dtype, threads: None) -> None:
    """A single map of the 8 heads would take T · T · 8 · 4 bytes, and the standard call keeps more than one."""
    torch.set_num_threads(1)
    bytes_at = {length: peak(length, dtype) for length in (512, 1024, 2048)}
    print(bytes_at)
    assert bytes_at[2048] < 2048 * 2048 * 8 * 4 / 5
    # A straight line: each doubling adds twice what the one before added.
    first, second = bytes_at[1024] - bytes_at[512], bytes_at[2048] - bytes_at[1024]
    assert second < 2.1 * first
