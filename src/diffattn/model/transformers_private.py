"""The names of ``transformers`` that our models use although the library does not promise to keep them.

Beside these, a model of the library's sets and reads the attributes in :data:`CONTRACT`. Their names begin with an
underscore, but every model that is written for the library has them; so they stand where they are used.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

from torch import distributed
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.distributed import DistributedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.masking_utils import causal_mask_function as causal_mask_function
from transformers.masking_utils import prepare_padding_mask as prepare_padding_mask
from transformers.masking_utils import sdpa_mask as sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward as eager_attention_forward
from transformers.utils.generic import is_flash_attention_requested as is_flash_attention_requested
from transformers.utils.import_utils import is_tracing as is_tracing

from diffattn.errors import ConfigError
from diffattn.private_names import PrivateName

CONTRACT = (
    "_attn_implementation", "_can_compile_fullgraph", "_can_record_outputs", "_init_weights", "_keep_in_fp32_modules",
    "_keep_in_fp32_modules_strict", "_no_split_modules", "_skip_keys_device_placement", "_supports_attention_backend",
    "_supports_flash_attn", "_supports_flex_attn", "_supports_sdpa", "_tied_weights_keys", "_tp_plan",
)  # fmt: skip


def takes_either_cache_name(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a function that takes ``past_key_values``, so that it takes the same cache as ``cache`` too.

    From release 5.24 on ``transformers`` has the second name. An engine's paged cache has had it before; it is of
    another type, and is passed on as it is.
    """

    @functools.wraps(forward)
    def either(*args: Any, **kwargs: Any) -> Any:
        if isinstance(kwargs.get("cache"), Cache):
            kwargs["past_key_values"] = kwargs.pop("cache")
        return forward(*args, **kwargs)

    return either


def check_asked_fsdp(model: PreTrainedModel) -> None:
    """Raises where FSDP was asked for and the model is trained without it, as ``Trainer(fsdp=True)`` does on a CPU.

    The Trainer and ``accelerate launch`` note what was asked for in the environment, and say nothing when they wrap
    the model in something else: each rank would hold all of it.

    Raises:
        ConfigError: several ranks train whole copies.
    """
    asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
    if not asked or getattr(model, "_is_fsdp_managed_module", False) or not distributed.is_initialized():
        return
    if (ranks := distributed.get_world_size()) > 1:
        raise ConfigError(
            f"FSDP was asked for, and each of {ranks} ranks trains the whole model",
            "a model that is sharded",
            "shard it with diffattn.shard(model, mesh) and leave fsdp out, or train on GPUs",
        )


def makes_masks(implementation: str) -> bool:
    """Returns whether the library makes a mask for an attention implementation; it makes none for an engine's."""
    # A traced graph can look into this mapping, and not into the object around it.
    return implementation in ALL_MASK_ATTENTION_FUNCTIONS._global_mapping


def restore_when_stopped(manager: Any, implementation: str) -> None:
    """Has an engine give the model back this attention implementation when the engine stops."""
    manager._original_attn_impl = implementation


@contextlib.contextmanager
def attention_implementation(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Runs a model under another attention implementation for as long as this lasts."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextlib.contextmanager
def attention_function(implementation: str, function: Callable[..., Any]) -> Iterator[None]:
    """Has another function serve the calls of an attention implementation for as long as this lasts."""
    ALL_ATTENTION_FUNCTIONS[implementation] = function
    try:
        yield
    finally:
        # The library's own function shows again: this mapping lies over one that all models share.
        del ALL_ATTENTION_FUNCTIONS[implementation]


def mark_as_placed(model: PreTrainedModel, *, shard: int, replicate: int, tensor: int) -> None:
    """Tells ``transformers`` that a model is spread over ranks already, as it marks those that it spread itself.

    Its Trainer then wraps the model in nothing, and takes the ranks of a layer as one; saving gathers the weights.

    Args:
        model: spread over ``shard`` · ``replicate`` · ``tensor`` ranks.
        shard: the number of ranks that share out one copy of the weights.
        replicate: the number of these copies.
        tensor: the number of ranks that compute one layer together.
    """
    sizes = {"fsdp_size": shard, "dp_replicate_size": replicate, "tp_size": tensor}
    # This leaves out a size that an older release has no name for.
    model.config.distributed_config = DistributedConfig.from_dict(sizes)
    model._is_distributed_loading_by_transformers = True
    model._is_fsdp_managed_module = True
    model._fsdp_size, model._tp_size = shard, tensor


_TESTED = ">=5.20,<5.25"
_PLACED = (
    "transformers.Trainer wraps a sharded model once more, and save_pretrained writes a part of it",
    "transformers can be told that a model is spread over ranks already",
)
_MASKS = (
    "masks of padded and packed rows",
    "the mask of an attention implementation is a promised part of the library's attention interface",
)
NAMES = (
    PrivateName(
        "transformers.integrations.sdpa_attention:sdpa_attention_forward", _TESTED,
        "diff_fused wherever the CPU kernel does not serve a call",
        "the library's sdpa function can be had from AttentionInterface without a model",
    ),
    PrivateName("transformers.masking_utils:causal_mask_function", _TESTED, *_MASKS),
    PrivateName("transformers.masking_utils:prepare_padding_mask", _TESTED, *_MASKS),
    PrivateName("transformers.masking_utils:sdpa_mask", _TESTED, *_MASKS),
    PrivateName("transformers.masking_utils:ALL_MASK_ATTENTION_FUNCTIONS._global_mapping", _TESTED, *_MASKS),
    PrivateName("transformers.utils.generic:is_flash_attention_requested", _TESTED, *_MASKS),
    PrivateName(
        "transformers.models.llama.modeling_llama:eager_attention_forward", _TESTED,
        "attn_implementation='eager', and every import of our models",
        "the library offers its eager function outside of a model",
    ),
    PrivateName(
        "transformers.utils.import_utils:is_tracing", _TESTED,
        "torch.compile, torch.export and the ONNX export of our models",
        "torch.compiler.is_compiling answers for torch.export and torch.jit.trace, too",
    ),
    PrivateName(
        "transformers.generation.continuous_batching.continuous_api:ContinuousBatchingManager._original_attn_impl",
        _TESTED,
        "a model stays under sdpa after it was served, which is slower",
        "the engine asks the model for the implementation to put back",
    ),
    PrivateName(
        "transformers.modeling_utils:PreTrainedModel._get_dtype_plan", _TESTED,
        "float16 models whose λ or gates are projections, which would have float32 weights and float16 input",
        "a model can tell quantisers what to leave alone without a word about its dtype",
    ),
    *(
        PrivateName(f"transformers.distributed.mixin:DistributedMixin.{name}", _TESTED, *_PLACED)
        for name in ("_fsdp_size", "_is_distributed_loading_by_transformers", "_tp_size")
    ),
    PrivateName(
        "transformers.distributed.fsdp:apply_fully_sharded_data_parallelism._is_fsdp_managed_module", _TESTED, *_PLACED
    ),
    PrivateName(
        "transformers.modeling_utils:ALL_ATTENTION_FUNCTIONS.__delitem__", _TESTED,
        "lens and the studies that read attention maps",
        "AttentionInterface can be told to forget a function that was put over the library's own",
    ),
)  # fmt: skip
