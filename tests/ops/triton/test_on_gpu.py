"""The Triton kernels on a GPU: every entry of the block table against float64, and what calls them.

    python -m pytest tests/ops/triton/test_on_gpu.py

Elsewhere it is skipped; `test_kernels.py` runs the same functions with small sizes in Triton's interpreter.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.comparison import Inputs
from support.small_models import small_model, tokens
from support.triton_cases import (
    ALLOWED,
    Problem,
    alike,
    decoded,
    definition,
    errors,
    far,
    lam_of,
    make_problem,
    misaligned,
    normed,
    of_cache,
    one_projection,
    package_kernels,
    relative,
    results,
    seeing_queries,
)  # fmt: skip
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[3]))

from benchmarks.interpreter import mend_interpreter
from diffattn.ops.dispatch import diff_attention
from diffattn.ops.triton import operator as fused_triton

TINY = os.environ.get("TRITON_INTERPRET") == "1"
if not TINY and (not torch.cuda.is_available() or fused_triton.triton_missing() is not None):
    run = "python -m pytest tests/ops/triton/test_on_gpu.py"
    pytest.skip(f"needs a GPU and Triton: there run {run}", allow_module_level=True)

DEVICE = "cpu" if TINY else "cuda"
if TINY:
    mend_interpreter()
BF16, F16 = torch.bfloat16, torch.float16
# Poison comes with PyTorch's deterministic mode, which warns of the products in the definition.
# PyTorch loads what inductor needs with its own deprecated torch.jit. NumPy warns of logarithms of 0, not used.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deterministic.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]

# Width, width of the values, and whether both maps share their keys.
ENTRIES = [(16, 32, False), (32, 64, False), (48, 96, False), (64, 128, False), (80, 160, False), (96, 192, False)]
ENTRIES += [(128, 256, False), (256, 256, False), (64, 64, True), (64, 128, True), (80, 80, True), (96, 96, True)]
ENTRIES += [(128, 128, True), (200, 200, True), (256, 256, True)]
T, LESS, MORE = (19, 7, 23) if TINY else (333, 200, 500)
MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "causal, T < S": {"T": LESS, "S": MORE},
    "all, T > S": {"T": MORE, "S": LESS, "causal": False},
    "padded": {"padded": True},
    "packed": {"sequences": (12, -5, 14) if TINY else (100, -170, 63)},
    "static cache": {"T": LESS, "S": MORE, "written": T},
    "window": {"window": LESS},
}
VIEWS: dict[str, dict[str, Any]] = {
    "one projection": {"change": one_projection},
    "view of a cache": {"change": of_cache},
    "misaligned": {"change": misaligned},
    "steps of 0": {"change": alike},
    "λ below 0": {"change": lam_of(lambda lam: -lam)},
    "λ of a layer": {"change": lam_of(lambda lam: lam[0, 0, 0])},
    "gradient of a sum": {"cotangent": lambda y: y.new_ones(()).expand_as(y)},
    "gradient transposed": {"cotangent": lambda y: y.transpose(1, 3).contiguous().transpose(1, 3)},
}
if TINY:
    # One of each kind: the interpreter's own script has the others.
    ENTRIES = [(16, 32, False), (16, 16, True)]
    MASKS = {name: MASKS[name] for name in ("causal", "packed")}
    VIEWS = {name: VIEWS[name] for name in ("one projection", "gradient of a sum")}
SHAPE: dict[str, Any] = {"T": T, "H": 2 if TINY else 8, "G": 1 if TINY else 4, "dtype": BF16, "device": DEVICE}
every_entry = pytest.mark.parametrize("entry", ENTRIES, ids=str)


def shape_of(entry: tuple[int, int, bool]) -> dict[str, Any]:
    return {**SHAPE, "D": entry[0], "Dv": entry[1], "one_key": entry[2]}


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fills what is allocated with NaN, so that an output that nobody writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_right(problem: Problem) -> None:
    """Two runs with the table's blocks have the same bits, and are the definition."""
    kernels = package_kernels()
    got, again = results(problem, kernels), results(problem, kernels)
    assert all(torch.equal(x, y) for x, y in zip(got, again, strict=True))
    assert_near(errors(got, definition(problem)), problem)


