"""Tests of the backend `fused_triton` in Triton's interpreter, which pytest collects in a process of its own alone.

    TRITON_INTERPRET=1 python -m pytest tests/ops/triton/interpreted_operator.py

`test_operator.py` runs this: `TRITON_INTERPRET` must be set before the operators and the kernels are imported.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.comparison import Inputs, compare, compare_forward_and_gradients, forward_and_gradients, make_inputs
from support.derivatives import SECOND, compare_derivatives, taken
from support.fused_cases import padded
from support.known_wrong import assert_rejects_known_wrong
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[3]))

from benchmarks.interpreter import mend_interpreter
from diffattn.errors import ConfigError, UnsupportedError
from diffattn.ops import kernel_derivatives
from diffattn.ops.dispatch import diff_attention
from diffattn.ops.reference import Call, diff_attention_reference
from diffattn.ops.triton import decoding, forward, launch
from diffattn.ops.triton import operator as fused_triton
from diffattn.ops.visibility import seeing_queries

assert os.environ["TRITON_INTERPRET"] == "1"
mend_interpreter()

# PyTorch loads what forward mode and inductor need with its own deprecated torch.jit. A kernel computes both sides of a
# choice, such as the logarithm of a sum of no exponentials, of which NumPy warns.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]

BF16, F16 = torch.bfloat16, torch.float16
# Small: the interpreter takes milliseconds for each program, and one takes 64 queries or keys of a head.
SIZES: dict[str, Any] = {"T": 11, "H": 2, "G": 1, "D": 8, "Dv": 16}


def inputs(dtype: torch.dtype = BF16, **options: Any) -> Inputs:
    return make_inputs(**SIZES | options, dtype=dtype)


def by_name(*tensors: Any, **options: Any) -> Tensor:
    return diff_attention(*tensors, backend="fused_triton", **options)


CASES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "V1": (BF16, {}),
    "V2": (BF16, {"one_key": True, "Dv": 8}),
    "V2, float16, padded": (F16, {"one_key": True, "key_padding": padded(11, 3, 2)}),
    "padded": (BF16, {"key_padding": padded(11, 3, 2)}),
    "T < S, padded": (F16, {"S": 19, "key_padding": padded(19, 5, 2)}),
    "two groups": (BF16, {"B": 1, "H": 4, "G": 2}),
    "no groups, odd widths": (BF16, {"G": 2, "D": 5, "Dv": 13}),
    "not causal": (BF16, {"T": 13, "S": 11, "causal": False, "scale": 0.9}),
    "few queries": (BF16, {"T": 3, "S": 19}),
    "few queries, V2, padded": (F16, {"T": 2, "S": 19, "one_key": True, "key_padding": padded(19, 5, 2)}),
}


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients(case: str) -> None:
    dtype, options = CASES[case]
    x = inputs(dtype, **options)
    compare_forward_and_gradients(by_name, diff_attention_reference, x)
    assert_rejects_known_wrong(x)
    # Without gradients other kernels run, or the same ones and save nothing.
    with torch.no_grad():
        output = by_name(*x[:6], **x.options)
    expected, eager = (diff_attention_reference(*y[:6], **y.options) for y in (x.to(torch.float64), x))
    compare(output, expected, eager)


def test_a_row_packed_from_three_sequences() -> None:
    x = inputs(B=1)
    begins = torch.tensor([0, 4, 5, 11])
    for causal in (True, False):
        compare_forward_and_gradients(
            lambda *t, causal=causal, **_: by_name(*t, causal=causal, cu_seqlens=begins),
            lambda *t, causal=causal, **_: torch.cat(
                [
                    diff_attention_reference(*(y[:, a:b] for y in t), causal=causal)
                    for a, b in itertools.pairwise(begins)
                ],
                dim=1,
            ),
            x,
        )


@pytest.mark.parametrize("shape", [(), (2,), (11, 1), (2, 1, 1)], ids=str)
def test_lam_of_any_shape(shape: tuple[int, ...]) -> None:
    """One λ for all, per head, per token, per sequence: its gradient has its shape."""
    lam = torch.rand(shape, generator=torch.Generator().manual_seed(3))
    compare_forward_and_gradients(by_name, diff_attention_reference, inputs()._replace(lam=lam))


def test_lam_as_a_number_and_in_half_precision() -> None:
    x = inputs()
    assert by_name(*x[:5], 0.5).equal(by_name(*x[:5], torch.tensor(0.5)))
    lam = x.lam.bfloat16().requires_grad_()
    by_name(*x[:5], lam).sum().backward()
    assert lam.grad is not None
    assert lam.grad.dtype == BF16


def layouts(x: Inputs) -> dict[str, Inputs]:
    """The same numbers as views: heads before tokens, the end of wider rows, columns that are not dense."""
    before = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in x[:5]]
    ends = [torch.cat([t, t], 2)[:, :, t.shape[2] :] for t in x[:5]]
    apart = [torch.stack([t, t], -1)[..., 0] for t in x[:5]]
    return {name: Inputs(*t, x.lam) for name, t in {"heads": before, "rows": ends, "columns": apart}.items()}


@pytest.mark.parametrize(("queries", "layout"), [(11, "heads"), (11, "columns"), (3, "rows")])
def test_strided_views(queries: int, layout: str) -> None:
    x = inputs(T=queries, S=12)
    leaves = [t.requires_grad_() for t in layouts(x)[layout][:5]]
    cotangent = torch.randn(2, queries, 2, 16, generator=torch.Generator().manual_seed(1)).to(BF16)
    output = by_name(*leaves, x.lam)
    gradients = torch.autograd.grad(output, leaves, cotangent)
    for got, want in zip([output, *gradients], forward_and_gradients(by_name, x), strict=False):
        assert got.equal(want)
    with torch.no_grad():
        assert by_name(*leaves, x.lam).equal(by_name(*x[:6]))


@pytest.mark.parametrize("kind", ["one number", "one row", "transposed"])
def test_incoming_gradients_of_any_layout(kind: str) -> None:
    x = inputs()
    leaves = [t.requires_grad_() for t in x[:6]]
    output = by_name(*leaves)
    whole = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(BF16)
    cotangent = {
        "one number": whole[:1, :1, :1, :1].expand_as(output),
        "one row": whole[:, :1].expand_as(output),
        "transposed": whole.transpose(1, 3).contiguous().transpose(1, 3),
    }[kind]
    assert not cotangent.is_contiguous()
    got = torch.autograd.grad(output, leaves, cotangent, retain_graph=True)
    for a, b in zip(got, torch.autograd.grad(output, leaves, cotangent.contiguous()), strict=True):
        assert a.equal(b)


@pytest.mark.parametrize("one_key", [False, True], ids=["V1", "V2"])
@pytest.mark.parametrize("sizes", [{"B": 0}, {"T": 0, "S": 3}, {"T": 3, "S": 0, "causal": False}], ids=str)
def test_empty(sizes: dict[str, Any], one_key: bool) -> None:
    x = inputs(**sizes, one_key=one_key)
    output, *gradients = forward_and_gradients(by_name, x)
    assert output.shape == (*x.q1.shape[:3], 16)
    assert output.eq(0).all()
    for gradient, tensor in zip(gradients, x[:6], strict=True):
        assert gradient.shape == tensor.shape
        assert gradient.eq(0).all()
    with torch.no_grad():
        assert by_name(*x[:6], causal=x.causal).eq(0).all()


# The operators.


def joined(x: Inputs) -> tuple[Any, ...]:
    keys = x.k1.unsqueeze(3) if x.k2 is x.k1 else torch.stack([x.k1, x.k2], dim=3)
    return torch.stack([x.q1, x.q2], dim=3), keys, x.v, x.lam


def ranges(x: Inputs) -> Tensor | None:
    T, S = x.q1.shape[1], x.k1.shape[1]
    return None if x.key_padding is None else seeing_queries(T, S, True, x.key_padding)


# `opcheck` reads `.grad` of what is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("case", ["V1", "V2, padded"])
def test_opcheck(case: str) -> None:
    """Schema, autograd, fakes of fixed and of free sizes, tracing: of all four operators."""
    options: dict[str, Any] = {"D": 4, "Dv": 4, "T": 9, "S": 9}
    if case != "V1":
        options |= {"one_key": True, "key_padding": padded(9, 3, 2)}
    operators = torch.ops.diffattn
    x = inputs(**options)
    arguments = (*joined(x), ranges(x))
    torch.library.opcheck(
        operators.fused_triton.default,
        (*(t.clone().requires_grad_() for t in arguments[:4]), arguments[4], True, 0.4),
    )
    saved = operators.fused_triton(*arguments, True, 0.4)
    backward = (torch.randn_like(saved[0]), *arguments, *saved, True, 0.4)
    torch.library.opcheck(operators.fused_triton_backward.default, backward)
    for queries in (3, 9):
        y = inputs(**options | {"T": queries})
        apart = (*y[:3], None if y.k2 is y.k1 else y.k2, *y[4:6], ranges(y), True, 0.4)
        if queries == 9:
            apart = tuple(t.requires_grad_() if isinstance(t, Tensor) and t.dtype == BF16 else t for t in apart)
        torch.library.opcheck(operators.fused_triton_output.default, apart)


def as_of_a_layer(x: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Heads before tokens, pairs of queries adjacent, both keys side by side where they are two."""
    query = torch.stack([x.q1, x.q2], dim=3).flatten(2, 3)
    key = x.k1 if x.k2 is x.k1 else torch.cat([x.k1, x.k2], dim=-1)
    return query.transpose(1, 2), key.transpose(1, 2).contiguous(), x.v.transpose(1, 2).contiguous(), x.lam


