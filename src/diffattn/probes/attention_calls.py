"""The attention of a model's layers, read from their own queries, keys and λ while the model runs.

Every model that calls the attention interface of ``transformers`` can be read: ours, and its causal models that do not
change their scores behind the product. Nothing of T × T is held: a study asks for the rows of the maps that it needs.

Shape suffixes: B batch, T queries, S keys, H output heads, H_n noise heads (as many, where they are not shared), G
key/value heads, d width of a query, R some of the T rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from diffattn.errors import UnsupportedError
from diffattn.model.configuration import DIFF_FUSED, DiffTransformerConfig
from diffattn.model.fused import is_compact
from diffattn.model.transformers_private import attention_function, attention_implementation
from diffattn.ops.reference import of_signals

# About so many scores of all heads are computed at once: 64 MiB in float32.
BLOCK = 1 << 24


@dataclass(frozen=True)
class LayerCall:
    """The one attention call of a layer: its maps are ``softmax(scale · queries[i] keys[i]ᵀ)``."""

    layer: int
    """The layer, counted from 0."""
    queries: tuple[Tensor, ...]
    """Queries (B, T, H, d) of map_pos, and behind them those of map_neg, (B, T, H_n, d), of a differential model."""
    keys: tuple[Tensor, ...]
    """Keys (B, S, G, d) of map_pos, and behind them those of map_neg where the model is differential."""
    value: Tensor
    """Values, (B, S, G, V)."""
    lam: Tensor | None
    """λ in float32, (B, T, H); None for a model with one map."""
    scale: float
    """The number that the products of queries and keys are multiplied by."""
    mask: Tensor | None
    """The mask: None for a causal one, the fused kernel's (``diffattn.model.masks.is_compact``), or one of
    ``scaled_dot_product_attention``."""

    @property
    def heads(self) -> int:
        """Output heads H."""
        return self.queries[0].shape[2]

    @property
    def noise_heads(self) -> int:
        """Noise heads H_n: those of map_neg, which H / H_n output heads share; 0 for a model with one map."""
        return self.queries[1].shape[2] if len(self.queries) > 1 else 0

    def row_blocks(self) -> Iterator[range]:
        """Yields all rows, in blocks so small that the scores of all heads take some ten megabytes."""
        B, T, H, _ = self.queries[0].shape
        rows = max(1, BLOCK // (B * H * self.keys[0].shape[1]))
        return (range(start, min(start + rows, T)) for start in range(0, T, rows))

    def scores(self, which: int, rows: range, keys: range) -> Tensor:
        """Returns scaled scores of map_pos (0) or map_neg (1) for some keys, (B, H or H_n, R, keys), hidden too."""
        q_BRHd = self.queries[which][:, rows.start : rows.stop : rows.step].float() * self.scale
        k_BSGd = self.keys[which][:, keys.start : keys.stop].float()
        q_BGrd = q_BRHd.unflatten(2, (k_BSGd.shape[2], -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        scores = q_BGrd @ k_BSGd.permute(0, 2, 3, 1)
        return scores.unflatten(2, (-1, len(rows))).flatten(1, 2)

    def logits(self, which: int, rows: range) -> Tensor:
        """Returns scaled scores of map_pos (0) or map_neg (1), (B, H or H_n, R, S) in float32; −∞ at a hidden key."""
        scores = self.scores(which, rows, range(self.keys[0].shape[1]))
        mask = self._mask(rows)
        if mask is None:
            return scores
        return scores.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else scores.add_(mask)

    def seen_scores(self, which: int, block: int = 1 << 18) -> Iterator[Tensor]:
        """Yields every score of a query and a key that it sees, once, in tensors of any shape with zeros among them.

        Each has about ``block`` numbers, which the first caches hold. Under a causal mask nothing else is computed.
        """
        T, S, H = self.queries[0].shape[1], self.keys[0].shape[1], self.queries[which].shape[2]
        for sequence in range(self.queries[0].shape[0]):
            call = self._one_map(which, sequence)
            step = max(1, block // (H * S))
            for start in range(0, T, step):
                rows = range(start, min(start + step, T))
                if self.mask is not None:
                    scores = call.logits(0, rows)
                    yield scores[scores > -torch.inf]
                    continue
                # Up to where the first row sees, then the triangle behind.
                seen = start + S - T + 1
                yield call.scores(0, rows, range(seen))[0]
                if len(rows) > 1:
                    yield call.scores(0, rows, range(seen, rows.stop + S - T)).tril_(-1)

    def _one_map(self, which: int, sequence: int) -> LayerCall:
        """Returns one map of one sequence of the batch, as if the layer had no other, in float32."""
        one = slice(sequence, sequence + 1)
        return replace(
            self,
            queries=(self.queries[which][one].float(),),
            # Head by head in memory, as the products read them.
            keys=(self.keys[which][one].float().transpose(1, 2).contiguous().transpose(1, 2),),
            lam=None,
            mask=self._mask_of(one),
        )

    def _mask_of(self, one: slice) -> Tensor | None:
        """Returns the mask of some sequences of the batch."""
        if self.mask is None:
            return None
        if is_compact(self.mask):
            return self.mask[:, one]
        return self.mask[one] if len(self.mask) > 1 else self.mask

    def maps(self, rows: range) -> tuple[Tensor, ...]:
        """Returns ``(map_pos,)`` or ``(map_pos, map_neg)`` in float32; a row without keys is zeros.

        map_pos is (B, H, R, S), and map_neg (B, H_n, R, S): once for all output heads that share it.
        """
        return tuple(self.logits(which, rows).softmax(dim=-1).nan_to_num_(0.0) for which in range(len(self.queries)))

    def lam_of(self, rows: range) -> Tensor | None:
        """Returns λ in the shape in which it multiplies map_neg: (B, H, R, 1)."""
        return None if self.lam is None else self.lam[:, rows.start : rows.stop : rows.step].transpose(1, 2)[..., None]

    def map_diff(self, rows: range) -> Tensor:
        """Returns ``map_pos − λ · map_neg``, or map_pos where there is no other; (B, H, R, S) in float32."""
        return self.difference(self.maps(rows), rows)

    def difference(self, maps: tuple[Tensor, ...], rows: range) -> Tensor:
        """Returns ``map_pos − λ · map_neg`` of the maps that are given."""
        lam = self.lam_of(rows)
        return maps[0] if lam is None else torch.addcmul(maps[0], lam, of_signals(maps[1], self.heads), value=-1)

    def _mask(self, rows: range) -> Tensor | None:
        """Returns the mask of these rows: True where a query sees a key, or numbers to be added; None: all see all."""
        T, S = self.queries[0].shape[1], self.keys[0].shape[1]
        device = self.keys[0].device
        row = torch.arange(rows.start, rows.stop, rows.step, device=device)[:, None]
        if self.mask is None:
            # The mask is aligned at the end, so it hides nothing from a single query.
            return None if T == 1 else torch.arange(S, device=device) <= row + (S - T)
        if is_compact(self.mask):
            first, end = self.mask
            return (first <= row) & (row < end)
        return self.mask[:, :, rows.start : rows.stop : rows.step, :S]


Serve = Callable[[LayerCall], Tensor | None]


@contextlib.contextmanager
def served_by(model: PreTrainedModel, serve: Serve) -> Iterator[None]:
    """Shows every attention call of the model to ``serve`` for as long as this lasts.

    Args:
        model: any causal model of ``transformers``; its implementation is put back at the end.
        serve: a function that is given each layer's call, in order. It returns the output heads before V1's norm,
            (B, T, H, V), or None to let the model compute them.

    Raises:
        UnsupportedError: the model does not use the attention interface, or changes its scores in a way that is not
            read; says which.
    """
    ours = isinstance(model.config, DiffTransformerConfig)
    differential = ours and model.config.has_map_diff
    if ours and not model.config.pairs_share_group:
        raise _cannot(model, "each map of a head has values of its own, so there is no map_diff")
    implementation = DIFF_FUSED if differential else "sdpa"
    called: list[int] = []
    plain = ALL_ATTENTION_FUNCTIONS[implementation]

    def shown(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Any]:
        call = _layer_call(module, query, key, value, mask, options)
        called.append(call.layer)
        output = serve(call)
        if output is None:
            return plain(module, query, key, value, mask, **options)
        norm = options.get("norm")
        return (output if norm is None else norm(output, norm.scale)).to(value.dtype), None

    with contextlib.ExitStack() as changes:
        try:
            changes.enter_context(attention_implementation(model, implementation))
        except ValueError as error:
            raise _cannot(model, str(error).split(". ")[0]) from None
        changes.enter_context(attention_function(implementation, shown))
        yield
    if not called:
        raise _cannot(model, "it does not use the attention interface of transformers")


def _cannot(model: nn.Module, reason: str) -> UnsupportedError:
    """Returns the error for a model whose attention cannot be read."""
    return UnsupportedError(
        f"the attention of {type(model).__name__} cannot be read ({reason})",
        "a causal model of transformers whose scores are scaled products of queries and keys",
        "take a model such as Llama or one of diffattn",
    )


def _layer_call(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> LayerCall:
    """Returns the call in our layout: heads behind tokens, one entry per map.

    Raises:
        UnsupportedError: a layer that changes its scores behind the product.
    """
    for name in ("softcap", "position_bias", "s_aux"):
        if options.get(name) is not None:
            raise _cannot(module, f"it changes its scores by {name}")
    q_BTNd, k_BSGW, v_BSGV = (x.transpose(1, 2) for x in (query, key, value))
    scale = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    lam = options.get("lam")
    queries: tuple[Tensor, ...] = (q_BTNd,)
    keys: tuple[Tensor, ...] = (k_BSGW,)
    if lam is not None:
        # Each noise head stands behind the signal heads that share it.
        shared = options.get("signals_per_noise", 1)
        signals, noise = q_BTNd.unflatten(2, (-1, shared + 1)).split([shared, 1], dim=3)
        queries = (signals.flatten(2, 3), noise.flatten(2, 3))
        keys = k_BSGW.chunk(2, dim=-1) if k_BSGW.shape[-1] != q_BTNd.shape[-1] else (k_BSGW, k_BSGW)
        lam = lam.expand(queries[0].shape[:3])
    if mask is None and not getattr(module, "is_causal", True):
        # Every query sees every key, in the kernel's form.
        B, S = k_BSGW.shape[:2]
        mask = (
            torch.tensor([0, query.shape[2]], dtype=torch.int32, device=key.device)
            .view(2, 1, 1, 1, 1)
            .expand(-1, B, 1, 1, S)
        )
    layer: Any = module.layer_idx
    return LayerCall(layer, queries, keys, v_BSGV, lam, float(scale), mask)
