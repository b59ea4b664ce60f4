"""Derivatives of a whole model beyond the first in reverse mode: by attn_implementation "diff_fused" as by "eager"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.comparison import compare
from support.fused_cases import needs_the_kernel, require_kernel
from support.small_models import small_model, tokens
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

from diffattn.model.fused import DIFF_FUSED
from diffattn.model.modeling import DiffTransformerForCausalLM

# PyTorch loads what forward mode needs with its own deprecated torch.jit.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

Model = DiffTransformerForCausalLM
Parameters = dict[str, Tensor]


def direction(like: Tensor) -> Tensor:
    return torch.sin(torch.arange(like.numel(), dtype=torch.float64)).view(like.shape).to(like)


def logits(model: Model, ids: Tensor, mask: Tensor | None) -> Callable[[Parameters], Tensor]:
    """As a function of the first layer's projections, in front of every other layer's attention."""

    def of_parameters(parameters: Parameters) -> Tensor:
        options: dict[str, Any] = {"attention_mask": mask, "use_cache": False}
        return functional_call(model, parameters, (ids,), options).logits

    return of_parameters


def chosen(model: Model) -> Parameters:
    return {n: p.detach() for n, p in model.named_parameters() if "layers.0.self_attn" in n}


def loss(f: Callable[[Parameters], Tensor]) -> Callable[[Parameters], Tensor]:
    return lambda parameters: f(parameters).square().mean()


def forward_mode(model: Model, ids: Tensor, mask: Tensor | None) -> list[Tensor]:
    x = chosen(model)
    return list(jvp(logits(model, ids, mask), (x,), ({n: direction(p) for n, p in x.items()},)))


def dual_numbers(model: Model, ids: Tensor, mask: Tensor | None) -> list[Tensor]:
    with forward_ad.dual_level(), torch.no_grad():
        x = {n: forward_ad.make_dual(p, direction(p)) for n, p in chosen(model).items()}
        return list(forward_ad.unpack_dual(logits(model, ids, mask)(x)))


def double_backward(model: Model, ids: Tensor, mask: Tensor | None) -> list[Tensor]:
    x = {n: p.requires_grad_() for n, p in chosen(model).items()}
    first = torch.autograd.grad(loss(logits(model, ids, mask))(x), list(x.values()), create_graph=True)
    product = sum((g * direction(g)).sum() for g in first)
    return [*first, *torch.autograd.grad(product, list(x.values()))]


def product_with_the_hessian(model: Model, ids: Tensor, mask: Tensor | None) -> list[Tensor]:
    x = chosen(model)
    _, product = jvp(grad(loss(logits(model, ids, mask))), (x,), ({n: direction(p) for n, p in x.items()},))
    return list(product.values())


DERIVATIVES = [forward_mode, dual_numbers, double_backward, product_with_the_hessian]


def taken(derivative: Callable[..., list[Tensor]], model: Model, implementation: str, *inputs: Any) -> list[Tensor]:
    model.set_attn_implementation(implementation)
    return [x.detach() for x in derivative(model, *inputs)]


def compare_with_eager(
    attention: str, derivative: Callable[..., list[Tensor]], length: int = 11, by_sdpa: bool = False
) -> None:
    ids, mask = tokens(2, length), torch.ones(2, length, dtype=torch.long)
    mask[0, -3:] = 0
    for inputs in ((ids, None), (ids, mask)):
        actual = taken(derivative, small_model(attention), DIFF_FUSED, *inputs)
        eager = taken(derivative, small_model(attention), "eager", *inputs)
        # λ is float32 in the float64 model too, and its derivatives with it.
        expected = [x.double() for x in taken(derivative, small_model(attention).double(), "eager", *inputs)]
        names = [str(i) for i in range(len(expected))]
        # SDPA's math backend scales q and k both, so its scores round once more: what test_fused.py grants sdpa.
        # The four λ vectors get one number, times each other: eager's error of it can be nothing by luck.
        floors = [
            1e-5 * max(x.abs().max().item(), 0.1)
            if by_sdpa
            else (5e-6 if x.dim() == 1 else 2.4e-7) * x.abs().max().item()
            for x in expected
        ]
        compare(actual, expected, eager, factor=3.0, names=names, floors=floors)
        assert all(x.abs().max() > 0 for x in expected)


@needs_the_kernel
@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("attention", ["diff_v1", "diff_v2"])
def test_a_fused_model_has_every_derivative(attention: str, derivative: Callable[..., list[Tensor]]) -> None:
    compare_with_eager(attention, derivative)


@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_so_has_one_whose_calls_are_standard(
    derivative: Callable[..., list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFATTN_FUSED", "0")
    compare_with_eager("diff_v1", derivative, by_sdpa=True)


@pytest.mark.parametrize("attention", ["diff_v1", "diff_v2"])
def test_few_tokens_in_forward_mode_are_not_decoded(attention: str) -> None:
    """The operator that decodes has no derivative, and would give none without a word."""
    require_kernel()
    compare_with_eager(attention, dual_numbers, length=5)


@needs_the_kernel
def test_gradients_of_each_example() -> None:
    model = small_model("diff_v1")
    model.set_attn_implementation(DIFF_FUSED)
    ids, x = tokens(3, 11), chosen(model)
    each = vmap(lambda row: grad(loss(logits(model, row[None], None)))(x))(ids)
    for i, row in enumerate(ids):
        for name, gradient in grad(loss(logits(model, row[None], None)))(x).items():
            torch.testing.assert_close(each[name][i], gradient)