def normed(x: Inputs, gain: Tensor | None = None, norm_scale: float = 1.0, eps: float | None = None) -> Tensor:
    y = diff_attention_reference(*x[:6], **x.options)
    if eps is None:
        return y
    y = y / (y.square().mean(-1, keepdim=True) + eps).sqrt() * norm_scale
    return y if gain is None else y * gain


NORMS: dict[str, dict[str, Any]] = {
    "no norm": {},
    "norm": {"norm_scale": 0.7, "eps": 1e-3},
    "norm with gain": {"gain": torch.linspace(-1.0, 2.0, 16), "norm_scale": 0.7, "eps": 1e-3},
}


@pytest.mark.parametrize(
    ("norm", "one_key"), [("no norm", True), ("norm", False), ("norm with gain", False)], ids=["V2", "V1", "V1, gain"]
)
@torch.no_grad()
def test_decoding_as_a_layer_calls_it(norm: str, one_key: bool) -> None:
    options = NORMS[norm]
    for queries, padding in ((1, None), (3, padded(19, 5, 2))):
        x = inputs(T=queries, S=19, one_key=one_key, key_padding=padding)
        arguments = as_of_a_layer(x)
        assert fused_triton.decodes(arguments[0], arguments[2])
        got = fused_triton.decode(*arguments, queries=ranges(x), **options)
        wanted = normed(x.to(torch.float64), **options)
        assert (got.dtype, got.shape) == (BF16, wanted.shape)
        assert (got.double() - wanted).norm() <= 1e-2 * wanted.norm()
    given = (*arguments, ranges(x), 0.4, options.get("gain"), 0.7, options.get("eps"), True, 1)
    torch.library.opcheck(torch.ops.diffattn.fused_triton_decoding.default, given)


