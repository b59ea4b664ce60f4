"""The standard call on a GPU: laid out for the kernel that PyTorch takes, and kept from cuDNN where that gives NaN."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support import cards
from support.backends import standard_diff_attention
from support.comparison import Inputs, compare_forward_and_gradients, forward_and_gradients, make_inputs
from support.known_wrong import assert_rejects_known_wrong
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffattn.ops import sdpa, standard
from diffattn.ops.reference import Call, diff_attention_reference

# PyTorch loads what forward mode needs with its own deprecated torch.jit.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

CUDA = torch.device("cuda")


class Seen(NamedTuple):
    """What one call of SDPA was given: shapes as (heads, length, width), and whether cuDNN was switched on."""

    q: tuple[int, ...]
    k: tuple[int, ...]
    v: tuple[int, ...]
    masked: bool
    is_causal: bool
    scale: float
    grouped: bool
    cudnn: bool


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    calls: list[Seen] = []
    real = F.scaled_dot_product_attention

    def record(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        shapes = (tuple(x.shape[1:]) for x in (q, k, v))
        masked, cudnn = options["attn_mask"] is not None, torch.backends.cuda.cudnn_sdp_enabled()
        calls.append(Seen(*shapes, masked, options["is_causal"], options["scale"], options["enable_gqa"], cudnn))
        return real(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    return calls


def padding(keys: int, left: int = 3, right: int = 2) -> Tensor:
    """Two sequences: the first has ``left`` padding keys in front, the second ``right`` behind."""
    key_padding = torch.zeros(2, keys, dtype=torch.bool)
    key_padding[0, :left] = True
    key_padding[1, keys - right :] = True
    return key_padding


# Of 2H = 12 query heads and G = 3 groups, with widths that are multiples of 8: heads of q, k and v, widths of k and v.
PADDED, V2 = (12, 3, 3, 32, 32), (12, 3, 3, 16, 16)
UNEQUAL, REPEATED, V2_REPEATED = (12, 6, 3, 16, 32), (12, 12, 12, 16, 32), (12, 12, 12, 16, 16)
FORMS = [
    # The card, the dtype, queries, whether there is padding: V1's form, V2's form.
    (cards.hopper, torch.bfloat16, 23, False, UNEQUAL, V2),
    (cards.hopper, torch.float16, 23, True, UNEQUAL, V2),
    (cards.hopper, torch.bfloat16, 9, False, UNEQUAL, V2),
    # One query over a cache takes many times as long in the unequal form.
    (cards.hopper, torch.bfloat16, 8, False, PADDED, V2),
    (cards.hopper, torch.bfloat16, 1, False, PADDED, V2),
    # No kernel but the memory-efficient one takes float32, and none takes float64.
    (cards.hopper, torch.float32, 23, False, REPEATED, V2_REPEATED),
    (cards.hopper, torch.float64, 23, False, PADDED, V2),
    (cards.ampere, torch.bfloat16, 23, False, PADDED, V2),
    (cards.ampere, torch.float16, 1, False, PADDED, V2),
    # FlashAttention refuses a mask, and the memory-efficient kernel refuses groups.
    (cards.ampere, torch.bfloat16, 23, True, REPEATED, V2_REPEATED),
    (cards.ampere, torch.float16, 1, True, REPEATED, V2_REPEATED),
]


@pytest.mark.parametrize(("card", "dtype", "queries", "padded", "v1", "v2"), FORMS)
def test_each_card_gets_the_form_that_it_serves(card, dtype, queries, padded, v1, v2, monkeypatch, seen) -> None:
    cards.use(monkeypatch, card)
    for one_key, (heads, key_heads, value_heads, width, value_width) in ((False, v1), (True, v2)):
        x = make_inputs(
            T=queries, S=23, D=16, Dv=16 if one_key else 32, dtype=dtype, one_key=one_key, scale=0.7,
            key_padding=padding(23) if padded else None,
        )  # fmt: skip
        seen.clear()
        output = standard_diff_attention(*x[:6], **x.options)
        # T < S is aligned at the bottom right, which takes a mask tensor, except for a single query.
        square, masked = queries == 23, padded or 1 < queries < 23
        assert seen == [
            Seen(
                (heads, queries, width), (key_heads, 23, width), (value_heads, 23, value_width), masked,
                is_causal=square and not masked, scale=0.7, grouped=value_heads != heads, cudnn=True,
            )
        ]  # fmt: skip
        assert output.shape == (2, queries, 6, x.v.shape[-1])
        assert output.dtype == dtype


def test_widths_that_cudnn_refuses_are_padded(monkeypatch, seen) -> None:
    cards.use(monkeypatch, cards.hopper)
    x = make_inputs(T=11, D=12, Dv=24, dtype=torch.bfloat16)
    standard_diff_attention(*x[:6])
    assert seen[0][:3] == ((12, 11, 24), (3, 11, 24), (3, 11, 24))


def test_what_the_user_switched_off_is_not_laid_out_for(monkeypatch, seen) -> None:
    cards.use(monkeypatch, cards.hopper)
    x = make_inputs(T=23, D=16, Dv=32, dtype=torch.bfloat16)
    forms = []
    for backends in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel([backends, SDPBackend.MATH]):
            standard_diff_attention(*x[:6])
        forms.append(seen[-1].k)
    assert forms == [(3, 23, 32), (12, 23, 16), (3, 23, 32)]


def test_the_cpu_gets_the_padded_call_and_nothing_is_asked(monkeypatch, seen) -> None:
    monkeypatch.setattr(standard, "chosen", None)
    x = make_inputs(T=64, S=64, D=16, Dv=32, key_padding=padding(64))
    forward_and_gradients(standard_diff_attention, x)
    assert seen == [Seen((12, 64, 32), (3, 64, 32), (3, 64, 32), True, False, 0.25, True, cudnn=True)]


def test_tensors_that_say_they_are_on_a_gpu_are_asked_about_there(monkeypatch) -> None:
    on_gpu = (sdpa.on_gpu, standard.on_gpu)
    cards.use(monkeypatch, cards.hopper)
    for module, function in zip((sdpa, standard), on_gpu, strict=True):
        monkeypatch.setattr(module, "on_gpu", function)
    asked, called = [], []

    def look(q: Tensor, *others: Any, **options: Any) -> int:
        asked.append(str(q.device))
        return cards.hopper(q, *others, **options)

    def call(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        called.append((k.shape[1], v.shape[1], str(v.device)))
        raise KeyboardInterrupt

    monkeypatch.setattr(sdpa, "fused_sdpa_choice", look)
    monkeypatch.setattr(F, "scaled_dot_product_attention", call)
    # PyTorch without CUDA has no autograd for such tensors, and does not slice them.
    with FakeTensorMode(), torch.no_grad():
        x = make_inputs(T=23, D=16, Dv=32, dtype=torch.bfloat16)
        there = [torch.empty_like(t, device=CUDA) for t in x[:6]]
        with pytest.raises(KeyboardInterrupt):
            standard_diff_attention(*there)
    assert asked == ["cuda:0"]
    assert called == [(6, 3, "cuda:0")]


CASES: dict[str, dict[str, Any]] = {
    "T = S": {},
    "T < S": {"S": 11},
    "not causal": {"T": 11, "S": 7, "causal": False},
    "padded, T = S: rows without keys": {"T": 11, "key_padding": padding(11)},
    "padded, T < S": {"S": 11, "key_padding": padding(11)},
    "a sequence of padding": {"S": 11, "causal": False, "key_padding": padding(11, 2, 11)},
    "one group": {"G": 1},
    "no groups": {"G": 6},
    "scale": {"scale": 0.9},
    "T = 1": {"T": 1, "S": 13},
}
# Unequal widths, heads repeated.
V1_FORMS = {"unequal": (True, False), "unequal and repeated": (True, True)}


def use_form(monkeypatch: pytest.MonkeyPatch, form: tuple[bool, bool]) -> None:
    monkeypatch.setattr(standard, "_form", lambda call, masked: form)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", [*V1_FORMS, "V2, repeated"])
def test_every_form_is_the_definition(form, case, dtype, monkeypatch, seen) -> None:
    use_form(monkeypatch, V1_FORMS.get(form, (False, True)))
    inputs = make_inputs(dtype=dtype, one_key=form not in V1_FORMS, **CASES[case])
    compare_forward_and_gradients(standard_diff_attention, diff_attention_reference, inputs)
    assert_rejects_known_wrong(inputs)
    heads, groups = 2 * inputs.q1.shape[2], inputs.v.shape[2]
    key_heads, value_heads = (2 * groups, groups) if form == "unequal" else (heads, heads)
    assert {(call.q[0], call.k[0], call.v[0]) for call in seen} == {(heads, key_heads, value_heads)}


@pytest.mark.parametrize("lam", [0.8, torch.tensor(0.8), torch.rand(6), torch.rand(7, 6), torch.rand(2, 1, 6)])
def test_unequal_takes_every_lambda(lam, monkeypatch) -> None:
    x = make_inputs()._replace(lam=lam)
    want = standard_diff_attention(*x[:6])
    use_form(monkeypatch, V1_FORMS["unequal"])
    torch.testing.assert_close(standard_diff_attention(*x[:6]), want)


@pytest.mark.parametrize("form", V1_FORMS)
def test_unequal_has_derivatives_of_every_order(form, monkeypatch) -> None:
    use_form(monkeypatch, V1_FORMS[form])
    x = make_inputs(B=1, T=3, S=4, H=2, G=1, D=2, Dv=3, dtype=torch.float64)
    leaves = tuple(t.requires_grad_() for t in x[:6])
    assert torch.autograd.gradcheck(standard_diff_attention, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(standard_diff_attention, leaves)


def compiled_call(dynamic: bool | None = None) -> tuple[Any, list[tuple[int, bool, bool]]]:
    """The compiled function; of the call in each graph the heads of the keys, and whether kernels were chosen for it.

    The third number says whether cuDNN is among those.
    """
    calls: list[tuple[int, bool, bool]] = []

    def look(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Any:
        backends, key = [], 0
        for node in graph.graph.nodes:
            if node.target is F.scaled_dot_product_attention:
                key = node.args[1].meta["example_value"].shape[1]
            elif node.target is torch.nn.attention._backend_from_string:
                backends.append(node.args[0])
        # The second half is what is switched on behind the call.
        calls.append((int(key), bool(backends), "CUDNN_ATTENTION" in backends[: len(backends) // 2]))
        return graph

    torch._dynamo.reset()
    return torch.compile(standard_diff_attention, fullgraph=True, backend=look, dynamic=dynamic), calls


@pytest.mark.parametrize(("card", "key_heads"), [(cards.hopper, 6), (cards.ampere, 12)])
def test_a_graph_asks_while_it_is_compiled(card, key_heads, monkeypatch) -> None:
    """With a mask of 64 keys: cuDNN is left out of the graph of a training step, and of no other."""
    cards.use(monkeypatch, card)
    x = make_inputs(T=64, S=64, D=16, Dv=32, dtype=torch.bfloat16, key_padding=padding(64))
    compiled, calls = compiled_call()
    got, want = forward_and_gradients(compiled, x), forward_and_gradients(standard_diff_attention, x)
    with torch.no_grad():
        got.append(compiled(*x[:6], **x.options))
    want.append(standard_diff_attention(*x[:6], **x.options))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
    # While gradients are recorded, no kernel but the memory-efficient one is left.
    assert calls == [(12, True, False), (key_heads, False, False)]
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_a_graph_for_every_length_asks_for_its_widths(monkeypatch) -> None:
    cards.use(monkeypatch, cards.hopper)
    compiled, calls = compiled_call(dynamic=True)
    for length in (23, 29):
        x = make_inputs(T=length, D=16, Dv=32, dtype=torch.bfloat16)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*x[:6]), standard_diff_attention(*x[:6]), rtol=0.05, atol=0.05)
    assert calls == [(6, False, False)]


def test_pytorch_is_asked_once_for_each_question_and_state_of_its_switches(monkeypatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def look(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool, **options: Any) -> int:
        shapes = tuple(tuple(x.shape) for x in (q, k, v))
        asked.append((*shapes, None if mask is None else tuple(mask.shape), q.dtype, q.requires_grad, options))
        return int(SDPBackend.EFFICIENT_ATTENTION)

    cards.use(monkeypatch, look)
    ask = functools.partial(sdpa.chosen, torch.device("cpu"), torch.bfloat16, (4, 2, 1), 16, 32)
    for _ in range(2):
        assert ask(masked=True, recorded=True) == SDPBackend.EFFICIENT_ATTENTION
    shapes = ((1, 4, 128, 16), (1, 2, 128, 16), (1, 1, 128, 32))
    assert asked == [(*shapes, (1, 1, 128, 128), torch.bfloat16, True, {"enable_gqa": True})]
    ask(masked=False, recorded=False)
    assert asked[1] == (*shapes, None, torch.bfloat16, False, {"enable_gqa": True})
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        ask(masked=False, recorded=False)
    torch.use_deterministic_algorithms(True)
    try:
        ask(masked=False, recorded=False)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(asked) == 4


def test_the_real_function_answers_for_the_cpu() -> None:
    """PyTorch's own choice, the one that is there without a card: flash for equal widths, math for others."""
    ask = functools.partial(sdpa.chosen, torch.device("cpu"), torch.float32, masked=False, recorded=True)
    assert ask((4, 1, 1), 32, 32) == SDPBackend.FLASH_ATTENTION
    assert ask((4, 2, 1), 16, 32) == SDPBackend.MATH
    # Nothing is raised where the math kernel is switched off too.
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        assert ask((4, 2, 1), 16, 32) == SDPBackend.MATH


