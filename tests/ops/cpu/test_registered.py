"""The compiled kernel as an operator: its schema and fakes, tracing it, and what it refuses."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import pytest
import torch
from support.backends import fused_cpu_diff_attention, standard_diff_attention
from support.comparison import Inputs, compare, forward_and_gradients, make_inputs
from support.fused_cases import both_dtypes, padded, require_kernel
from torch import Tensor

from diffattn.errors import UnsupportedError
from diffattn.ops.cpu import build
from diffattn.ops.cpu import operator as fused_cpu
from diffattn.ops.dispatch import diff_attention
from diffattn.ops.reference import Call, diff_attention_reference
from diffattn.ops.visibility import seeing_queries


@pytest.fixture(autouse=True)
def _kernel(request: pytest.FixtureRequest) -> None:
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    require_kernel(parameters.get("dtype", torch.float32))


def operator_inputs(x: Inputs, one_key: bool, masked: bool) -> tuple[Any, ...]:
    T, S = x.q1.shape[1], x.k1.shape[1]
    queries = seeing_queries(T, S, True, padded(S, 3, 2)) if masked else None
    return (*x[:3], None if one_key else x.k2, *x[4:6], queries, not masked, 0.4)


@both_dtypes
@pytest.mark.parametrize("queries", [3, 20])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "queries"])
@pytest.mark.parametrize("one_key", [False, True], ids=["V1", "V2"])
def test_opcheck(one_key: bool, masked: bool, queries: int, dtype: torch.dtype) -> None:
    """Schema, autograd registration, fakes (static and dynamic shapes) of both operators agree with what they do."""
    x = make_inputs(T=queries, S=23, D=6, Dv=14, dtype=dtype, one_key=one_key)
    leaves = Inputs(*(t.clone().requires_grad_() for t in x[:6]))
    torch.library.opcheck(torch.ops.diffattn.fused_cpu.default, operator_inputs(leaves, one_key, masked))
    arguments = operator_inputs(x, one_key, masked)
    output, lse = torch.ops.diffattn.fused_cpu(*arguments)
    backward = (torch.randn_like(output), *arguments[:7], lse, *arguments[7:])
    torch.library.opcheck(torch.ops.diffattn.fused_cpu_backward.default, backward)


NORMS: dict[str, dict[str, Any]] = {
    "no norm": {},
    "norm": {"norm_scale": 0.7, "eps": 1e-3},
    "norm with gain": {"gain": torch.linspace(-1.0, 2.0, 14), "norm_scale": 0.7, "eps": 1e-3},
}


def as_of_a_layer(x: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Heads before tokens, noise heads behind their signal heads, both keys side by side where they are two."""
    query = torch.cat([x.q1.unflatten(2, (x.q2.shape[2], -1)), x.q2.unsqueeze(3)], dim=3).flatten(2, 3)
    key = x.k1 if x.k2 is x.k1 else torch.cat([x.k1, x.k2], dim=-1)
    return query.transpose(1, 2), key.transpose(1, 2).contiguous(), x.v.transpose(1, 2).contiguous(), x.lam


def normed(x: Inputs, gain: Tensor | None = None, norm_scale: float = 1.0, eps: float | None = None) -> Tensor:
    """The definition with the norm's; rounded to the inputs' dtype between them."""
    y = diff_attention_reference(*x[:6], **x.options)
    if eps is None:
        return y
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    scaled = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * norm_scale
    return (scaled if gain is None else scaled * gain).to(y.dtype)


@both_dtypes
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "padding"])
@pytest.mark.parametrize("one_key", [False, True], ids=["V1", "V2"])
@torch.no_grad()
def test_decoding_as_a_layer_calls_it(one_key: bool, masked: bool, norm: str, dtype: torch.dtype) -> None:
    for queries, keys in ((1, 23), (3, 23), (8, 8), (1, 1100)):
        if masked and queries == keys:
            continue
        x = make_inputs(T=queries, S=keys, D=6, Dv=14, dtype=dtype, one_key=one_key)
        x = x._replace(key_padding=padded(keys, 3, 0)) if masked else x
        seeing = None if x.key_padding is None else seeing_queries(queries, keys, True, x.key_padding)
        arguments, options = as_of_a_layer(x), NORMS[norm]
        assert fused_cpu.decodes(arguments[0], arguments[2])
        actual = fused_cpu.decode(*arguments, queries=seeing, **options)
        expected, eager = normed(x.to(torch.float64), **options), normed(x, **options)
        assert (actual.shape, actual.dtype) == (eager.shape, dtype)
        # Rounding of what the norm divides is divided by the same.
        floor = 4 * torch.finfo(dtype).eps * expected.abs().max().item()
        compare(actual, expected, eager, floors=[floor])
        arguments = (*arguments, seeing, 0.4, options.get("gain"), 0.7, options.get("eps"), True, 1)
        torch.library.opcheck(torch.ops.diffattn.fused_cpu_decoding.default, arguments)


