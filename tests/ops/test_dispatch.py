"""diff_attention(): the choice of a backend, the arguments it takes, and what it says about the ones it does not."""

from __future__ import annotations

import itertools
import warnings
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from support.backends import fused_cpu_diff_attention, standard_diff_attention
from support.comparison import compare_forward_and_gradients, forward_and_gradients, make_inputs
from support.fused_cases import needs_the_kernel, require_kernel
from torch import Tensor

from diffattn.errors import ConfigError, UnsupportedError
from diffattn.ops import dispatch
from diffattn.ops.backend import Backend
from diffattn.ops.cpu import build
from diffattn.ops.cpu import operator as fused_cpu
from diffattn.ops.dispatch import BACKENDS, diff_attention
from diffattn.ops.reference import Call, diff_attention_reference

X = make_inputs(B=2, T=5, S=7, H=6, G=3, D=4, Dv=11)


def call(**changes: Any) -> Tensor:
    """diff_attention on X with some of its arguments changed."""
    return diff_attention(**{**X._asdict(), **changes})


def refusing(call: Call) -> str:
    return "picky: odd head widths are not supported"


def unreachable(call: Call) -> Tensor:
    raise AssertionError("a backend ran that had refused")


def test_auto_is_the_first_backend_that_supports_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(BACKENDS) == ["fused_cpu", "fused_triton", "standard", "reference"]
    first = standard_diff_attention if fused_cpu.unsupported(Call(*X[:6])) else fused_cpu_diff_attention
    assert call().equal(first(*X[:6]))
    double = make_inputs(T=5, S=7, dtype=torch.float64)
    assert diff_attention(*double[:6]).equal(standard_diff_attention(*double[:6]))
    picky = {"picky": Backend("picky", "none", refusing, unreachable)}
    monkeypatch.setattr(dispatch, "BACKENDS", {**picky, "reference": BACKENDS["reference"]})
    assert call().equal(diff_attention_reference(*X[:6]))
    monkeypatch.setattr(dispatch, "BACKENDS", picky)
    with pytest.raises(UnsupportedError, match="picky: odd head widths"):
        call()


def test_a_named_backend_serves_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(backend="reference").equal(diff_attention_reference(*X[:6]))
    assert call(backend="standard").equal(standard_diff_attention(*X[:6]))
    monkeypatch.setitem(dispatch.BACKENDS, "picky", Backend("picky", "none", refusing, unreachable))
    with pytest.raises(UnsupportedError, match="picky: odd head widths"):
        call(backend="picky")
    with pytest.raises(ConfigError, match=r"'fast'; wanted one of auto, fused_cpu, fused_triton, standard, .*, picky"):
        call(backend="fast")