def test_autocast_is_asked_about_in_its_own_dtype(monkeypatch, seen) -> None:
    dtypes = []

    def look(q: Tensor, *others: Any, **options: Any) -> int:
        dtypes.append(q.dtype)
        return cards.hopper(q, *others, **options)

    cards.use(monkeypatch, look)
    x = make_inputs(T=23, D=16, Dv=32)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    standard_diff_attention(*x[:6])
    assert (dtypes, seen[0].k) == ([torch.bfloat16], (6, 23, 16))
    standard_diff_attention(*x.to(torch.float64)[:6])
    assert set(dtypes) == {torch.bfloat16, torch.float64}


MASK = torch.ones(1, 1, 64, 64, dtype=torch.bool)
GUARDED = {
    "64 queries": (CUDA, 64, MASK, True),
    "192 keys": (CUDA, 1, torch.ones(2, 192), True),
}
LEFT_ALONE = {
    "CPU": (torch.device("cpu"), 64, MASK, True),
    "no mask": (CUDA, 64, None, True),
    "a mask of blocks": (CUDA, 64, object(), True),
    "no gradients": (CUDA, 64, MASK, False),
    "128 queries and keys": (CUDA, 128, torch.ones(1, 1, 128, 128), True),
    "another length": (CUDA, 100, torch.ones(1, 1, 100, 65), True),
}


