"""The compiled kernel against the definition: output and every gradient, at most 2 and 3 times eager's error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.backends import fused_cpu_diff_attention
from support.comparison import Inputs, compare, compare_forward_and_gradients, forward_and_gradients, make_inputs
from support.fused_cases import CASES, both_dtypes, every_dtype, nearly_equal_maps, require_kernel
from support.known_wrong import KNOWN_WRONG, assert_rejects_known_wrong, rms_norm
from torch import Tensor

from diffattn.ops.dispatch import diff_attention
from diffattn.ops.reference import diff_attention_reference

WIDTHS = [1, 2, 3, 7, 8, 13, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 251, 255, 256]
QUERIES = [*range(1, 10), 15, 16, 17, 31, 32, 33, 63, 64, 65, 70, 127, 128, 129, 130, 193]
HEADS = [
    *((1, 1, 1), (7, 7, 1), (7, 7, 7), (10, 10, 5), (12, 12, 3), (64, 64, 2)),
    *((7, 1, 1), (10, 5, 5), (12, 6, 3), (64, 16, 2)),
]


@pytest.fixture(autouse=True)
def _kernel(request: pytest.FixtureRequest) -> None:
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    require_kernel(parameters.get("dtype", torch.float32))


def check(inputs: Inputs) -> None:
    compare_forward_and_gradients(fused_cpu_diff_attention, diff_attention_reference, inputs)


@every_dtype
@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients(case: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(dtype=dtype, **CASES[case])
    check(inputs)
    if case not in ("all padding", "decoding, all padding"):
        assert_rejects_known_wrong(inputs)


@pytest.mark.parametrize("case", ["T < S", "few queries of many heads"])
def test_every_known_wrong_is_rejected(case: str) -> None:
    shared = make_inputs(T=11, S=19, H=12, noise_heads=6, G=3, window=4)
    rejected = {*assert_rejects_known_wrong(make_inputs(**CASES[case])), *assert_rejects_known_wrong(shared)}
    assert rejected == {wrong.name for wrong in KNOWN_WRONG}


@both_dtypes
@pytest.mark.parametrize("queries", QUERIES)
def test_any_number_of_queries(queries: int, dtype: torch.dtype) -> None:
    """Around the sizes of blocks of rows (16, 32, 64), of tiles (128), and of the decoding path (8)."""
    for past in (0, 1, 62):
        for one_key in (False, True):
            check(make_inputs(T=queries, S=queries + past, D=6, Dv=7, one_key=one_key, dtype=dtype))


@both_dtypes
@pytest.mark.parametrize("keys", [1, 2, 15, 16, 17, 31, 33, 127, 128, 129, 255, 256, 257, 511, 512, 513])
def test_any_number_of_keys(keys: int, dtype: torch.dtype) -> None:
    for queries in (1, 5, 19, 67):
        check(make_inputs(T=queries, S=keys, D=6, Dv=5, causal=False, dtype=dtype))


@both_dtypes
@pytest.mark.parametrize("queries", [3, 33])
@pytest.mark.parametrize("width", WIDTHS)
def test_any_width(width: int, queries: int, dtype: torch.dtype) -> None:
    """Of q and k beside any of v: primes, odd ones (which bfloat16 pads to even), both ends."""
    for v_width in (1, 2, 5, 16, 37, 131, 255, 256, width):
        for one_key in (False, True):
            check(make_inputs(T=queries, S=41, D=width, Dv=v_width, one_key=one_key, dtype=dtype))


@both_dtypes
@pytest.mark.parametrize("queries", [1, 4, 9, 23, 70])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_any_groups(heads: tuple[int, int, int], queries: int, dtype: torch.dtype) -> None:
    """Output heads, noise heads and groups."""
    H, noise_heads, G = heads
    check(make_inputs(T=queries, S=queries + 3, H=H, noise_heads=noise_heads, G=G, D=6, Dv=7, dtype=dtype))


@both_dtypes
@pytest.mark.parametrize("queries", [5, 21])
@pytest.mark.parametrize("shape", [(), (1,), (6,), (21, 1), (21, 6), (1, 1, 6), (2, 1, 1), (2, 21, 6)], ids=str)
def test_lam_shapes(shape: tuple[int, ...], queries: int, dtype: torch.dtype) -> None:
    """One λ for all, per head, per token and head: its gradient has its shape."""
    shape = tuple(queries if n == 21 else n for n in shape)
    lam = torch.rand(shape, generator=torch.Generator().manual_seed(3))
    check(make_inputs(T=queries, S=23, dtype=dtype)._replace(lam=lam))


@both_dtypes
@pytest.mark.parametrize("queries", [5, 21])
def test_lam_as_a_number(queries: int, dtype: torch.dtype) -> None:
    x = make_inputs(T=queries, S=23, dtype=dtype)
    for lam in (0.0, 0.8, -0.3, 1):
        as_tensor = fused_cpu_diff_attention(*x[:5], torch.tensor(float(lam)))
        assert fused_cpu_diff_attention(*x[:5], lam).equal(as_tensor)
        check(x._replace(lam=torch.tensor(float(lam))))


@every_dtype
@pytest.mark.parametrize("case", ["T = S", "T < S", "padded", "several tiles", "V2", "decoding", "Dv = 2D"])
def test_nearly_equal_maps(case: str, dtype: torch.dtype) -> None:
    """What is left of the difference keeps its accuracy; so does what V1's norm makes of it."""
    inputs = nearly_equal_maps(make_inputs(dtype=dtype, **CASES[case]))
    check(inputs)
    compare_forward_and_gradients(normed(fused_cpu_diff_attention), normed(diff_attention_reference), inputs)
    # In half precision the rounding of two maps is larger than their difference here, whatever computes it.
    if dtype == torch.float32:
        assert_rejects_known_wrong(inputs)