REFUSALS = {
    "no compiler": ({}, "fused_cpu: no compiler"),
    "float64": ({n: getattr(X, n).double() for n in X._fields[:5]}, "fused_cpu: float64 inputs are not supported"),
    "device": ({n: getattr(X, n).to("meta") for n in X._fields[:6]}, "fused_cpu: meta inputs are not supported"),
    "width": (make_inputs(T=5, S=7, Dv=257)._asdict(), "fused_cpu: heads of 257 are not supported"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_the_kernel_says_why_it_does_not_serve(refusal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, sentence = REFUSALS[refusal]
    monkeypatch.setattr(build, "unavailable", lambda dtype: "fused_cpu: no compiler")
    with pytest.raises(UnsupportedError, match=sentence):
        call(backend="fused_cpu", **changes)
    expected = call(backend="standard", **changes)
    actual = call(**changes)
    assert actual.shape == expected.shape
    assert actual.is_meta or actual.equal(expected)


@needs_the_kernel
def test_the_kernel_serves_through_its_name() -> None:
    key_padding = torch.zeros(2, 7, dtype=torch.bool)
    key_padding[0, 2] = True
    for option in ({}, {"causal": False}, {"scale": 0.9}, {"key_padding": key_padding}, {"lam": 0.1}):
        torch.testing.assert_close(call(backend="fused_cpu", **option), call(backend="reference", **option))


@pytest.mark.parametrize("backend", ["standard", "reference"])
def test_options_reach_every_backend(backend: str) -> None:
    key_padding = torch.zeros(2, 7, dtype=torch.bool)
    key_padding[0, 2] = True
    plain = call(backend=backend)
    for option in ({"causal": False}, {"scale": 0.9}, {"key_padding": key_padding}, {"lam": 0.1}):
        changed = call(backend=backend, **option)
        assert not changed.allclose(plain, atol=1e-3)
        torch.testing.assert_close(changed, call(backend="reference", **option))


@pytest.mark.parametrize("backend", ["standard", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("lam_shape", [None, (), (1,), (6,), (5, 6), (5, 1), (2, 1, 6), (1, 1, 1), (2, 5, 6)])
def test_lam_shapes(backend: str, dtype: torch.dtype, lam_shape: tuple[int, ...] | None) -> None:
    lam = 0.8 if lam_shape is None else torch.rand(lam_shape)
    tensors = {name: value.to(dtype) for name, value in X._asdict().items() if name in X._fields[:5]}
    output = call(backend=backend, lam=lam, **tensors)
    full = torch.as_tensor(lam, dtype=torch.promote_types(dtype, torch.float32)).expand(2, 5, 6)
    assert output.dtype == dtype
    assert output.equal(call(backend=backend, lam=full, **tensors))


@pytest.mark.parametrize("backend", ["standard", "reference"])
@pytest.mark.parametrize("one_key", [False, True], ids=["V1", "V2"])
@pytest.mark.parametrize("sizes", [{"B": 0}, {"B": 0, "S": 11}, {"T": 0, "S": 3}], ids=str)
def test_empty(backend: str, one_key: bool, sizes: dict[str, int]) -> None:
    for pad in (False, True):
        x = make_inputs(**sizes, one_key=one_key)
        if pad:
            x = x._replace(key_padding=torch.zeros(x.k1.shape[:2], dtype=torch.bool))
        output, *gradients = forward_and_gradients(lambda *a, **o: diff_attention(*a, backend=backend, **o), x)
        assert output.shape == (*x.q1.shape[:3], x.v.shape[-1])
        for gradient, tensor in zip(gradients, x[:6], strict=True):
            assert gradient.shape == tensor.shape
            assert gradient.eq(0).all()


@pytest.mark.parametrize("backend", ["standard", "reference"])
def test_no_keys_at_all_gives_zeros(backend: str) -> None:
    output = call(backend=backend, causal=False, k1=X.k1[:, :0], k2=X.k2[:, :0], v=X.v[:, :0])
    assert output.shape == (2, 5, 6, 11)
    assert output.eq(0).all()


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


def quantized(x: Tensor) -> Tensor:
    # Deprecated, which is no reason to fail on one that someone still has.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"k2": zeros(2, 7, 12)}, r"k2 has 3 dimensions, \(2, 7, 12\); wanted \(batch, sequence, heads, width\)"),
    "no width": ({"v": zeros(2, 7, 3, 0)}, r"v is \(2, 7, 3, 0\); wanted at least one head and a width"),
    "no heads": ({"q1": zeros(2, 5, 0, 4)}, r"q1 is \(2, 5, 0, 4\); wanted at least one head"),
    "dtypes": ({"v": X.v.bfloat16()}, "inputs mix dtypes or devices .*v bfloat16 on cpu.*cast or move"),
    "devices": ({"v": X.v.to("meta")}, "inputs mix dtypes or devices .*v float32 on meta"),
    "integers": ({n: getattr(X, n).int() for n in X._fields[:5]}, "inputs are int32; wanted one of float32, bfloat16"),
    "q1, q2": (
        {"q2": zeros(2, 5, 3, 8)},
        r"q1 is \(2, 5, 6, 4\) and q2 is \(2, 5, 3, 8\); wanted equal shapes, but for the heads: give both maps",
    ),
    "noise heads that do not divide": (
        {"q2": zeros(2, 5, 4, 4)},
        "q1 has 6 heads and q2 has 4; wanted a number of heads in q2 that divides the number in q1: let each head",
    ),
    "more noise heads than signal heads": ({"q2": zeros(2, 5, 12, 4)}, "q1 has 6 heads and q2 has 12; wanted a number"),
    "a noise head of several groups": (
        {"q2": zeros(2, 5, 2, 4)},
        "q2 has 2 heads with 3 key/value groups; wanted a multiple of the groups: give each group at least one head",
    ),
    "no noise heads": ({"q2": zeros(2, 5, 0, 4)}, r"q2 is \(2, 5, 0, 4\); wanted at least one head"),
    "window 0": ({"window": 0}, "window=0; wanted a whole number, at least 1: pass None for no window"),
    "window below 0": ({"window": -3}, "window=-3; wanted a whole number, at least 1"),
    "window a float": ({"window": 2.0}, r"window is of type float; wanted a whole number or None: pass int\(window\)"),
    "window a bool": ({"window": True}, "window is of type bool; wanted a whole number or None"),
    "window a tensor": ({"window": torch.tensor(2)}, "window is of type Tensor; wanted a whole number or None"),
    "k1, k2": ({"k2": zeros(2, 8, 3, 4)}, r"k1 is \(2, 7, 3, 4\) and k2 is \(2, 8, 3, 4\); wanted equal shapes"),
    "widths": (
        {"k1": zeros(2, 7, 3, 8), "k2": zeros(2, 7, 3, 8)},
        "q1 has width 4 and k1 has width 8; wanted the same",
    ),
    "batch": ({"v": zeros(1, 7, 3, 11)}, "batch is 2 in q1, 2 in k1 and 1 in v; wanted one batch size"),
    "S": ({"v": zeros(2, 8, 3, 11)}, r"k1 is \(2, 7, 3, 4\) and v is \(2, 8, 3, 11\); wanted the same sequence"),
    "G": ({"v": zeros(2, 7, 1, 11)}, "wanted the same sequence and groups"),
    "groups": (
        {"k1": zeros(2, 7, 4, 4), "k2": zeros(2, 7, 4, 4), "v": zeros(2, 7, 4, 11)},
        "6 query heads with 4 key/value groups; wanted a multiple of the groups",
    ),
    "T > S": (
        {"k1": zeros(2, 3, 3, 4), "k2": zeros(2, 3, 3, 4), "v": zeros(2, 3, 3, 11)},
        "5 queries over 3 keys with causal=True, so that the first 2 would see no key; wanted at least as many keys",
    ),
    "scale below 0": ({"scale": -1.0}, "scale=-1.0; wanted a number above 0"),
    "scale 0": ({"scale": 0}, "scale=0.0; wanted a number above 0"),
    "scale below every float32": ({"scale": 1e-50}, "scale=1e-50; wanted a number above 0, at least 1.2e-38"),
    "scale NaN": ({"scale": float("nan")}, "scale=nan; wanted a finite number"),
    "scale of 400 digits": ({"scale": 10**400}, r"scale=inf; wanted a finite number, at most 3.4e\+38"),
    "scale text": ({"scale": "a"}, r"scale is of type str; wanted a number: pass float\(scale\)"),
    "scale a bool": ({"scale": True}, "scale is of type bool; wanted a number"),
    # The kernel would give no gradient of it.
    "scale a tensor": ({"scale": torch.tensor(0.5)}, "scale is of type Tensor; wanted a number"),
    "lam per sequence": ({"lam": zeros(2)}, r"lam is \(2,\); wanted a shape that broadcasts .*\(2, 5, 6\)"),
    "lam too long": ({"lam": zeros(2, 5, 6, 1)}, r"lam is \(2, 5, 6, 1\); wanted a shape"),
    "lam of integers": ({"lam": torch.ones(6, dtype=torch.long)}, "lam is int64; wanted a floating-point dtype"),
    "lam a list": ({"lam": [0.8]}, "lam is of type list; wanted a number or a tensor"),
    "lam an array": ({"lam": np.full(6, 0.8)}, "lam is of type ndarray; wanted a number or a tensor"),
    "lam None": ({"lam": None}, "lam is of type NoneType; wanted a number or a tensor"),
    "lam text": ({"lam": "a"}, "lam is of type str; wanted a number or a tensor"),
    "lam a bool": ({"lam": True}, "lam is of type bool; wanted a number or a tensor"),
    "lam a numpy bool": ({"lam": np.bool_(True)}, "lam is of type bool; wanted a number or a tensor"),
    "lam complex": ({"lam": 1j}, "lam is of type complex; wanted a number or a tensor"),
    "lam complex tensor": ({"lam": torch.tensor(1j)}, "lam is complex64; wanted a floating-point dtype"),
    "lam of 400 digits": ({"lam": 10**400}, r"lam=inf; wanted a finite number, at most 3.4e\+38"),
    "lam beyond float32": ({"lam": 1e300}, r"lam=1e\+300; wanted a finite number, at most 3.4e\+38"),
    "lam NaN": ({"lam": float("nan")}, "lam=nan; wanted a finite number"),
    "lam sparse": ({"lam": torch.rand(2, 5, 6).to_sparse()}, r"lam is sparse_coo; wanted a dense tensor: .*to_dense"),
    "lam meta": ({"lam": torch.rand(2, 5, 6, device="meta")}, "lam is on meta and q1 on cpu; wanted one device"),
    "lam one meta number": ({"lam": torch.tensor(0.8, device="meta")}, "lam is on meta and q1 on cpu"),
    "lam elsewhere": (
        {n: getattr(X, n).to("meta") for n in X._fields[:5]},
        "lam is on cpu and q1 on meta; wanted one device: move it with",
    ),
    "q1 None": ({"q1": None}, r"q1 is of type NoneType; wanted a tensor"),
    "q1 an array": ({"q1": X.q1.numpy()}, r"q1 is of type ndarray; wanted a tensor: .*torch.as_tensor"),
    "v sparse": ({"v": X.v.to_sparse()}, "v is sparse_coo; wanted a dense tensor"),
    "q1 nested": ({"q1": torch.nested.nested_tensor(list(X.q1), layout=torch.jagged)}, "q1 is a nested tensor; wanted"),
    "k1 quantized": ({"k1": quantized(X.k1)}, r"k1 is quantized to qint8; wanted a dense tensor: .*dequantize"),
    "complex": ({n: getattr(X, n).to(torch.complex64) for n in X._fields[:5]}, "inputs are complex64; wanted one of"),
    "causal text": ({"causal": "no"}, "causal is of type str; wanted True or False"),
    "causal None": ({"causal": None}, "causal is of type NoneType; wanted True or False"),
    "causal 1": ({"causal": 1}, "causal is of type int; wanted True or False"),
    "causal a tensor": ({"causal": torch.tensor(True)}, "causal is of type Tensor; wanted True or False"),
    "key_padding a list": ({"key_padding": [[False] * 7] * 2}, "key_padding is of type list; wanted a tensor"),
    "key_padding an array": (
        {"key_padding": np.zeros((2, 7), bool)},
        "key_padding is of type ndarray; wanted a tensor",
    ),
    "key_padding sparse": (
        {"key_padding": zeros(2, 7).bool().to_sparse()},
        "key_padding is sparse_coo; wanted a dense",
    ),
    # Which the kernel would read as memory of its own.
    "key_padding elsewhere": (
        {"key_padding": torch.zeros(2, 7, dtype=torch.bool, device="meta")},
        "key_padding is on meta and q1 on cpu; wanted one device",
    ),
    "cu_seqlens a list": ({"cu_seqlens": [0, 5]}, "cu_seqlens is of type list; wanted a tensor"),
    "cu_seqlens of a batch": (
        {"cu_seqlens": torch.tensor([0, 5])},
        "cu_seqlens with a batch of 2, 5 queries and 7 keys; wanted one row whose queries and keys are the same tokens",
    ),
    "backend None": ({"backend": None}, "backend=None; wanted the name of a backend"),
    "backend a list": ({"backend": ["standard"]}, r"backend=\['standard'\]; wanted the name of a backend"),
    "attention_mask": ({"key_padding": torch.ones(2, 7, dtype=torch.long)}, r"int64 \(2, 7\); wanted bool \(2, 7\)"),
    "key_padding shape": ({"key_padding": zeros(2, 5).bool()}, r"bool \(2, 5\); wanted bool \(2, 7\), True where"),
}


PACKED = make_inputs(B=1, T=23, H=4, G=2, D=4, Dv=8)
BEGINS = [0, 9, 9, 10, 23]


@pytest.mark.parametrize("backend", ["auto", "fused_cpu", "standard", "reference"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padding", [False, True])
def test_packed_sequences_are_each_alone(backend: str, causal: bool, padding: bool) -> None:
    if backend == "fused_cpu":
        require_kernel()
    key_padding = (torch.arange(23)[None] % 5 == 1) if padding else None

    def alone(*x: Tensor, **options: Any) -> Tensor:
        parts = []
        for a, b in itertools.pairwise(BEGINS):
            hidden = None if key_padding is None else key_padding[:, a:b]
            tensors = (y[:, a:b] for y in x)
            parts.append(diff_attention_reference(*tensors, causal=causal, key_padding=hidden))
        return torch.cat(parts, dim=1)

    def packed(*x: Tensor, **options: Any) -> Tensor:
        cu_seqlens = torch.tensor(BEGINS, dtype=torch.int32)
        return diff_attention(*x, causal=causal, key_padding=key_padding, cu_seqlens=cu_seqlens, backend=backend)

    for x in (PACKED, make_inputs(B=1, T=23, H=4, G=2, D=4, Dv=8, one_key=True)):
        compare_forward_and_gradients(packed, alone, x)
        assert not packed(*x[:6]).allclose(diff_attention(*x[:6], causal=causal), atol=1e-3)


BAD_BEGINS: dict[str, tuple[Tensor, str]] = {
    "floats": (torch.tensor([0.0, 23.0]), r"cu_seqlens is float32 \(2,\); wanted int32 or int64"),
    "lengths": (
        torch.tensor([9, 1, 13]),
        "cu_seqlens is 9, 1, 13 with 23 tokens; wanted numbers that rise from 0 to 23",
    ),
    "too short": (
        torch.tensor([0, 9]),
        "cu_seqlens is 0, 9 with 23 tokens; wanted numbers that rise from 0 to 23: add",
    ),
    "no sequence": (torch.tensor([0]), r"cu_seqlens is int64 \(1,\); wanted int32 or int64 \(sequences \+ 1,\)"),
    "falling": (torch.tensor([0, 12, 4, 6, 7, 8, 23]), "cu_seqlens is 0, 12, 4, 6, 7, 8, … with 23 tokens"),
}


@pytest.mark.parametrize("mistake", BAD_BEGINS)
def test_where_sequences_begin_is_checked(mistake: str) -> None:
    cu_seqlens, message = BAD_BEGINS[mistake]
    with pytest.raises(ConfigError, match=message):
        diff_attention(*PACKED[:6], cu_seqlens=cu_seqlens)


def test_packed_sequences_compile_to_one_graph() -> None:
    cu_seqlens = torch.tensor(BEGINS)
    compiled = torch.compile(lambda *x: diff_attention(*x, cu_seqlens=cu_seqlens), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*PACKED[:6]), diff_attention(*PACKED[:6], cu_seqlens=cu_seqlens))


def test_auto_passes_over_a_backend_that_another_one_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Backend("slow", "none", lambda call: None, unreachable, passed_over=lambda call: "slow: another is faster")
    monkeypatch.setattr(dispatch, "BACKENDS", {"slow": slow, "reference": BACKENDS["reference"]})
    assert call().equal(diff_attention_reference(*X[:6]))
    with pytest.raises(AssertionError, match="a backend ran"):
        call(backend="slow")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_with_the_way_out(mistake: str) -> None:
    changes, message = MISTAKES[mistake]
    with pytest.raises(ConfigError, match=message) as raised:
        call(**changes)
    assert "\n" not in str(raised.value)
    assert ";" in str(raised.value)


@pytest.mark.parametrize("backend", ["auto", "fused_cpu", "standard", "reference"])
def test_numbers_may_be_numpys(backend: str) -> None:
    if backend == "fused_cpu":
        require_kernel()
    expected = call(lam=0.5, scale=2.0, causal=False, backend=backend)
    for half, two in (
        (np.float32(0.5), np.float64(2.0)),
        (np.float16(0.5), np.int64(2)),
        (np.array(0.5), np.array(2)),
        (torch.tensor(0.5), 2),
        (Fraction(1, 2), Fraction(2)),
    ):
        assert call(lam=half, scale=two, causal=np.bool_(False), backend=backend).equal(expected)
    assert call(lam=np.int64(0), backend=backend).equal(call(lam=0, backend=backend))


def test_meta_tensors_give_shapes() -> None:
    x = [t.to("meta") for t in X[:6]]
    for lam in (x[5], 0.8, torch.tensor(0.8)):
        output = diff_attention(*x[:5], lam, key_padding=torch.zeros(2, 7, dtype=torch.bool, device="meta"))
        assert output.is_meta
        assert output.shape == (2, 5, 6, 11)


def test_a_batch_of_lam_for_a_batch_of_one_is_refused() -> None:
    x = make_inputs(B=1)
    with pytest.raises(ConfigError, match="lam is"):
        diff_attention(*x[:5], torch.rand(3, 7, 6))


def test_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(diff_attention, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*X[:6]), diff_attention(*X[:6]))
    torch.testing.assert_close(compiled(*X[:5], 0.8, causal=False), diff_attention(*X[:5], 0.8, causal=False))
