"""One model for softmax, V1, V2, DEX and gated attention: pre-RMSNorm, SwiGLU, rotary positions, grouped heads.

Built on ``transformers``' ``PreTrainedModel`` and ``GenerationMixin``, so saving, loading, caches, generation and the
Trainer are the library's own. The maths of the variants is in ``attention.py``.
"""

from __future__ import annotations

import copy
import os
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from diffattn.errors import ConfigError
from diffattn.model import fused  # noqa: F401 - registers the attention function
from diffattn.model.activations import activation, start_again
from diffattn.model.attention import ATTENTION, DexProjection, DifferentialLambda, Float32Module, SoftmaxAttention
from diffattn.model.configuration import DIFF_FUSED, DiffTransformerConfig
from diffattn.model.masks.layers import layer_masks
from diffattn.model.masks.sequences import positions_of_sequences
from diffattn.model.transformers_private import (
    check_asked_fsdp,
    is_tracing,
    restore_when_stopped,
    takes_either_cache_name,
)
from diffattn.ops.half import quick_products
from diffattn.ops.sdpa import without_nan
from diffattn.variants import own_modules

# With one of these arguments the library loads other tensors than those that a folder's config.json describes.
_OTHER_WEIGHTS = ("state_dict", "subfolder", "variant", "gguf_file", "key_mapping", "ignore_mismatched_sizes")


class DiffRotaryEmbedding(Float32Module):
    """cos and sin of the rotary angles, ``(B, T, 1, d)``, from float32 frequencies.

    Both repeat the angles of their first half in their second; the first half of sin has its sign turned, which is the
    half that meets the channels it is subtracted for (see ``rotate``). Once a pass: each layer turns q and k by them.

    The frequencies are buffers outside the checkpoint; ``PreTrainedModel._init_weights`` knows the class by its name
    and remakes them after ``from_pretrained`` has built the model without storage.
    """

    contents = "the rotary frequencies"
    inv_freq: Tensor
    original_inv_freq: Tensor
    attention_scaling: float

    def __init__(self, config: DiffTransformerConfig) -> None:
        super().__init__()
        # The library's rotary functions take the width from head_dim, which is twice the rotated width under V1.
        self.config = copy.deepcopy(config)
        self.config.head_dim = config.rope_width
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        assert config.rope_parameters is not None
        self.rope_type = config.rope_parameters["rope_type"]
        compute = (
            self.compute_default_rope_parameters if self.rope_type == "default" else ROPE_INIT_FUNCTIONS[self.rope_type]
        )
        inv_freq, self.attention_scaling = compute(self.config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: DiffTransformerConfig, **_: Any) -> tuple[Tensor, float]:
        """Frequencies θ^(−2i/d) for i below d/2, and the scale of cos and sin (1)."""
        assert config.rope_parameters is not None
        assert config.head_dim is not None
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponent), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        self.check_exact(self.inv_freq)
        angles = position_ids[..., None, None].float() * self.inv_freq.to(device=x.device)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return torch.cat((cos, cos), dim=-1).to(x.dtype), torch.cat((-sin, sin), dim=-1).to(x.dtype)


