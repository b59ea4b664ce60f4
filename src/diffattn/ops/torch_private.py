"""The names of PyTorch that ``ops`` uses although PyTorch does not promise to keep them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.attention
from torch import Tensor, nn
from torch._C import _functorch
from torch._functorch.utils import enable_single_level_autograd_function as enable_single_level_autograd_function
from torch.autograd import forward_ad

from diffattn.private_names import PrivateName

TransformType = _functorch.TransformType
get_interpreter_stack = _functorch.get_interpreter_stack
get_unwrapped = _functorch.get_unwrapped
is_batchedtensor = _functorch.is_batchedtensor
is_functorch_wrapped_tensor = _functorch.is_functorch_wrapped_tensor
in_transform = torch._C._are_functorch_transforms_active
any_requires_grad = torch._C._any_requires_grad
modes_that_see_operators = torch._C._len_torch_dispatch_stack
below_autograd = torch._C._AutoDispatchBelowAutograd
AFTER_AUTOGRAD = torch._C._after_autograd_keyset
SingleLevelFunction = torch.autograd.function._SingleLevelFunction
forward_mode_enabled = forward_ad._set_fwd_grad_enabled
fused_sdpa_choice = torch._fused_sdp_choice
current_sdpa_backends = torch.nn.attention._cur_sdpa_kernel_backends


def in_forward_mode() -> bool:
    """Returns whether this code runs within ``torch.autograd.forward_ad.dual_level``."""
    return forward_ad._current_level >= 0


def quiet_redistribution() -> None:
    """Silences the hints of DTensor that gathering over two dimensions of a mesh takes two steps, one of each rank."""
    # It takes a second to import, which most do not need.
    from torch.distributed.tensor import _redistribute

    logging.getLogger(_redistribute.__name__).setLevel(logging.ERROR)


@contextlib.contextmanager
def other_parameters(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Has a module compute with other tensors than its own parameters, by name, for as long as this lasts.

    ``torch.func.functional_call`` does the same around a call of the module, and not within its ``forward``.
    """
    held = {name: module._parameters[name] for name in tensors}
    module._parameters.update(tensors)  # type: ignore[arg-type]
    try:
        yield
    finally:
        module._parameters.update(held)


def constant_while_compiled(function: Callable[..., Any]) -> None:
    """Has ``torch.compile`` call the function once, while it compiles, and take what it returns as a constant.

    ``torch.compiler.assume_constant_result`` does the same, and imports the compiler: two seconds of every start.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]


_TESTED = ">=2.13,<2.14"
_TRANSFORMS = (
    "second derivatives and forward mode of attention within torch.func raise an error",
    "PyTorch has a public function that says which transforms of torch.func are active",
)
_SDPA = (
    "V1 on a GPU is not laid out for the kernel that serves it, and cuDNN's NaN is not avoided",
    "PyTorch has a public function that says which kernel it takes for a call, and which ones are switched on",
)
_KERNEL = (
    "derivatives of the kernels within torch.func, and in forward mode, raise an error",
    "torch.library.register_autograd passes tangents on and works within torch.func",
)
NAMES = (
    *(
        PrivateName(f"torch._C._functorch:{name}", _TESTED, *_TRANSFORMS)
        for name in (
            "TransformType", "get_interpreter_stack", "get_unwrapped", "is_batchedtensor",
            "is_functorch_wrapped_tensor",
        )
    ),
    PrivateName("torch._C:_are_functorch_transforms_active", _TESTED, *_TRANSFORMS),
    PrivateName(
        "torch.autograd.forward_ad:_current_level", _TESTED,
        "attention in forward mode returns no tangents", "torch.autograd.forward_ad says whether a level is open",
    ),
    *(
        PrivateName(f"torch._C:{name}", _TESTED, *_KERNEL)
        for name in (
            "_AutoDispatchBelowAutograd", "_after_autograd_keyset", "_any_requires_grad", "_len_torch_dispatch_stack",
        )
    ),
    PrivateName("torch.autograd.function:_SingleLevelFunction", _TESTED, *_KERNEL),
    PrivateName("torch.autograd.forward_ad:_set_fwd_grad_enabled", _TESTED, *_KERNEL),
    PrivateName("torch._functorch.utils:enable_single_level_autograd_function", _TESTED, *_KERNEL),
    PrivateName(
        "torch._dynamo.decorators:assume_constant_result._dynamo_marked_constant", _TESTED,
        "torch.compile breaks the graph at each call of the CPU kernel",
        "torch.compiler.assume_constant_result no longer imports the compiler",
    ),
    PrivateName("torch:_fused_sdp_choice", _TESTED, *_SDPA),
    PrivateName("torch.nn.attention:_cur_sdpa_kernel_backends", _TESTED, *_SDPA),
    PrivateName(
        "torch.nn:Module._apply", _TESTED,
        "λ and the rotary frequencies are rounded when a model is cast to half precision",
        "a parameter can be marked as one that keeps its dtype",
    ),
    PrivateName(
        "torch.distributed.tensor:_redistribute", _TESTED,
        "each rank prints hints about sharded models of which nobody can take one",
        "DTensor says them once, or flattens the dimensions itself",
    ),
    PrivateName(
        "torch.nn:Module._parameters", _TESTED,
        "tensor parallelism: λ and the norms of heads would compute with DTensors, which the kernels do not take",
        "a parallel style of torch.distributed.tensor has a module compute with its local parameters",
    ),
    PrivateName(
        "ATen/native/CPUBlas.h:brgemm", _TESTED,
        "the kernel does not compile (ops/cpu/csrc/problem.h), so attention takes the standard call",
        "PyTorch offers products of small matrices in bfloat16 in a public header",
    ),
)  # fmt: skip