@pytest.mark.parametrize("case", [*GUARDED, *LEFT_ALONE])
def test_cudnn_is_left_out_where_its_gradients_may_be_nan(case) -> None:
    device, queries, mask, recorded = (GUARDED | LEFT_ALONE)[case]
    before = torch.nn.attention._cur_sdpa_kernel_backends()
    with torch.set_grad_enabled(recorded), sdpa.without_nan(device, queries, mask) as _:
        within = torch.nn.attention._cur_sdpa_kernel_backends()
    assert torch.nn.attention._cur_sdpa_kernel_backends() == before
    without = [backend for backend in before if backend != SDPBackend.CUDNN_ATTENTION]
    assert len(without) == len(before) - 1
    assert within == (without if case in GUARDED else before)


@pytest.mark.parametrize("chosen", [[SDPBackend.MATH], [SDPBackend.CUDNN_ATTENTION]], ids=["math", "cuDNN alone"])
def test_what_the_user_chose_stays(chosen) -> None:
    with sdpa_kernel(chosen), sdpa.without_nan(CUDA, 64, MASK):
        assert torch.nn.attention._cur_sdpa_kernel_backends() == chosen


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("one_key", [False, True], ids=["V1", "V2"])
def test_a_masked_call_that_records_gradients_stays_away_from_cudnn(one_key, recorded, monkeypatch, seen) -> None:
    cards.use(monkeypatch, cards.hopper)
    x = make_inputs(
        T=64, D=16, Dv=16 if one_key else 32, dtype=torch.bfloat16, one_key=one_key, key_padding=padding(64)
    )
    with torch.enable_grad() if recorded else torch.no_grad():
        standard_diff_attention(*x[:6], **x.options)
    assert [call.cudnn for call in seen] == [not recorded]
    # Without cuDNN the mask leaves the memory-efficient kernel alone, which wants equal numbers of heads.
    assert (seen[0].k[0] == 12) == recorded


def test_second_derivatives_take_the_math_kernel_all_the_same(monkeypatch) -> None:
    cards.use(monkeypatch, cards.hopper)
    within: list[list[SDPBackend]] = []
    real = F.scaled_dot_product_attention

    def look(*tensors: Any, **options: Any) -> Tensor:
        within.append(torch.nn.attention._cur_sdpa_kernel_backends())
        return real(*tensors, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", look)
    x: Inputs = make_inputs(T=64, D=8, Dv=8, dtype=torch.bfloat16, key_padding=padding(64))
    q1 = x.q1.requires_grad_()
    output = standard.standard_diff_attention(Call(q1, *x[1:6], key_padding=x.key_padding))
    (gradient,) = torch.autograd.grad(output.sum(), q1, create_graph=True)
    gradient.sum().backward()
    assert SDPBackend.CUDNN_ATTENTION not in within[0]
    assert within[1:] == [[SDPBackend.MATH]] * (len(within) - 1)
    assert len(within) > 1
    assert isinstance(sdpa.without_nan(CUDA, 1, None), contextlib.nullcontext)