class DiffMLP(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) · up(x))``, or the same with another activation function."""

    def __init__(self, config: DiffTransformerConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = activation(config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class DiffDecoderLayer(GradientCheckpointingLayer):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, config: DiffTransformerConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = ATTENTION[config.attention](config, layer_idx)
        self.mlp = DiffMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        # Around the layer's call, because a checkpointed layer is computed again outside of the model's forward.
        with without_nan(hidden_states.device, hidden_states.shape[1], kwargs.get("attention_mask")):
            attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class DiffTransformerPreTrainedModel(PreTrainedModel):
    """The part that the models share: how engines may run them, and how their weights start."""

    config_class = DiffTransformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("DiffDecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs: ClassVar[dict[str, type[nn.Module]]] = {
        "hidden_states": DiffDecoderLayer,
        "attentions": SoftmaxAttention,
    }
    _keep_in_fp32_modules_strict = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2", "dex")
    # Quantisers leave these modules as they are, because an error in λ or a gate is one in all that a head gives. They
    # match a pattern from the start of a module's or a parameter's name.
    _keep_in_fp32_modules = tuple(rf".*\.self_attn\.{name}" for name in own_modules())

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """The library's choice; for a differential model ``diff_fused`` where nothing was asked for."""
        differential = self.config.has_map_diff
        # The code that is saved beside a model for those who have no diffattn comes without the fused kernel.
        if requested_attention is None and differential and DIFF_FUSED in ALL_ATTENTION_FUNCTIONS:
            requested_attention = DIFF_FUSED
        if requested_attention == DIFF_FUSED and not differential:
            raise ConfigError(
                f"attn_implementation={DIFF_FUSED!r} with attention={self.config.attention!r}, whose heads are no "
                "difference of two maps",
                "'sdpa'",
                "leave it out",
            )
        return super().get_correct_attn_implementation(requested_attention, is_init_check)

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        # What quantisers leave alone has the dtype of the model all the same, since its input has.
        plan = super()._get_dtype_plan(dtype)
        return {name: kept for name, kept in plan.items() if name in self._keep_in_fp32_modules_strict}

    def save_pretrained(self, save_directory: str | os.PathLike, *, remote_code: bool = False, **kwargs: Any) -> None:
        """Saves the model as ``transformers`` does, with ``remote_code`` for those who do not have diffattn too.

        With it the folder holds the model's Python files too, and names them in its config.json, so that
        ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` needs ``transformers`` alone.
        """
        from diffattn.model.remote_code import AUTO_MAP, write_remote_code

        if remote_code:
            # This comes first, because the base may upload what the folder holds.
            write_remote_code(save_directory)
            self.config.auto_map = dict(AUTO_MAP)
        elif hasattr(self.config, "auto_map"):
            # The model was loaded from a folder with such files.
            del self.config.auto_map
        # The base gathers the weights of several ranks, and would write those of one as the parts that they are.
        state = kwargs.get("state_dict") or self.state_dict()
        if any(hasattr(tensor, "device_mesh") and tensor.device_mesh.size() == 1 for tensor in state.values()):
            kwargs["state_dict"] = {
                name: getattr(tensor, "full_tensor", tensor.detach)() for name, tensor in state.items()
            }
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any
    ) -> DiffTransformerPreTrainedModel:
        """Loads a model as ``transformers`` does, once a folder's safetensors are known to fit its config.json.

        Raises:
            ConfigError: a field of config.json that cannot be.
            CheckpointError: weights that are damaged, of other shapes, or of fewer layers.
        """
        from diffattn.model.tensors import check_folder

        config = kwargs.get("config")
        plain = not any(kwargs.get(name) for name in _OTHER_WEIGHTS) and isinstance(
            config, DiffTransformerConfig | None
        )
        if plain and pretrained_model_name_or_path is not None:
            check_folder(os.fspath(pretrained_model_name_or_path), config)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, mesh_manager: Any) -> Any:
        """Distributes a model as ``transformers`` does, over numbers of ranks that keep each pair of heads together."""
        if distributed_config is not None and distributed_config.tp_size > 1:
            model.config.check_tensor_parallel(distributed_config.tp_size)
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)

    @staticmethod
    @takes_either_cache_name
    def create_masks_for_generate(
        config: DiffTransformerConfig,
        inputs_embeds: Tensor,
        attention_mask: Any,
        past_key_values: Cache | None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Makes the masks of a pass over a static cache; ``generate`` calls it before the pass."""
        return layer_masks(config, inputs_embeds, attention_mask, position_ids, past_key_values, kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Linear and embedding: N(0, initializer_range); norm gains: 1; rotary frequencies: remade. All by the base.
        super()._init_weights(module)
        if isinstance(module, DifferentialLambda):
            for vector in module.parameters(recurse=False):
                init.normal_(vector, mean=0.0, std=self.config.lambda_std)
        start_again(module, self.config.hidden_act)
        if isinstance(module, DexProjection):
            init.zeros_(module.weight)
            init.constant_(module.lam, module.lambda_init)
            init.zeros_(module.annealed)


class DiffTransformerModel(DiffTransformerPreTrainedModel):
    """The layers without an output head. ``(B, T)`` token ids to ``(B, T, hidden_size)`` hidden states."""

    def __init__(self, config: DiffTransformerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DiffDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = DiffRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @takes_either_cache_name
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Arguments and result as of any decoder of ``transformers`` (exactly one of ids and embeddings is given).

        Rows may hold several sequences: ``position_ids`` that restart, or ``cu_seq_lens_q`` (see ``masks``).
        """
        if (input_ids is None) == (inputs_embeds is None):
            given = "no input_ids and no inputs_embeds" if input_ids is None else "both input_ids and inputs_embeds"
            raise ConfigError(given, "exactly one of input_ids and inputs_embeds", "pass one of them")
        if self.training and not is_tracing(input_ids):
            check_asked_fsdp(self)
        if not self.config.is_causal:
            # What was computed without the tokens behind it is of no use.
            if past_key_values is not None:
                raise ConfigError(
                    "past_key_values with is_causal=False", "an encoder without a cache", "leave them out"
                )
            use_cache = False
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None and isinstance(lengths := kwargs.get("cu_seq_lens_q"), Tensor):
            position_ids = positions_of_sequences(lengths.to(x.device), *x.shape[:2])
        # Pass only positions that the caller gave, because packed sequences are found from them. Our own range is never
        # packed, which a traced graph cannot know: it would build a mask of T × T.
        masks = layer_masks(self.config, x, attention_mask, position_ids, past_key_values, kwargs)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(x.shape[1], device=x.device) + seen).unsqueeze(0)
        rope = self.rotary_emb(x, position_ids=position_ids)
        with quick_products(x):
            for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
                x = layer(
                    x,
                    attention_mask=masks[kind],
                    position_embeddings=rope,
                    position_ids=position_ids,
                    past_key_values=past_key_values,
                    use_cache=use_cache,
                    **kwargs,
                )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=past_key_values)