@both_dtypes
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("one_key", [False, True], ids=["V1", "V2"])
@pytest.mark.parametrize("heads", [(12, 6, 3), (6, 2, 1), (5, 1, 1)], ids=str)
def test_shared_noise_heads_as_a_layer_calls_them(
    heads: tuple[int, int, int], one_key: bool, causal: bool, dtype: torch.dtype
) -> None:
    H, noise_heads, G = heads
    for queries, keys in ((1, 23), (3, 600), (20, 23)):
        x = make_inputs(
            T=queries, S=keys, H=H, noise_heads=noise_heads, G=G, D=6, Dv=14, dtype=dtype, one_key=one_key,
            causal=causal,
        )  # fmt: skip
        arguments, options = as_of_a_layer(x), {"causal": causal, "signals_per_noise": H // noise_heads}
        expected, eager = (diff_attention_reference(*y[:6], **y.options) for y in (x.to(torch.float64), x))
        assert fused_cpu.refuses(*arguments, None, signals_per_noise=H // noise_heads) is None
        compare(fused_cpu.attend(*arguments, scale=None, queries=None, **options), expected, eager)
        with torch.no_grad():
            if fused_cpu.decodes(arguments[0], arguments[2], signals_per_noise=H // noise_heads):
                compare(fused_cpu.decode(*arguments, **options), expected, eager)
                given = (*arguments, None, 0.4, None, 1.0, None, causal, H // noise_heads)
                torch.library.opcheck(torch.ops.diffattn.fused_cpu_decoding.default, given)
            else:
                assert queries == 20


@torch.no_grad()
def test_decoding_serves_few_queries_without_gradients_of_even_bfloat16_widths() -> None:
    def serves(dtype: torch.dtype = torch.float32, **shape: int) -> bool:
        query, _, value, _ = as_of_a_layer(make_inputs(**shape, dtype=dtype))
        return fused_cpu.decodes(query, value)

    assert serves(T=8, D=5)
    assert not serves(T=9, D=6, Dv=14)
    assert serves(torch.bfloat16, T=8, D=6, Dv=14)
    assert not serves(torch.bfloat16, T=8, D=5, Dv=14)
    assert not serves(torch.bfloat16, T=8, D=6, Dv=13)
    with torch.enable_grad():
        assert not serves(T=8, D=6)


def grads_equal(function: Any, x: Inputs) -> None:
    for got, want in zip(
        forward_and_gradients(function, x), forward_and_gradients(fused_cpu_diff_attention, x), strict=True
    ):
        assert got.equal(want)


@both_dtypes
@pytest.mark.parametrize("case", ["V1", "V2", "padded", "odd widths", "decoding"])
def test_compiles_to_one_graph(case: str, dtype: torch.dtype) -> None:
    options: dict[str, dict[str, Any]] = {
        "V1": {"T": 20, "D": 6},
        "V2": {"T": 20, "D": 6, "one_key": True},
        "padded": {"T": 20, "S": 23, "key_padding": padded(23, 3, 2)},
        "odd widths": {"T": 20, "D": 5, "Dv": 7},
        "decoding": {"T": 3, "S": 23},
    }
    torch._dynamo.reset()
    compiled = torch.compile(fused_cpu_diff_attention, fullgraph=True, backend="aot_eager")
    grads_equal(compiled, make_inputs(dtype=dtype, **options[case]))


@both_dtypes
def test_one_graph_serves_every_length(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused_cpu_diff_attention, fullgraph=True, backend=counter, dynamic=True)
    for T in (20, 33, 5, 130):
        grads_equal(compiled, make_inputs(T=T, D=6, dtype=dtype))
    assert counter.frame_count == 1


@pytest.mark.full
# Importing inductor warns that torch's own use of torch.jit is deprecated.
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@both_dtypes
def test_compiles_with_inductor(dtype: torch.dtype) -> None:
    """Around it is what a layer does: views of a projection before, a gain after."""

    def layer(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, lam: Tensor, **options: Any) -> Tensor:
        return 2 * diff_attention(2 * q1, k1 + 1, q2, k2, v.sin(), lam.sigmoid(), backend="fused_cpu", **options)

    torch._dynamo.reset()
    x = make_inputs(T=20, dtype=dtype)
    got = forward_and_gradients(torch.compile(layer, fullgraph=True), x)
    for a, b in zip(got, forward_and_gradients(layer, x), strict=True):
        torch.testing.assert_close(a, b)


class Attention(torch.nn.Module):
    def forward(self, q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, lam: Tensor) -> Tensor:
        return diff_attention(q1, k1, q2, k2, v, lam, backend="fused_cpu")


@both_dtypes
def test_exports_with_any_length(dtype: torch.dtype) -> None:
    x = make_inputs(T=20, D=6, Dv=14, dtype=dtype)
    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(Attention(), x[:6], dynamic_shapes=[{1: length}] * 6)
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("diffattn.fused_cpu.default") == 1
    for T in (20, 7, 131):
        other = make_inputs(T=T, D=6, Dv=14, dtype=dtype)
        assert program.module()(*other[:6]).equal(fused_cpu_diff_attention(*other[:6]))


@both_dtypes
def test_fake_tensors_have_the_shapes_and_strides_of_real_ones(dtype: torch.dtype) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    x = make_inputs(T=20, S=23, dtype=dtype)
    real = fused_cpu_diff_attention(*x[:6])
    with FakeTensorMode() as mode:
        fake = fused_cpu_diff_attention(*(mode.from_tensor(t) for t in x[:6]))
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


X = make_inputs(T=20, S=23, D=6)
REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "float64": ({n: getattr(X, n).double() for n in X._fields[:5]}, "float64 inputs are not supported; it serves"),
    "width of v": (make_inputs(T=20, S=23, Dv=257)._asdict(), "heads of 257 are not supported; .* up to 256"),
    "width of q": (make_inputs(T=20, S=23, D=300)._asdict(), "heads of 300 are not supported; .* up to 256"),
    "meta": ({n: getattr(X, n).to("meta") for n in X._fields[:6]}, "meta inputs are not supported; it serves cpu"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_refuses_in_a_sentence(refusal: str) -> None:
    changes, sentence = REFUSALS[refusal]
    call = X._asdict() | changes
    with pytest.raises(UnsupportedError, match=f"^fused_cpu: {sentence}"):
        diff_attention(**call, backend="fused_cpu")
    actual, expected = diff_attention(**call), diff_attention(**call, backend="standard")
    assert actual.dtype == expected.dtype
    assert actual.is_meta or actual.equal(expected)


def test_refuses_several_dtypes() -> None:
    reason = fused_cpu.unsupported(Call(*X[:4], X.v.bfloat16(), X.lam))
    assert reason == "fused_cpu: inputs of several dtypes are not supported; cast them to one"


def test_serves_the_widest() -> None:
    x = make_inputs(B=1, T=20, H=2, G=1, D=256, Dv=256)
    assert fused_cpu.unsupported(Call(*x[:6])) is None


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_threads_are_torchs_alone() -> None:
    """An OpenMP runtime of its own would be a second pool of threads."""
    path = build.status().path
    assert path is not None
    wanted = subprocess.run(["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True).stdout
    assert "torch_parallel_for" in wanted
    assert "omp" not in wanted.lower()


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert diff_attention(*X[:6]).equal(diff_attention(*X[:6], backend="fused_cpu"))
    monkeypatch.setenv("DIFFATTN_FUSED", "0")
    assert diff_attention(*X[:6]).equal(standard_diff_attention(*X[:6]))
    with pytest.raises(UnsupportedError, match=r"^fused_cpu: switched off by DIFFATTN_FUSED=0; wanted a backend"):
        diff_attention(*X[:6], backend="fused_cpu")


WRONG: dict[str, tuple[dict[int, Any], str]] = {
    "shapes": ({4: X.v[:, :20]}, "shapes do not fit"),
    "lam dtype": ({5: X.lam.double()}, "lam must be float32"),
    "lam shape": ({5: X.lam[:, :1]}, "lam must be float32"),
    "dtypes": ({0: X.q1.bfloat16()}, "dtypes differ|dtype"),
    "queries dtype": ({6: torch.zeros(2, 2, 23, dtype=torch.long)}, "queries must be int32"),
    "queries shape": ({6: torch.zeros(2, 2, 20, dtype=torch.int32)}, "queries must be int32"),
    "queries without an end": ({6: torch.zeros(2, 23, dtype=torch.int32)}, "queries must be int32"),
    "T > S": ({1: X.k1[:, :5], 3: X.k2[:, :5], 4: X.v[:, :5]}, "more queries than keys"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_the_operator_itself_checks_what_it_would_read_beyond(mistake: str) -> None:
    changes, sentence = WRONG[mistake]
    arguments = list(operator_inputs(X, one_key=False, masked=False))
    for i, value in changes.items():
        arguments[i] = value
    with pytest.raises(RuntimeError, match=sentence):
        torch.ops.diffattn.fused_cpu(*arguments)


def test_the_operator_refuses_odd_widths_in_half_precision() -> None:
    """Products in bfloat16 take pairs; `fused_cpu_diff_attention` adds a column of zeros, the operator does not."""
    require_kernel(torch.bfloat16)
    with pytest.raises(RuntimeError, match="even"):
        torch.ops.diffattn.fused_cpu(*operator_inputs(make_inputs(T=20, D=5, dtype=torch.bfloat16), False, False))