def assert_near(found: dict[str, float], problem: Problem) -> None:
    allowed = ALLOWED[problem.inputs.v.dtype]
    # Written so that NaN fails.
    assert {name: error for name, error in found.items() if not error <= allowed} == {}


@every_entry
@pytest.mark.parametrize("mask", MASKS)
def test_outputs_and_gradients(entry: tuple[int, int, bool], mask: str) -> None:
    assert_right(make_problem(**{**shape_of(entry), **MASKS[mask]}))


@every_entry
def test_float16(entry: tuple[int, int, bool]) -> None:
    assert_right(make_problem(**{**shape_of(entry), "dtype": F16}))


@every_entry
@pytest.mark.parametrize("signals", [2] if TINY else [2, 4, 5])
@pytest.mark.parametrize("mask", ["causal"] if TINY else MASKS)
def test_noise_heads_that_are_shared(entry: tuple[int, int, bool], signals: int, mask: str) -> None:
    groups = SHAPE["G"]
    heads = {"H": 2 * groups * signals, "noise_heads": 2 * groups}
    assert_right(make_problem(**{**shape_of(entry), **heads, **MASKS[mask]}))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("entry", ENTRIES[:1] if TINY else [(64, 128, False), (128, 256, False)], ids=str)
def test_views(entry: tuple[int, int, bool], view: str) -> None:
    assert_right(make_problem(**shape_of(entry), **VIEWS[view]))


@every_entry
@pytest.mark.parametrize("queries", [2] if TINY else [1, 2, 3, 5, 8])
@pytest.mark.parametrize(
    "mask",
    [{}] if TINY else [{}, {"causal": False}, {"padded": True}, {"written": 300}, {"window": 100}, {"noise_heads": 4}],
    ids=str,
)
def test_few_queries(entry: tuple[int, int, bool], queries: int, mask: dict[str, Any]) -> None:
    problem = make_problem(**{**shape_of(entry), "T": queries, "S": MORE, **mask})
    kernels, wide = package_kernels(), definition(problem)[0]
    gain = torch.linspace(0.5, 1.5, entry[1]).to(DEVICE, BF16)
    got, again = decoded(problem, kernels), decoded(problem, kernels)
    assert torch.equal(got, again)
    found = {"output": relative(got, wide)}
    for name, gains in (("normed", None), ("with gain", gain)):
        found[name] = relative(decoded(problem, kernels, norm=True, gain=gains), normed(wide, gains))
    assert_near(found, problem)


# On a GPU every element between takes memory: 9 and 11 GB.
@pytest.mark.parametrize("steps", [(2**31 + 2**20, 2**12), (0, 2**27 if TINY else 2**24)], ids=["batch", "tokens"])
def test_offsets_beyond_32_bits(steps: tuple[int, int]) -> None:
    batch = 2 if steps[0] else 1
    shape = {**SHAPE, "B": batch, "H": 2, "G": 1, "D": 64, "Dv": 128, "dtype": F16, "change": far(*steps)}
    assert_right(make_problem(**shape))


def test_more_heads_than_a_grid_has_rows() -> None:
    heads = 3 if TINY else 40_000
    assert_right(make_problem(**{**SHAPE, "T": 3, "H": heads, "G": heads}))


def peak(run: Callable[[], Any]) -> int:
    """Bytes that a GPU allocates beyond those of the inputs; 0 on a CPU, which does not count."""
    if TINY:
        run()
        return 0
    run()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("width", [16] if TINY else [64, 128])
def test_memory_of_both_passes_is_that_of_the_softmax_twin(width: int) -> None:
    batch, length, heads = (1, T, 2) if TINY else (2, 4096, 16)
    torch.use_deterministic_algorithms(False)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=BF16, device=DEVICE, requires_grad=True)

    q, k = normal(batch, length, heads, 2, width), normal(batch, length, heads, 2, width)
    v, lam = normal(batch, length, heads, 2 * width), torch.rand(batch, length, heads, device=DEVICE)
    twin = [normal(batch, 2 * heads, length, width) for _ in range(3)]

    def fused() -> list[Tensor]:
        output = torch.ops.diffattn.fused_triton(q, k, v, lam, None, True, width**-0.5)[0]
        return torch.autograd.grad(output, (q, k, v), torch.ones_like(output))

    def softmax() -> list[Tensor]:
        output = torch.nn.functional.scaled_dot_product_attention(*twin, is_causal=True)
        return torch.autograd.grad(output, twin, torch.ones_like(output))

    assert peak(fused) <= 1.25 * peak(softmax)