def normed(function: Any) -> Any:
    return lambda *args, **options: rms_norm(function(*args, **options))


@both_dtypes
@pytest.mark.parametrize("one_key", [False, True], ids=["V1", "V2"])
@pytest.mark.parametrize("queries", [4, 40])
def test_scores_of_ten_thousand(queries: int, one_key: bool, dtype: torch.dtype) -> None:
    """Beside ±1e4 one key takes a whole map, and another is 0: nothing overflows, and the winner is the same."""
    x = make_inputs(T=queries, S=140, D=8, Dv=8, one_key=one_key, dtype=dtype)
    x = x._replace(q1=100 * x.q1, q2=100 * x.q2, k1=100 * x.k1, k2=100 * x.k2)
    x = x._replace(k2=x.k1 if one_key else x.k2)
    results = forward_and_gradients(fused_cpu_diff_attention, x)
    assert all(result.isfinite().all() for result in results)
    expected = diff_attention_reference(*x.to(torch.float64)[:6])
    compare(results[0], expected, diff_attention_reference(*x[:6]))


@both_dtypes
@pytest.mark.parametrize("one_key", [False, True], ids=["V1", "V2"])
@pytest.mark.parametrize("queries", [4, 40])
@pytest.mark.parametrize("size", [1e5, 1e8, 1e14])
def test_scores_beyond_a_billion(size: float, queries: int, one_key: bool, dtype: torch.dtype) -> None:
    """Scores whose rounding alone is beyond the range of an exponent: one key still takes a whole map."""
    x = make_inputs(T=queries, S=140, D=8, Dv=8, one_key=one_key, dtype=dtype)
    x = x._replace(q1=size * x.q1, q2=size * x.q2)
    results = forward_and_gradients(fused_cpu_diff_attention, x)
    assert all(result.isfinite().all() for result in results)
    expected = forward_and_gradients(diff_attention_reference, x.to(torch.float64))
    eager = forward_and_gradients(diff_attention_reference, x)
    # Those of q and k are 0 but for rounding, which is multiplied by the size of what they meet.
    for i in (0, 5, 6):
        compare(results[i], expected[i], eager[i])