class DiffTransformerLanguageModel(DiffTransformerPreTrainedModel):
    """The layers with an output head, which gives each token of the vocabulary a logit."""

    causal: ClassVar[bool]
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan: ClassVar[dict[str, str]] = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: DiffTransformerConfig) -> None:
        if config.is_causal != self.causal:
            raise ConfigError(
                f"is_causal={config.is_causal} with {type(self).__name__}",
                f"is_causal={self.causal}",
                "pass is_causal=False to make an encoder of it, or take AutoModelForCausalLM"
                if config.is_causal
                else "take AutoModelForMaskedLM, since an encoder writes no text",
            )
        super().__init__(config)
        self.model = DiffTransformerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class DiffTransformerForCausalLM(DiffTransformerLanguageModel, GenerationMixin):
    """The decoder with its output head: next-token logits, loss, and ``generate``.

    >>> from diffattn.plan.shape import ModelShape
    >>> config = DiffTransformerConfig.from_shape(ModelShape.preset("300K"), "diff_v2")
    >>> DiffTransformerForCausalLM(config)(torch.tensor([[1, 2, 3]])).logits.shape[:2]
    torch.Size([1, 3])
    """

    causal = True

    @takes_either_cache_name
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits ``(B, T, vocab_size)``; with ``labels`` (shifted inside, −100 ignored) the mean loss in nats."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        last = outputs.last_hidden_state[:, kept, :]
        with quick_products(last):
            logits = self.lm_head(last)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> ContinuousBatchingManager:
        """Starts the engine of ``transformers``, whose paged cache works with the standard call alone.

        Until the engine is stopped the model runs under ``sdpa``, or the flash implementation that the engine prefers.
        """
        before = self.config._attn_implementation
        if before != DIFF_FUSED:
            return super().init_continuous_batching(*args, **kwargs)
        self.set_attn_implementation("sdpa")
        try:
            manager = super().init_continuous_batching(*args, **kwargs)
        except BaseException:
            self.set_attn_implementation(before)
            raise
        restore_when_stopped(manager, before)
        return manager