def test_few_queries_are_decoded_and_nothing_is_saved_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of a cache are read where they lie."""
    seen: list[Any] = []
    forward_kernel, decoding_kernel = forward.forward, decoding.decode

    def forwarded(*tensors: Any, **options: Any) -> Any:
        seen.append(("forward", options.get("save", True), [t.data_ptr() for t in tensors[:5]]))
        return forward_kernel(*tensors, **options)

    def decoded(*tensors: Any, **options: Any) -> Any:
        seen.append(("decoding", [t.data_ptr() for t in tensors[:5]]))
        return decoding_kernel(*tensors, **options)

    monkeypatch.setattr(forward, "forward", forwarded)
    monkeypatch.setattr(decoding, "decode", decoded)
    x = inputs()
    few = [t[:, -8:] if i in (0, 2, 5) else t for i, t in enumerate(x[:6])]
    with torch.no_grad():
        by_name(*x[:6])
        by_name(*few)
    by_name(*few[:5], few[5].requires_grad_()).sum().backward()
    assert seen[0] == ("forward", False, [t.data_ptr() for t in x[:5]])
    assert seen[1] == ("decoding", [t.data_ptr() for t in few[:5]])
    assert seen[2][:2] == ("forward", True)
    assert len(seen) == 3
    # Their rows with the heads of a group would not fit into registers.
    assert launch.few(8, 8, 1)
    assert not launch.few(8, 9, 1)
    assert not launch.few(9, 1, 1)


WRONG: dict[str, tuple[dict[int, Any], str]] = {
    "shapes": ({2: inputs().v[:, :5]}, "shapes that fit each other"),
    "heads": ({1: joined(inputs(G=3))[1], 2: inputs(G=3).v}, "shapes that fit each other"),
    "maps": ({0: joined(inputs())[0][:, :, :, :1]}, "queries of 2 or more and keys of 1 or 2"),
    "dtypes": ({2: inputs(F16).v}, "one dtype"),
    "lam dtype": ({3: inputs().lam.double()}, "float32"),
    "lam shape": ({3: inputs().lam[:, :1]}, "float32"),
    "queries dtype": ({4: torch.zeros(2, 2, 11, dtype=torch.long)}, "int32"),
    "queries shape": ({4: torch.zeros(2, 2, 9, dtype=torch.int32)}, "int32"),
    "T > S": ({1: joined(inputs(S=5))[1], 2: inputs(S=5).v}, "at least as many keys as queries"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_the_operator_checks_what_it_would_read_beyond(mistake: str) -> None:
    changes, wanted = WRONG[mistake]
    arguments = [*joined(inputs()), None]
    for i, value in changes.items():
        arguments[i] = value
    with pytest.raises(ConfigError, match=f"wanted {wanted}"):
        torch.ops.diffattn.fused_triton(*arguments, True, 0.4)


# Tracing.


def grads_equal(function: Any, x: Inputs) -> None:
    for got, want in zip(forward_and_gradients(function, x), forward_and_gradients(by_name, x), strict=True):
        assert got.equal(want)


@pytest.mark.parametrize(("case", "backend"), [("V1", "inductor"), ("V2, padded", "aot_eager")])
def test_compiles_to_one_graph(case: str, backend: str) -> None:
    """Around it is what a layer does: views of a projection before, a gain after."""

    def layer(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, lam: Tensor, **options: Any) -> Tensor:
        return 2 * by_name(2 * q1, k1, q2, k2, v.neg(), lam.neg(), **options)

    options: dict[str, dict[str, Any]] = {
        "V1": {},
        "V2, padded": {"one_key": True, "key_padding": padded(11, 3, 2)},
    }
    x = inputs(**options[case])
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for got, want in zip(forward_and_gradients(compiled, x), forward_and_gradients(layer, x), strict=True):
        torch.testing.assert_close(got, want)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*x[:6], **x.options), layer(*x[:6], **x.options))


def test_one_graph_serves_every_length() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(by_name, fullgraph=True, backend=counter, dynamic=True)
    for T in (11, 5):
        grads_equal(compiled, inputs(T=T))
    assert counter.frame_count == 1


class Attention(torch.nn.Module):
    def forward(self, q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, lam: Tensor) -> Tensor:
        return by_name(q1, k1, q2, k2, v, lam)


def test_exports_with_any_length() -> None:
    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(Attention(), inputs()[:6], dynamic_shapes=[{1: length}] * 6)
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("diffattn.fused_triton_output.default") == 1
    for T in (11, 5):
        x = inputs(T=T)
        assert program.module()(*x[:6]).equal(by_name(*x[:6]))


# Derivatives.

SMALL: dict[str, int] = {"B": 1, "T": 3, "S": 4, "H": 2, "G": 1, "D": 2, "Dv": 3}


@pytest.mark.parametrize(
    ("derivative", "case"),
    [
        ("vmap of all", "V1"),
        ("vmap of grad", "V2, padded"),
        ("jvp", "V1"),
        ("forward_ad", "V2, padded"),
        ("double backward", "V1"),
        ("double backward", "V2, padded"),
        ("grad of grad", "V1"),
        ("dual cotangent", "V1"),
    ],
)
def test_the_operators_have_every_derivative(derivative: str, case: str) -> None:
    """Called past `unsupported`, as by a compiled graph; under `auto` another backend serves forward mode."""
    options = {} if case == "V1" else {"one_key": True, "key_padding": padded(4, 1, 1)[:1]}

    def function(*tensors: Any, **options: Any) -> Tensor:
        return fused_triton.fused_triton_diff_attention(Call(*tensors, **options))

    compare_derivatives(derivative, function, make_inputs(**SMALL, **options, dtype=BF16))


@pytest.mark.parametrize("derivative", ["jvp", "grad of jvp", "dual cotangent", "double backward", "hessian"])
def test_by_name_it_refuses_those_that_the_kernels_lack(derivative: str) -> None:
    kind = "second derivatives" if derivative in SECOND else "derivatives in forward mode"
    with pytest.raises(UnsupportedError, match=f"^fused_triton: {kind} are not supported; wanted a backend"):
        taken(derivative, by_name, make_inputs(**SMALL, dtype=BF16))


@pytest.mark.parametrize("derivative", ["vmap of grad", "grad of vmap"])
def test_first_derivatives_are_the_kernels(derivative: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any) -> Any:
        raise AssertionError("a map was computed")

    monkeypatch.setattr(kernel_derivatives, "softmax_map", unreachable)
    taken(derivative, by_name, make_inputs(**SMALL, dtype=BF16))
