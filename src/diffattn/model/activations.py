"""The activation functions of the feed-forward network: those of ``transformers``, and PolyNorm.

Some have parameters, a few numbers for each layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from diffattn.config_fields import POLY_NORM, shown
from diffattn.errors import ConfigError


class PolyNorm(nn.Module):
    """``w₀·N(x³) + w₁·N(x²) + w₂·N(x) + b`` with ``N(z) = z / √(mean(z²) + ε)`` over the channels (arXiv 2411.03884).

    >>> PolyNorm()(torch.tensor([1.0, -1.0]))
    tensor([ 1.0000, -0.3333], grad_fn=<AddBackward0>)
    """

    eps = 1e-6

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 1 / 3))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        # In float32 or wider: the cube of a half-precision number soon is infinite.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        weight, bias = self.weight.to(wide.dtype), self.bias.to(wide.dtype)
        powers = (wide**3, wide**2, wide)
        terms = [
            each * z * torch.rsqrt(z.square().mean(-1, keepdim=True) + self.eps)
            for each, z in zip(weight, powers, strict=True)
        ]
        return (terms[0] + terms[1] + terms[2] + bias).to(x.dtype)


def activation(name: str) -> nn.Module:
    """Returns the activation function of a name, with its parameters as training begins."""
    if name == POLY_NORM:
        return PolyNorm()
    # Some of the library's are made in half precision whatever the model has.
    return ACT2FN[name].to(torch.get_default_dtype())


def check_activation(name: str) -> None:
    """Raises a ``ConfigError`` unless there is an activation function of this name."""
    if name not in ACT2FN and name != POLY_NORM:
        raise ConfigError(
            f"hidden_act={shown(name)}",
            f"an activation function of transformers, or {POLY_NORM}",
            "use silu, for example",
        )


def activation_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Returns the names and shapes of what an activation function keeps in a checkpoint.

    >>> activation_shapes("poly_norm"), activation_shapes("silu")
    ({'weight': (3,), 'bias': (1,)}, {})
    """
    return {key: tuple(tensor.shape) for key, tensor in activation(name).state_dict().items()}


def start_again(module: nn.Module, name: str) -> None:
    """Gives a module that is this activation function the values with which training begins.

    Where a checkpoint gave it values, these stay.
    """
    # The model may have been built without storage.
    with torch.device("cpu"):
        fresh = activation(name)
    if type(module) is type(fresh):
        values = fresh.state_dict()
        for key, tensor in module.state_dict(keep_vars=True).items():
            init.copy_(tensor, values[key])
