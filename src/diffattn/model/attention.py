"""The attention layer of each variant, in four visible steps: project, position, attend, combine.

Every layer makes exactly one call to the attention interface of ``transformers``, whatever the variant, so that each
engine that serves a grouped-query model serves this one. Under ``attn_implementation="diff_fused"`` that call is given
λ and the norm behind it, and returns output heads that are finished (see ``fused.py``); under any other name it is the
standard call of padded queries (V1), and the subtraction and the norm follow it. The cache is the same under both.

Shape suffixes: B batch, T queries, N query heads of the call, G key/value heads of the call, W head_dim of the call,
n, g, d the same of the softmax Transformer that is replaced, D hidden size, H output heads, V width of an output head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from diffattn.errors import ConfigError, UnsupportedError
from diffattn.model.configuration import DIFF_FUSED, DiffTransformerConfig
from diffattn.model.transformers_private import eager_attention_forward
from diffattn.ops.half import attention_inputs
from diffattn.ops.standard import pad_queries, subtract


class Float32Module(nn.Module):
    """A module whose own parameters and buffers stay float32 when the model around it is cast.

    ``model.bfloat16()`` would round λ (its exponentials then move in steps of 1/128) and the rotary frequencies
    (positions beyond 256 then collide); moving between devices works as usual. A wrapper that computes with rounded
    copies instead, as FSDP with mixed precision does, cannot be kept from it, and is refused.
    """

    contents: ClassVar[str]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep, recurse)

    def check_exact(self, tensor: Tensor) -> None:
        """Raises if a wrapper has the module compute with a rounded copy of one of its tensors.

        Raises:
            ConfigError: the tensor has 16 bits.
        """
        if tensor.dtype in (torch.bfloat16, torch.float16):
            raise ConfigError(
                f"{self.contents} in {str(tensor.dtype).removeprefix('torch.')}, to which a wrapper rounded it",
                "float32 whatever the model computes in",
                "shard the model with diffattn.shard, which keeps it, and with no other wrapper",
            )


class DifferentialLambda(Float32Module):
    """V1's λ = exp(λ_q1·λ_k1) − exp(λ_q2·λ_k2) + λ_init: one number per layer, float32 (arXiv 2410.05258, eq. 2)."""

    contents = "λ"
    lambda_q1: Tensor
    lambda_k1: Tensor
    lambda_q2: Tensor
    lambda_k2: Tensor

    def __init__(self, width: int, lambda_init: float) -> None:
        super().__init__()
        self.lambda_init = lambda_init
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            self.register_parameter(name, nn.Parameter(torch.empty(width, dtype=torch.float32)))

    def forward(self) -> Tensor:
        self.check_exact(self.lambda_q1)
        # The authors' order of summing, so that a converted model's λ has the same bits.
        signal = torch.exp((self.lambda_q1 * self.lambda_k1).sum())
        noise = torch.exp((self.lambda_q2 * self.lambda_k2).sum())
        # signal − noise + λ_init, to the bit. To one number and a Python number PyTorch's `jvp` adds in float64, from
        # where the products behind it do not return; it subtracts in float32.
        return self.lambda_init - (noise - signal)


# Keep "RMSNorm" in this name: the library initialises gains, and vLLM replaces norms, by names that contain it.
class RMSNormPerHead(nn.RMSNorm):
    """``scale · RMSNorm(y)`` over the channels of each output head, in float32 or wider."""

    eps: float

    def __init__(self, width: int, scale: float, eps: float, elementwise_affine: bool) -> None:
        super().__init__(width, eps=eps, elementwise_affine=elementwise_affine)
        self.scale = scale

    # `scale` is an argument on purpose: vLLM replaces every RMSNorm whose forward has one input by its own norm, which
    # would drop the scale.
    def forward(self, y_BTHV: Tensor, scale: float) -> Tensor:  # type: ignore[override]
        y = y_BTHV.to(torch.promote_types(y_BTHV.dtype, torch.float32))
        # The scale rides on the gain: one pass less over y, and one less over its gradient.
        gain = y.new_full(self.normalized_shape, scale) if self.weight is None else self.weight.to(y.dtype) * scale
        return F.rms_norm(y, self.normalized_shape, gain, self.eps)