@both_dtypes
@pytest.mark.parametrize("queries", [4, 40])
@pytest.mark.parametrize("scale", [1e-30, 1e20])
def test_scales_of_any_size(scale: float, queries: int, dtype: torch.dtype) -> None:
    """One makes every visible key equal, the other lets one key take a whole map."""
    x = make_inputs(T=queries, S=140, D=8, Dv=8, dtype=dtype, scale=scale)
    results = forward_and_gradients(fused_cpu_diff_attention, x)
    assert all(result.isfinite().all() for result in results)
    wide = x.to(torch.float64)
    expected = diff_attention_reference(*wide[:6], **wide.options)
    compare(results[0], expected, diff_attention_reference(*x[:6], **x.options))


@both_dtypes
@pytest.mark.parametrize("one_key", [False, True], ids=["V1", "V2"])
@pytest.mark.parametrize("sizes", [{"B": 0, "T": 3}, {"B": 0, "T": 20}, {"T": 0, "S": 3}, {"T": 0, "S": 0}], ids=str)
def test_empty(sizes: dict[str, int], one_key: bool, dtype: torch.dtype) -> None:
    x = make_inputs(**sizes, one_key=one_key, dtype=dtype)
    for padding in (None, torch.zeros(x.k1.shape[:2], dtype=torch.bool)):
        output, *gradients = forward_and_gradients(fused_cpu_diff_attention, x._replace(key_padding=padding))
        assert output.shape == (*x.q1.shape[:3], x.v.shape[-1])
        for gradient, tensor in zip(gradients, x[:6], strict=True):
            assert gradient.shape == tensor.shape
            assert gradient.eq(0).all()


@both_dtypes
@pytest.mark.parametrize("queries", [4, 40])
def test_no_keys_at_all_gives_zeros(queries: int, dtype: torch.dtype) -> None:
    x = make_inputs(T=queries, S=1, causal=False, dtype=dtype)
    x = x._replace(k1=x.k1[:, :0], k2=x.k2[:, :0], v=x.v[:, :0])
    output, *gradients = forward_and_gradients(fused_cpu_diff_attention, x)
    assert output.shape == (2, queries, 6, 13)
    assert output.eq(0).all()
    assert all(gradient.eq(0).all() for gradient in gradients)


def test_gradients_only_where_asked_for() -> None:
    x = make_inputs(T=20)
    everything = forward_and_gradients(diff_attention, x)
    for i in range(6):
        leaves = [t.clone().requires_grad_(j == i) for j, t in enumerate(x[:6])]
        output = fused_cpu_diff_attention(*leaves)
        generator = torch.Generator().manual_seed(1)
        output.backward(torch.randn(output.shape, generator=generator))
        grads: list[Tensor | None] = [leaf.grad for leaf in leaves]
        assert [g is not None for g in grads] == [j == i for j in range(6)]
        assert torch.equal(grads[i], everything[1 + i])  # type: ignore[arg-type]
    with torch.no_grad():
        assert not fused_cpu_diff_attention(*leaves).requires_grad


@pytest.mark.parametrize("one_key", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_sums_of_more_keys_than_a_worker_holds(causal: bool, one_key: bool) -> None:
    """In bfloat16 the gradients of wide keys and values are summed span by span: 640 and 1024 keys at a time here."""
    padding = torch.zeros(1, 1100, dtype=torch.bool)
    padding[:, :700] = True
    for past, key_padding, noise_heads in ((0, None, 2), (1050, None, 2), (1050, padding, 2), (950, padding, 1)):
        x = make_inputs(
            1, 1100 - past, 1100, 2, 1, 256, 256, noise_heads=noise_heads, dtype=torch.bfloat16, one_key=one_key,
            causal=causal, key_padding=key_padding,
        )  # fmt: skip
        check(x)
