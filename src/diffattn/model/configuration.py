"""The configuration of one decoder: softmax attention, Differential V1 or V2, plain or grouped, DEX, or gated."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from diffattn.config_fields import FIELDS, POLY_NORM, check, check_ids, check_rope
from diffattn.errors import ConfigError
from diffattn.head_lists import check_dex_heads, check_groups, check_lambda_init, noise_heads_of
from diffattn.layer_kinds import SLIDING, check_unrotated, layer_types_of
from diffattn.plan.shape import ModelShape
from diffattn.variants import ATTENTIONS, DEFAULT, Heads, OwnTensor, Variant

# The attention function that subtracts the maps itself; ``diffattn.model.fused`` registers it.
DIFF_FUSED = "diff_fused"


def lambda_init_schedule(layer: int) -> float:
    """λ_init of a layer: 0.8 − 0.6·exp(−0.3·layer), layer 0 first (arXiv 2410.05258, section 2.1).

    >>> [round(lambda_init_schedule(layer), 4) for layer in (0, 1, 2)]
    [0.2, 0.3555, 0.4707]
    """
    return 0.8 - 0.6 * math.exp(-0.3 * layer)


class DiffTransformerConfig(PreTrainedConfig):
    """Configuration of :class:`DiffTransformerModel`.

    ``num_attention_heads``, ``num_key_value_heads`` and ``head_dim`` describe **the one attention call** of a layer,
    which is what every engine reads. With the replaced softmax Transformer's n heads of width d and G key/value heads:

    ========== =================== =================== ======== ====================================
    attention  num_attention_heads num_key_value_heads head_dim output heads (rows of λ)
    ========== =================== =================== ======== ====================================
    softmax    n                   G                   d        n
    diff_v1    n                   G / 2               2d       n / 2, each of width 2d
    diff_v2    2n                  G                   d        n
    dex, gated n                   G                   d        n
    ========== =================== =================== ======== ====================================

    ``diff_gda`` and ``diff_gda_v2`` are V1 and V2 whose query heads come in groups of r signal heads and, behind them,
    the noise head that they share: n / 2 + n / 2r query heads under V1's row, n + n / r under V2's.

    So ``2 · num_key_value_heads · head_dim`` values per layer and token is the cache, for every variant.

    Args:
        attention: ``"softmax"``, ``"diff_v1"`` (arXiv 2410.05258), ``"diff_v2"`` (the authors' post of January 2026)
            or ``"dex"`` (arXiv 2505.16333), a pretrained softmax that learns to subtract a projection of its output;
            or ``"gated"`` (arXiv 2505.06708), softmax attention times a sigmoid of the input; or ``"diff_gda"`` and
            ``"diff_gda_v2"`` (arXiv 2510.06949), V1 and V2 whose signal heads share noise heads.
        num_noise_heads: GDA only. How many of ``num_attention_heads`` are noise heads; ``None`` for one for each
            key/value head. r = (num_attention_heads − num_noise_heads) / num_noise_heads.
        hidden_act: an activation function of ``transformers``, with or without parameters, or ``"poly_norm"``.
        attention_bias: whether the projections of queries, keys and values have a bias (Qwen2; Llama's covers the
            output projection too).
        attention_output_bias: whether the output projection of attention has one.
        mlp_bias: whether the three projections of the feed-forward network have one.
        qk_norm: whether queries and keys pass an RMSNorm over the d channels of each head before they are rotated, one
            gain for all heads of a layer (Qwen3).
        dex_heads: DEX only. For every layer the heads, from 0, that subtract; ``None`` for all.
        lambda_init: V1 and ``diff_gda``. ``None`` for the paper's schedule by depth, one constant for all layers, or a
            list with a number for each; below 1, also negative.
        lambda_std: V1 and ``diff_gda``. Standard deviation of the four λ vectors at the start.
        head_norm: whether each output head passes an RMSNorm; ``None`` for the variant's own: V1 and ``diff_gda``. V1
            without it has no (1 − λ_init) either, which is that norm's scale. Not of DEX and gated attention.
        subln_affine: whether that norm has a learnable gain (the authors' code of V1 has one since October 2024; the
            paper's text and ``diffllama`` have none).
        subln_eps: ε of that norm.
        lambda_form: V2 and ``diff_gda_v2``. ``"sigmoid"`` of x W_λ, x W_λ itself (``"linear"``), or ``"one"``: λ = 1
            without W_λ.
        pairs_share_group: V2 only. Whether both maps of a head meet the same keys and values; ``False`` takes the noise
            map of the next key/value group's head, which is no difference of two maps any more.
        rope_parameters: as in ``transformers``, which fills in ``rope_type="default"`` and, from the keyword
            ``rope_theta`` where it is given, ``rope_theta=10000.0``.
        sliding_window: the keys that a token sees in a layer with a window: the last so many up to its own; in an
            encoder those at most so far away, on both sides.
        layer_types: for each layer ``"full_attention"`` or ``"sliding_attention"``; ``None`` for all layers with the
            window where there is one, else all without.
        unrotated_layers: the layers, from 0, that turn no queries and keys by their positions (NoPE).
        is_causal: whether a token sees only those before it and itself; ``False`` for an encoder, whose tokens see all
            of their sequence.

    The other fields are those of ``LlamaConfig``. Defaults are the paper's 1.4B V1 model.

    Raises:
        ConfigError: heads that do not divide, or a field that is not what ``diffattn.config_fields`` says, when the
            configuration is made or read, or when the field is assigned.

    >>> config = DiffTransformerConfig.from_shape(ModelShape.preset("3M"), "diff_v1")
    >>> config.shape().num_heads == ModelShape.preset("3M").num_heads
    True
    """

    model_type = "diff_transformer"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    attention: str = DEFAULT
    vocab_size: int = 100288
    hidden_size: int = 2048
    intermediate_size: int = 5461
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    num_noise_heads: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True
    rope_parameters: dict | None = None
    lambda_init: float | list[float] | None = None
    lambda_std: float = 0.1
    subln_affine: bool = True
    subln_eps: float = 1e-5
    head_norm: bool | None = None
    lambda_form: str = "sigmoid"
    pairs_share_group: bool = True
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    dex_heads: list[list[int]] | None = None
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    unrotated_layers: list[int] | None = None
    is_causal: bool = True

    def __setattr__(self, key: str, value: Any) -> None:
        # So `transformers serve` asks for what the folder says, which is there already.
        if (key, value) == ("dtype", "auto"):
            return
        check(FIELDS, key, value)
        super().__setattr__(key, value)

    def __post_init__(self, **kwargs: Any) -> None:
        # Before the library makes something of them.
        for name, value in kwargs.items():
            check(FIELDS, name, value)
        variant = self.record
        if self.subtracts_maps and not variant.shares_noise and self.num_attention_heads % 2:
            raise ConfigError(
                f"num_attention_heads={self.num_attention_heads} with attention={self.attention!r}",
                "an even number, because query heads come in pairs",
                "choose one more or one less",
            )
        if self.num_key_value_heads is None:
            parts = variant.query_factor * variant.join
            self.num_key_value_heads = self.num_noise_heads or max(1, self.num_attention_heads // parts)
        self.num_noise_heads = noise_heads_of(
            self.attention, self.num_noise_heads, self.num_attention_heads, self.num_key_value_heads
        )
        if self.head_dim is None:
            # n heads of width D / n are replaced, which the one call joins under V1.
            heads = self.output_heads * variant.join
            if self.hidden_size % heads:
                raise ConfigError(
                    f"hidden_size={self.hidden_size} for {heads} heads of softmax attention and no head_dim",
                    f"a hidden_size that {heads} divides",
                    "change one of them or set head_dim",
                )
            self.head_dim = self.hidden_size // heads * variant.join
        check_groups(self.attention, self.num_attention_heads, self.num_key_value_heads)
        if self.rope_width % 2:
            raise ConfigError(
                f"head_dim={self.head_dim} with rotary positions, which turn pairs of channels"
                f"{' of each half head' if variant.join > 1 else ''}",
                f"a multiple of {2 * variant.join}",
                "change head_dim",
            )
        self._check_switches()
        check_dex_heads(self.attention, self.dex_heads, self.num_hidden_layers, self.num_attention_heads)
        # Always a list: engines read it from every model that has the field.
        self.layer_types = layer_types_of(self.sliding_window, self.layer_types, self.num_hidden_layers)
        check_unrotated(self.unrotated_layers, self.num_hidden_layers)
        # transformers and engines read this and shard by it; it is never saved.
        self.base_model_tp_plan = self.tensor_parallel_plan()
        super().__post_init__(**kwargs)
        assert self.rope_parameters is not None
        check_rope(self.rope_parameters, self.rope_width)
        # The library itself imports these late, because it takes long.
        from diffattn.model.activations import check_activation

        check_activation(self.hidden_act)
        check_ids(vars(self), self.vocab_size)

    def _check_switches(self) -> None:
        check_lambda_init(self.lambda_init, self.num_hidden_layers)
        if self.head_norm and not self.record.takes_norm:
            *most, last = (name for name, record in ATTENTIONS.items() if record.takes_norm)
            raise ConfigError(
                f"head_norm=True with attention={self.attention!r}", f"{', '.join(most)} or {last}", "leave it out"
            )
        published = {name: plain for record in ATTENTIONS.values() for name, plain in record.switches.items()}
        for name, plain in published.items():
            if name not in self.record.switches and getattr(self, name) != plain:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} with attention={self.attention!r}",
                    " or ".join(owner for owner, record in ATTENTIONS.items() if name in record.switches),
                    "leave it out",
                )
        if not self.pairs_share_group and self.num_key_value_heads == 1:
            raise ConfigError(
                "pairs_share_group=False with num_key_value_heads=1, so that both maps of a head share that one",
                "2 or more key/value heads",
                "set num_key_value_heads",
            )

    @property
    def record(self) -> Variant:
        """The record of the variant, which says everything that does not depend on sizes."""
        return ATTENTIONS[self.attention]

    def own_tensors(self) -> list[OwnTensor]:
        """Lists the tensors that a layer of this model has and softmax attention has not, without the norm's gain."""
        return [tensor for tensor in self.record.tensors if tensor.exists(vars(self))]

    def switches(self) -> dict[str, object]:
        """The fields by which this model computes something else than its variant as published."""
        published = self.record.switches
        found = {name: getattr(self, name) for name, plain in published.items() if getattr(self, name) != plain}
        if self.normalizes_heads != self.record.norm:
            found["head_norm"] = self.head_norm
        return found

    @property
    def normalizes_heads(self) -> bool:
        """True where each output head passes an RMSNorm."""
        return self.record.norm if self.head_norm is None else self.head_norm

    def layer_dex_heads(self, layer: int) -> list[int]:
        """The heads of a layer (from 0) that subtract under DEX."""
        return list(range(self.num_attention_heads)) if self.dex_heads is None else self.dex_heads[layer]

    @property
    def subtracts_maps(self) -> bool:
        """True where query heads come in groups, of heads for the signal and one for the noise: V1, V2 and GDA."""
        return self.record.maps > 1

    @property
    def noise_heads(self) -> int:
        """The query heads of the call whose maps are subtracted."""
        if self.record.shares_noise:
            assert self.num_noise_heads is not None
            return self.num_noise_heads
        return self.num_attention_heads // 2 if self.subtracts_maps else 0

    @property
    def output_heads(self) -> int:
        """The output heads of a layer, which are the query heads that make a signal."""
        return self.num_attention_heads - self.noise_heads

    @property
    def signals_per_noise(self) -> int:
        """The signal heads that stand before the noise head which they share."""
        return self.output_heads // self.noise_heads if self.subtracts_maps else 1

    @property
    def has_map_diff(self) -> bool:
        """True where each output head is one difference of two maps times its values, as ``diff_fused`` needs."""
        return self.subtracts_maps and self.pairs_share_group

    def tensor_parallel_plan(self) -> dict[str, str]:
        """Returns how ``tp_plan="auto"`` spreads the layers: whole heads, and columns of the feed-forward network.

        λ vectors, gains and DEX are on every rank and apply to that rank's heads alone: their gradients are summed.
        """
        attention = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise"}
        own = {tensor.name.split(".")[0]: tensor.split for tensor in self.own_tensors()}
        attention |= {module: "colwise" for module, split in own.items() if split}
        shared = [module for module, split in own.items() if not split]
        if self.normalizes_heads and self.subln_affine:
            shared.append("subln")
        if self.qk_norm:
            shared += ["q_norm", "k_norm"]
        attention |= dict.fromkeys(shared, "replicated_with_grad_allreduce")
        mlp = {
            "gate_proj": "colwise",
            "up_proj": "colwise",
            "down_proj": "rowwise",
            # Of most functions there is nothing to replicate; the style also sums the gradients of those that have.
            "act_fn": "replicated_with_grad_allreduce",
        }
        return {f"layers.*.self_attn.{name}": style for name, style in attention.items()} | {
            f"layers.*.mlp.{name}": style for name, style in mlp.items()
        }

    def check_tensor_parallel(self, ranks: int) -> None:
        """Raise a ``ConfigError`` unless every group of query heads is on one rank, with its key/value head.

        >>> DiffTransformerConfig().check_tensor_parallel(4)
        """
        groups = self.num_key_value_heads
        assert groups is not None
        if ranks > 1 and not self.pairs_share_group:
            raise ConfigError(
                f"tensor parallelism over {ranks} ranks with pairs_share_group=False",
                "one rank, because the two maps of a head might lie on two",
                "run the model on one rank",
            )
        if ranks > 1 and self.hidden_act == POLY_NORM:
            raise ConfigError(
                f"tensor parallelism over {ranks} ranks with hidden_act={POLY_NORM!r}",
                "one rank, because that function needs all channels of the feed-forward network at once",
                "run the model on one rank",
            )
        if groups % ranks:
            possible = ", ".join(str(size) for size in range(1, groups + 1) if groups % size == 0)
            raise ConfigError(
                f"tensor parallelism over {ranks} ranks",
                f"a number of ranks that divides the {groups} key/value heads of the attention call",
                f"take {possible}",
            )

    @property
    def rope_width(self) -> int:
        """Channels that rotary positions turn together: d, the width of one of the replaced softmax heads."""
        assert self.head_dim is not None
        return self.head_dim // self.record.join

    def to_dict(self) -> dict[str, Any]:
        """The fields as a file holds them: the types of the layers only where they are of two kinds."""
        values = super().to_dict()
        if self.layer_types == layer_types_of(self.sliding_window, None, self.num_hidden_layers):
            values.pop("layer_types")
        return values

    def layer_window(self, layer: int) -> int | None:
        """The window of a layer (from 0); None where it sees the whole text."""
        assert self.layer_types is not None
        return self.sliding_window if self.layer_types[layer] == SLIDING else None

    def layer_lambda_init(self, layer: int) -> float:
        """λ_init of a layer (from 0): the schedule, or what ``lambda_init`` says."""
        if isinstance(self.lambda_init, list):
            return float(self.lambda_init[layer])
        return lambda_init_schedule(layer) if self.lambda_init is None else float(self.lambda_init)

    @classmethod
    def from_shape(cls, shape: ModelShape, attention: str, **overrides: Any) -> DiffTransformerConfig:
        """The configuration of a variant of the softmax Transformer ``shape``; ``overrides`` are further fields.

        ``initializer_range`` is hidden_size^(−1/2), which is the usual 0.02 at the paper's widths. V1 needs it at small
        ones: its norm lifts whatever attention gives to unit size, and drowns embeddings that start at 0.02.
        """
        known = ATTENTIONS.get(attention)
        shape.check_variant(attention if known is None or known.fitted_to is None else known.fitted_to)
        variant = ATTENTIONS[attention]
        heads = variant.heads(shape)
        fields: dict[str, object] = {
            "attention": attention,
            "vocab_size": shape.vocab_size,
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "num_hidden_layers": shape.num_layers,
            "num_attention_heads": heads.queries,
            "num_key_value_heads": heads.groups,
            "head_dim": heads.width,
            "num_noise_heads": variant.noise_heads(shape) if variant.shares_noise else None,
            "max_position_embeddings": shape.max_position_embeddings,
            "initializer_range": round(shape.hidden_size**-0.5, 4),
            "tie_word_embeddings": shape.tie_word_embeddings,
            "rope_theta": shape.rope_theta,
        }
        return cls(**(fields | overrides))

    def shape(self) -> ModelShape:
        """The softmax Transformer that this model replaces; the inverse of :meth:`from_shape`.

        A shape has no biases, no norm of queries and keys and no DEX: what these add is not in it.
        """
        assert self.num_key_value_heads is not None
        assert self.head_dim is not None
        assert self.rope_parameters is not None
        call = Heads(self.num_attention_heads, self.num_key_value_heads, self.head_dim)
        replaced = self.record.replaced(call, self.num_noise_heads)
        shared = self.signals_per_noise if self.record.shares_noise else None
        # As many as possible need not be said.
        said = None if shared and 1 < shared == replaced.queries // replaced.groups else shared
        return ModelShape(
            hidden_size=self.hidden_size,
            num_layers=self.num_hidden_layers,
            num_heads=replaced.queries,
            num_kv_heads=replaced.groups,
            head_dim=replaced.width,
            intermediate_size=self.intermediate_size,
            vocab_size=self.vocab_size,
            tie_word_embeddings=self.tie_word_embeddings,
            max_position_embeddings=self.max_position_embeddings,
            rope_theta=self.rope_parameters["rope_theta"],
            signals_per_noise=said,
        )