def rotate(x_BTnd: Tensor, cos_BT1d: Tensor, sin_BT1d: Tensor) -> Tensor:
    """Rotary positions in the half-rotation layout; cos and signed sin are those of ``DiffRotaryEmbedding``."""
    cos, sin = cos_BT1d.to(x_BTnd.dtype), sin_BT1d.to(x_BTnd.dtype)
    # Slicing x into halves instead takes up to twice as long: the backward pass fills a buffer of zeros per slice.
    return torch.addcmul(x_BTnd * cos, x_BTnd.roll(x_BTnd.shape[-1] // 2, dims=-1), sin)


class SoftmaxAttention(nn.Module):
    """Grouped-query softmax attention: n heads of width d over G key/value heads."""

    def __init__(self, config: DiffTransformerConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.width = config.rope_width
        # A configuration always fills both in.
        assert config.head_dim is not None
        assert config.num_key_value_heads is not None
        self.head_dim, groups = config.head_dim, config.num_key_value_heads
        # The attention functions of transformers and its engines read this.
        self.num_key_value_groups = config.num_attention_heads // groups
        self.scaling = self.width**-0.5
        window = config.layer_window(layer_idx)
        # Read by flash attention alone, which has no masks; to both sides it sees one token less than it is told.
        self.sliding_window = window if window is None or config.is_causal else window + 1
        self.rotates = layer_idx not in (config.unrotated_layers or ())
        # The signal heads that stand before the noise head which they share.
        self.signals_per_noise = config.signals_per_noise
        outputs = config.output_heads * self.head_dim
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, groups * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, groups * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(outputs, config.hidden_size, bias=config.attention_output_bias)
        # The norm of each output head, if the model has one.
        self.subln: RMSNormPerHead | None = None
        if config.normalizes_heads:
            scale = 1.0 - config.layer_lambda_init(layer_idx) if config.record.weights == "layer" else 1.0
            self.subln = RMSNormPerHead(
                self.head_dim, scale, eps=config.subln_eps, elementwise_affine=config.subln_affine
            )
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(self.width, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(self.width, eps=config.rms_norm_eps)

    @property
    def is_causal(self) -> bool:
        """False in an encoder; the attention functions read it where there is no mask."""
        return self.config.is_causal

    def combining_weights(self, x_BTD: Tensor) -> Tensor | None:
        """Returns what the heads are combined with: λ in float32, broadcastable to (B, T, H), or a gate (B, T, H, d).

        None stands for nothing, as in softmax attention.
        """
        return None

    def project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        heads = (*x_BTD.shape[:-1], -1, self.width)
        q, k, v = self.q_proj(x_BTD).view(heads), self.k_proj(x_BTD).view(heads), self.v_proj(x_BTD)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v, self.combining_weights(x_BTD)

    def position(
        self, q_BTnd: Tensor, k_BTgd: Tensor, rope: tuple[Tensor, Tensor], fused: bool
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys turned, where the layer turns them; ``fused`` says whether the one call also subtracts."""
        return (rotate(q_BTnd, *rope), rotate(k_BTgd, *rope)) if self.rotates else (q_BTnd, k_BTgd)

    def lay_out(
        self, q_BTNW: Tensor, k_BTg: Tensor, v_BTg: Tensor, past_key_values: Cache | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as the one call takes them, heads before tokens, with what the cache holds."""
        heads = (*q_BTNW.shape[:2], -1, self.head_dim)
        q, k, v = q_BTNW.transpose(1, 2), k_BTg.view(heads).transpose(1, 2), v_BTg.view(heads).transpose(1, 2)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        return q, k, v

    def combine(self, o_BTNW: Tensor, lam: Tensor | None) -> Tensor:
        """Output heads (B, T, H, V) of the standard call's; in float32 where they are still to be rounded."""
        return self.normalized(o_BTNW)

    def normalized(self, y_BTHV: Tensor) -> Tensor:
        """Returns the output heads behind the norm of each head, or as they are where there is no norm."""
        return y_BTHV if self.subln is None else self.subln(y_BTHV, self.subln.scale)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """``(B, T, D)`` to ``(B, T, D)``, with the call's attention weights where the implementation returns them."""
        q, k, v, lam = self.project(hidden_states)
        # Read it once, because each access to a configuration looks the name up twice.
        implementation = self.config._attn_implementation
        fused = implementation == DIFF_FUSED
        q, k = self.position(q, k, position_embeddings, fused)
        q, k, v = self.lay_out(q, k, v, past_key_values)
        # An engine's paged cache, which says in the options what an attention function needs to read it.
        if (paged := kwargs.pop("cache", None)) is not None:
            k, v = paged.update(k, v, self.layer_idx, kwargs)
        # Do not restructure this: vLLM parses the source of this function to find the one attention call and `scaling`.
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        if fused:
            kwargs |= {"lam": lam, "norm": self.subln, "signals_per_noise": self.signals_per_noise}
        dtype = v.dtype
        if implementation == "sdpa":
            q, k, v, attention_mask = attention_inputs(q, k, v, attention_mask)
        attended, weights = interface(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        # vLLM returns all heads of a token as one row.
        o_BTNW = attended.reshape(*hidden_states.shape[:-1], -1, self.head_dim)
        y_BTHV = (o_BTNW if fused else self.combine(o_BTNW, lam)).to(dtype)
        return self.o_proj(y_BTHV.reshape(*hidden_states.shape[:-1], -1)), weights


class DifferentialAttention(SoftmaxAttention):
    """The subtraction, which V1 and V2 share, with pairs of query heads or with groups of several signal heads."""

    def combine(self, o_BTNW: Tensor, lam: Tensor | None) -> Tensor:
        assert lam is not None
        return self.normalized(subtract(o_BTNW, lam, self.signals_per_noise))


class DiffV1Attention(DifferentialAttention):
    """Differential attention V1 (arXiv 2410.05258, section 2) as one grouped call of width 2d.

    ``(1 − λ_init) · RMSNorm((softmax(Q1 K1ᵀ/√d) − λ·softmax(Q2 K2ᵀ/√d)) V)`` for n/2 heads with V of width 2d. A key
    head of the call is [k1, k2], its two query heads are [q1, 0] and [0, q2]; the zeros make each score exact.

    In its grouped form (``diff_gda``, arXiv 2510.06949) r signal heads [q1, 0] stand before the one noise head [0, q2]
    whose map they all subtract.
    """

    def __init__(self, config: DiffTransformerConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.lam = DifferentialLambda(self.width, config.layer_lambda_init(layer_idx))

    def combining_weights(self, x_BTD: Tensor) -> Tensor:
        return self.lam()

    def position(
        self, q_BTnd: Tensor, k_BTgd: Tensor, rope: tuple[Tensor, Tensor], fused: bool
    ) -> tuple[Tensor, Tensor]:
        q, k = super().position(q_BTnd, k_BTgd, rope, fused)
        return q if fused else pad_queries(q, self.signals_per_noise), k


class DiffV2Attention(DifferentialAttention):
    """Differential attention V2 (the authors' post, January 2026): 2n query heads, keys and values of the baseline.

    ``softmax(Q_2i Kᵀ/√d) V − sigmoid(λ_i(x)) · softmax(Q_2i+1 Kᵀ/√d) V`` with λ(x) = x W_λ per token and head,
    its sigmoid in float32; no norm behind it. What the post compares it with are fields of the configuration.

    In its grouped form (``diff_gda_v2``) r signal heads stand before the one noise head whose map they all subtract,
    each with a λ of its own.
    """

    def __init__(self, config: DiffTransformerConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if config.lambda_form != "one":
            self.lambda_proj = nn.Linear(config.hidden_size, config.output_heads, bias=False)

    def lam(self, x_BTD: Tensor) -> Tensor:
        if self.config.lambda_form == "one":
            return x_BTD.new_ones((), dtype=torch.float32)
        raw = self.lambda_proj(x_BTD).float()
        return torch.sigmoid(raw) if self.config.lambda_form == "sigmoid" else raw

    def combining_weights(self, x_BTD: Tensor) -> Tensor:
        return self.lam(x_BTD)

    def combine(self, o_BTNW: Tensor, lam: Tensor | None) -> Tensor:
        if not self.config.pairs_share_group:
            signal, noise = o_BTNW.unflatten(2, (-1, 2)).unbind(3)
            # Take the noise of the next group, which is as many heads further as a group has heads.
            noise = noise.roll(-(self.num_key_value_groups // 2), dims=2)
            o_BTNW = torch.stack((signal, noise), dim=3).flatten(2, 3)
        return super().combine(o_BTNW, lam)


class GatedAttention(SoftmaxAttention):
    """``sigmoid(x W_g) ⊙ softmax-attention(x)``, a gate per channel of each head (arXiv 2505.06708, position G1)."""

    def __init__(self, config: DiffTransformerConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.g_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.width, bias=False)

    def combining_weights(self, x_BTD: Tensor) -> Tensor:
        return torch.sigmoid(self.g_proj(x_BTD)).unflatten(-1, (-1, self.width))

    def combine(self, o_BTNW: Tensor, lam: Tensor | None) -> Tensor:
        assert lam is not None
        return o_BTNW * lam


class DexProjection(Float32Module):
    """The part ``λ · O W_D`` of the chosen heads' outputs O, which DEX subtracts from them (arXiv 2505.16333).

    W_D starts at zero, so that a pretrained model keeps its function. λ = (1 − a)·λ_init + a·λ_learned moves from the
    paper's schedule by depth to what is learned, as training raises a from 0 to 1: were λ zero as well, no gradient
    would reach either. All of it is float32, whatever the model's dtype.
    """

    contents = "DEX"
    annealed: Tensor

    def __init__(self, heads: int, width: int, lambda_init: float) -> None:
        super().__init__()
        self.lambda_init = lambda_init
        self.weight = nn.Parameter(torch.zeros(heads, width, width, dtype=torch.float32))
        self.lam = nn.Parameter(torch.full((heads,), lambda_init, dtype=torch.float32))
        self.register_buffer("annealed", torch.zeros((), dtype=torch.float32))

    def forward(self, o_BTHd: Tensor, rows: list[int] | None = None) -> Tensor:
        """``rows`` says which of the chosen heads these are, where they are not all of them."""
        self.check_exact(self.weight)
        lam_H = torch.lerp(torch.full_like(self.lam, self.lambda_init), self.lam, self.annealed)
        # λ on the small side of the product: one pass over the outputs.
        scaled = lam_H[:, None, None] * self.weight
        if rows is not None:
            scaled = scaled[rows]
        return torch.einsum("BTHd,Hde->BTHe", o_BTHd, scaled.to(o_BTHd.dtype))


class DexAttention(SoftmaxAttention):
    """Softmax attention whose chosen heads become ``O − λ · O W_D``."""

    def __init__(self, config: DiffTransformerConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.heads = config.layer_dex_heads(layer_idx)
        if self.heads:
            self.dex = DexProjection(len(self.heads), self.width, config.layer_lambda_init(layer_idx))

    def combine(self, o_BTNW: Tensor, lam: Tensor | None) -> Tensor:
        if not self.heads:
            return o_BTNW
        if o_BTNW.shape[2] != self.config.num_attention_heads:
            return self._combine_rank(o_BTNW)
        if len(self.heads) == o_BTNW.shape[2]:
            return o_BTNW - self.dex(o_BTNW)
        return self._subtract(o_BTNW, self.heads)

    def _subtract(self, o_BTNW: Tensor, heads: list[int], rows: list[int] | None = None) -> Tensor:
        index = torch.tensor(heads, dtype=torch.long, device=o_BTNW.device)
        return o_BTNW.index_add(2, index, self.dex(o_BTNW.index_select(2, index), rows), alpha=-1)

    def _combine_rank(self, o_BTNW: Tensor) -> Tensor:
        """Subtracts on one rank of several, which holds an equal share of the heads, and W_D of all heads."""
        count = o_BTNW.shape[2]
        first = count * tensor_rank(self.q_proj.weight)
        rows = [row for row, head in enumerate(self.heads) if first <= head < first + count]
        # This runs even if no chosen head is on this rank, because all ranks sum their gradients of W_D.
        return self._subtract(o_BTNW, [self.heads[row] - first for row in rows], rows)


def tensor_rank(weight: Tensor) -> int:
    """Returns which part of a weight this rank of a tensor-parallel mesh holds, counted from 0."""
    mesh = getattr(weight, "device_mesh", None)
    if mesh is None:
        raise UnsupportedError(
            "an engine that spreads heads over ranks does not say which of them are here, which DEX has to know",
            "one rank, or ranks that transformers made",
            "run it on one rank, or load it with tp_plan='auto'",
        )
    return mesh.get_local_rank() if mesh.ndim == 1 else mesh.get_local_rank("tp")


ATTENTION: dict[str, type[SoftmaxAttention]] = {
    "softmax": SoftmaxAttention,
    "diff_v1": DiffV1Attention,
    "diff_v2": DiffV2Attention,
    "diff_gda": DiffV1Attention,
    "diff_gda_v2": DiffV2Attention,
    "dex": DexAttention,
    "gated": GatedAttention,
}