def problem_of_api(**options: Any) -> tuple[Inputs, Problem]:
    width = 16 if TINY else 64
    problem = make_problem(**{**SHAPE, "D": width, "Dv": 2 * width, **options})
    return problem.inputs, problem


def api_errors(function: Callable[..., Tensor], problem: Problem) -> dict[str, float]:
    leaves = [y.detach().clone().requires_grad_() for y in problem.inputs[:6]]
    output = function(*leaves)
    grads = torch.autograd.grad(output, leaves, problem.cotangent)
    return errors([output.detach(), *grads], definition(problem))


@pytest.mark.parametrize("backend", ["fused_triton", "auto"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_diff_attention(backend: str, padded: bool) -> None:
    x, problem = problem_of_api(padded=padded)
    call = functools.partial(diff_attention, key_padding=x.key_padding, backend=backend)
    assert_near(api_errors(call, problem), problem)


def test_packed_rows_of_diff_attention() -> None:
    lengths = (9, 10) if TINY else (100, 170, 63)
    _, problem = problem_of_api(sequences=lengths)
    begins = torch.tensor((0, *lengths)).cumsum(0).to(DEVICE)
    call = functools.partial(diff_attention, cu_seqlens=begins, backend="fused_triton")
    assert_near(api_errors(call, problem), problem)


def test_compiled_without_graph_breaks() -> None:
    _, problem = problem_of_api()
    call = functools.partial(diff_attention, backend="fused_triton")
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager" if TINY else "inductor")
    assert_near(api_errors(compiled, problem), problem)


def captured(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """What runs again what `run` launches, and where its result then lies: a CUDA graph, and on a CPU itself."""
    if TINY:
        output = run().clone()
        return lambda: output.copy_(run()), output
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    return graph.replay, output


def test_decoding_in_a_graph_that_is_run_again() -> None:
    """A static cache that has grown between two runs of one graph: what it holds is data and not a size."""
    torch.use_deterministic_algorithms(False)
    problems = [make_problem(**{**SHAPE, "T": 1, "S": MORE, "written": n, "seed": n}) for n in (LESS, T)]
    x, queries = problems[0].inputs, seeing_queries(problems[0])
    assert queries is not None
    query, key = torch.stack(x[0:3:2], 3).flatten(2, 3).transpose(1, 2), torch.cat(x[1:4:2], -1).transpose(1, 2)
    value, lam, scale = x.v.transpose(1, 2), x.lam, x.q1.shape[-1] ** -0.5

    @torch.no_grad()
    def run() -> Tensor:
        return fused_triton.decode(query, key, value, lam, queries=queries, scale=scale)

    again, output = captured(run)
    for problem in problems:
        y = problem.inputs
        query.copy_(torch.stack(y[0:3:2], 3).flatten(2, 3).transpose(1, 2))
        key.copy_(torch.cat(y[1:4:2], -1).transpose(1, 2))
        value.copy_(y.v.transpose(1, 2)), lam.copy_(y.lam)
        queries.copy_(seeing_queries(problem))
        again()
        assert_near({"output": relative(output, definition(problem)[0])}, problem)


@pytest.mark.parametrize("attention", ["diff_v1", "diff_v2"])
def test_a_training_step_is_that_of_the_standard_call(attention: str) -> None:
    ids = tokens(2, 21).to(DEVICE)
    found = []
    for implementation, dtype in (("eager", torch.float64), ("sdpa", BF16), ("diff_fused", BF16)):
        model = small_model(attention).to(DEVICE, dtype).train()
        model.set_attn_implementation(implementation)
        loss = model(ids, labels=ids).loss
        loss.backward()
        gradients = torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])
        found.append((loss.detach().double(), gradients))
    wanted, standard, fused = found
    for exact, plain, got in zip(wanted, standard, fused, strict=True):
        # The rest of the model rounds to bfloat16 too, in both.
        assert relative(got, exact) <= 1.5 * relative(plain, exact) + 1e-3
