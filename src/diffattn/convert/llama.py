"""The conversions of pretrained Llama-like Transformers to our softmax, V2 and DEX models, and back to Llama-like ones.

All functions are pure: a ``config.json`` as a dictionary and tensors by name in, the same out. Nothing is guessed: what
our decoder cannot compute exactly is refused. With a softmax head ``O = softmax(Q Kᵀ/√d) V`` and the layer's output
``O W_O``, the conversions keep the function by

====== ============================================================================================================
V2     both maps are the pretrained one and λ = sigmoid(0) = 1/2, so ``O − O/2 = O/2``, and W_O is doubled
DEX    ``O − λ · O W_D`` with W_D = 0
====== ============================================================================================================

and both can be trained on: no new parameter starts where its gradient is exactly zero, except that W_D = 0 holds back λ
of DEX for one step. (If the second queries, the second keys and V1's λ all started at zero, they would stay there for
ever: the gradient of each is a product with the others.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from diffattn.config_fields import Config, dtype_name, shown
from diffattn.convert.layout import Tensors, twice_each_head
from diffattn.convert.options import NOISE
from diffattn.convert.reading import (
    SHARED,
    check_layers_alike,
    check_tensors,
    in_both_spellings,
    our_config,
    parsed,
    resolve_tie,
)
from diffattn.convert.sources import in_our_layout, softmax_config
from diffattn.errors import ConfigError, UnsupportedError
from diffattn.layer_kinds import FULL, SLIDING
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.variants import BASELINE


def to_softmax(config: Config, tensors: Mapping[str, Tensor]) -> tuple[Config, Tensors]:
    """Returns a Llama-like checkpoint as our softmax model: the same function, every weight bit for bit.

    Windows of layers and layers without rotary positions stay. Matrices that an architecture joins are taken apart, and
    rows of W_Q and W_K are put into our order where its rotary positions turn neighbouring channels.

    Args:
        config: a ``config.json`` of one of ``sources.LLAMA_LIKE`` in either spelling of its rotary positions; or one of
            our softmax models, which is checked and returned. Dropout is an option of training, so it is left out.
        tensors: its weights by name, such as ``model.layers.0.self_attn.q_proj.weight`` (n·d, D).

    Returns:
        The configuration of :class:`DiffTransformerForCausalLM` and its tensors. Tied embeddings that were stored
        twice are returned once; if the two differ, the model is untied, which is how ``transformers`` reads it.

    Raises:
        UnsupportedError: another architecture, quantised weights, experts, capped or scaled logits, rotary positions
            of part of a head, or ones that are unknown here.
        ConfigError: a configuration that is no model.
        CheckpointError: tensors are missing, unknown, or of another shape.
    """
    ours = softmax_config(config)
    weights = in_our_layout(config["model_type"], ours, tensors)
    resolve_tie(ours, weights)
    check_tensors(ours, weights)
    return ours.to_diff_dict(), weights


def to_diff_v2(
    config: Config,
    tensors: Mapping[str, Tensor],
    *,
    noise: str = "copy",
    noise_std: float = 0.1,
    seed: int = 0,
) -> tuple[Config, Tensors]:
    """Returns a Llama-like checkpoint, or our softmax model, as Differential V2 with 2n query heads.

    Query heads 2i and 2i + 1 both start as head i (rows of W_Q and of its bias), and W_λ starts at zero. W_O is
    doubled, which is exact in every floating-point type; a bias after W_O is not doubled. The keys and values, grouped
    or not, and so the cache, are those of the softmax model.

    Args:
        config: as for :func:`to_softmax`.
        tensors: as for :func:`to_softmax`.
        noise: ``"copy"`` keeps the function. ``"perturbed"`` adds random numbers to the second map's W_Q, so that the
            maps, and with them the function, differ from the source before the first step.
        noise_std: for ``"perturbed"``: the standard deviation of what is added, in units of that of the layer's W_Q.
        seed: the random seed for ``"perturbed"``.

    Returns:
        The same as :func:`to_softmax`; ``config["converted"]["same_function"]`` says whether the function was kept.

    Raises:
        UnsupportedError: also where a doubled W_O overflows, which only float16 does.
        ConfigError: also for an unknown ``noise``, or a ``noise_std`` that is not a finite number above 0.

    Source: the authors' post on Differential Transformer V2, January 2026; the start is ours.
    """
    if noise not in NOISE:
        raise ConfigError(f"noise is {noise!r}", f"one of {', '.join(NOISE)}", "choose one of these")
    if not 0 < noise_std < float("inf"):
        raise ConfigError(f"noise_std is {noise_std!r}", "a finite number above 0", 'correct it, or take noise "copy"')
    softmax, weights = to_softmax(config, tensors)
    heads, width, hidden = softmax["num_attention_heads"], softmax["head_dim"], softmax["hidden_size"]
    generator = torch.Generator().manual_seed(seed)
    for layer in range(softmax["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.self_attn."
        query = weights[f"{prefix}q_proj.weight"]
        for name in (f"{prefix}q_proj.weight", f"{prefix}q_proj.bias"):
            if name in weights:
                weights[name] = twice_each_head(weights[name], width)
        if noise == "perturbed":
            pairs = weights[f"{prefix}q_proj.weight"].view(heads, 2, width, hidden)
            drawn = torch.randn(heads, width, hidden, generator=generator)
            pairs[:, 1] += (noise_std * query.float().std() * drawn).to(pairs)
        weights[f"{prefix}o_proj.weight"] = _doubled(f"{prefix}o_proj.weight", weights[f"{prefix}o_proj.weight"])
        weights[f"{prefix}lambda_proj.weight"] = query.new_zeros(heads, hidden)
    made = {"noise": noise, "same_function": noise == "copy"}
    if noise == "perturbed":
        made |= {"noise_std": noise_std, "seed": seed}
    return _variant(config, softmax, weights, made, attention="diff_v2", num_attention_heads=2 * heads)


def to_dex(
    config: Config, tensors: Mapping[str, Tensor], *, heads: Sequence[Sequence[int]] | None = None
) -> tuple[Config, Tensors]:
    """Returns a Llama-like checkpoint, or our softmax model, as DEX: softmax stays, its output learns a subtraction.

    The chosen heads become ``O − λ · O W_D``. W_D starts at zero, so the function is kept. λ starts at the schedule by
    depth and moves to what is learned while training raises ``annealed`` from 0 to 1, so the first gradient into W_D
    is not zero.

    Args:
        config: as for :func:`to_softmax`.
        tensors: as for :func:`to_softmax`.
        heads: for every layer the numbers, from 0, of the heads that subtract. Default: all heads.

    Returns:
        The same as :func:`to_softmax`; the new tensors are float32, whatever the model's dtype.

    Raises:
        ConfigError: also for heads that the model does not have.

    Source: arXiv 2505.16333, section 4.
    """
    softmax, weights = to_softmax(config, tensors)
    chosen = None if heads is None else [list(layer) for layer in heads]
    ours = DiffTransformerConfig.from_dict(softmax | {"attention": "dex", "dex_heads": chosen})
    for layer in range(ours.num_hidden_layers):
        count = len(ours.layer_dex_heads(layer))
        if count:
            prefix = f"model.layers.{layer}.self_attn.dex."
            weights[f"{prefix}weight"] = torch.zeros(count, ours.rope_width, ours.rope_width)
            weights[f"{prefix}lam"] = torch.full((count,), ours.layer_lambda_init(layer))
            weights[f"{prefix}annealed"] = torch.zeros(())
    return _variant(config, softmax, weights, {"same_function": True}, attention="dex", dex_heads=chosen)


def fold_dex(config: Config, tensors: Mapping[str, Tensor]) -> tuple[Config, Tensors]:
    """Returns a DEX model as a softmax model; the subtraction goes into W_O.

    ``(O − λ · O W_D) W_O = O ((1 − λ W_D) W_O)``: λ of DEX is one number per head and not one per token. So a trained
    DEX model is as fast as the model that it came from, and :func:`to_llama` takes the result. The two models are equal
    except for the rounding of the new W_O, which is computed in float64.

    Raises:
        UnsupportedError: a model that is not DEX.
        ConfigError, CheckpointError: as :func:`to_softmax`.
    """
    ours = our_config(config)
    if not ours.record.chosen_heads:
        raise UnsupportedError(
            f"attention is {ours.attention!r}",
            "a 'dex' model, whose subtraction is linear",
            "keep the model as it is, since its subtraction cannot be folded into W_O",
        )
    weights = dict(tensors)
    check_tensors(ours, weights)
    width = ours.rope_width
    for layer in range(ours.num_hidden_layers):
        prefix, heads = f"model.layers.{layer}.self_attn.", ours.layer_dex_heads(layer)
        if not heads:
            continue
        projection, lam, annealed = (weights.pop(f"{prefix}dex.{name}") for name in ("weight", "lam", "annealed"))
        lam = torch.lerp(torch.full_like(lam, ours.layer_lambda_init(layer)), lam, annealed)
        folded = weights[f"{prefix}o_proj.weight"].clone()
        for head, subtracted in zip(heads, lam[:, None, None].double() * projection.double(), strict=True):
            columns = folded[:, head * width : (head + 1) * width]
            columns.copy_(columns.double() @ (torch.eye(width, dtype=torch.float64) - subtracted).T)
        weights[f"{prefix}o_proj.weight"] = folded
    softmax = {name: value for name, value in config.items() if name not in ("dex_heads", "converted")}
    return to_softmax(softmax | {"attention": "softmax"}, weights)


def to_llama(config: Config, tensors: Mapping[str, Tensor]) -> tuple[Config, Tensors]:
    """Returns our softmax model as a Llama-like checkpoint that any engine knows, every tensor unchanged bit for bit.

    The architecture is the first that has the model's parts: Qwen3 (norms of queries and keys); Llama; Qwen2 (biases of
    queries, keys and values, but not of W_O); Mistral (a head width that does not divide the hidden size, or a sliding
    window in all layers); Ministral (a window in some layers); SmolLM3 (layers without rotary positions, or windows
    beside Llama's biases). Rotary positions are written in the old and the new spelling, for older and newer engines.

    Args:
        config: a ``config.json`` of :class:`DiffTransformerForCausalLM`.
        tensors: its weights by name.

    Raises:
        UnsupportedError: a V1, V2 or DEX model, or parts that no one architecture has together.
        ConfigError, CheckpointError: as :func:`to_softmax`.
    """
    ours = our_config(config)
    if ours.record.chosen_heads:
        raise UnsupportedError(
            "attention is 'dex'",
            "a softmax model, because Llama subtracts nothing",
            "convert it to softmax first, which folds W_D into W_O",
        )
    if ours.record.gated:
        raise UnsupportedError(
            "attention is 'gated'", "a softmax model, because Llama has no gate", "keep it as diff_transformer"
        )
    if ours.attention != BASELINE:
        raise UnsupportedError(
            f"attention is {ours.attention!r}",
            "a softmax model, because Llama has one softmax map per head and no weights make it the difference of two",
            "keep it as diff_transformer",
        )
    if ours.switches():
        raise UnsupportedError(
            f"the model has {ours.switches()}",
            "a plain softmax model, because Llama is one",
            "keep it as diff_transformer",
        )
    check_layers_alike(ours, "Llama", has=("sliding_window", "unrotated_layers"))
    weights = dict(tensors)
    resolve_tie(ours, weights)
    check_tensors(ours, weights)
    kind, extra = _architecture(ours)
    rope = dict(ours.rope_parameters or {})
    fields = {name: getattr(ours, name) for name in SHARED} | extra
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    fields |= {"head_dim": ours.head_dim, "rope_parameters": rope, "architectures": [name]}
    return in_both_spellings(parsed(CONFIG_MAPPING[kind], fields).to_diff_dict(), rope), weights


def _architecture(ours: DiffTransformerConfig) -> tuple[str, Config]:
    """Returns the first architecture that has the model's parts, and the fields that only it has."""
    biases = (ours.attention_bias, ours.attention_output_bias, ours.mlp_bias)
    whole_width = ours.hidden_size % ours.num_attention_heads == 0
    layers = ours.layer_types or []
    everywhere, nowhere = FULL not in layers, SLIDING not in layers
    windows: Config = {"sliding_window": ours.sliding_window, "layer_types": layers}
    # Older engines read the number of layers before the first with a window.
    chosen = windows | {
        "use_sliding_window": not nowhere,
        "max_window_layers": len(layers) if nowhere else layers.index(SLIDING),
    }
    if ours.unrotated_layers is None:
        if ours.qk_norm and biases in ((False, False, False), (True, True, False)):
            return "qwen3", {"attention_bias": biases[0], **chosen}
        if not ours.qk_norm and nowhere and whole_width and biases[0] == biases[1]:
            return "llama", {"attention_bias": biases[0], "mlp_bias": biases[2]}
        if not ours.qk_norm and biases == (True, False, False):
            return "qwen2", chosen
        if not ours.qk_norm and biases == (False, False, False):
            # Layers with windows and without are Ministral's: Mistral's are all alike.
            return (
                ("mistral", {"sliding_window": ours.sliding_window})
                if everywhere or nowhere
                else ("ministral", windows)
            )
    if not ours.qk_norm and biases[0] == biases[1]:
        turned = [int(layer not in (ours.unrotated_layers or ())) for layer in range(ours.num_hidden_layers)]
        extra = windows | {"use_sliding_window": not nowhere, "no_rope_layers": turned}
        return "smollm3", {"attention_bias": biases[0], "mlp_bias": biases[2], **extra}
    raise UnsupportedError(
        f"qk_norm is {ours.qk_norm}, attention_bias {biases[0]}, attention_output_bias {biases[1]}, mlp_bias "
        f"{biases[2]}, sliding_window {ours.sliding_window}, unrotated_layers {shown(ours.unrotated_layers)}",
        "parts that one of llama, mistral, ministral, qwen2, qwen3, smollm3 has together",
        "keep it as diff_transformer",
    )


def _doubled(name: str, tensor: Tensor) -> Tensor:
    doubled = 2 * tensor
    if not torch.equal(doubled.isfinite(), tensor.isfinite()):
        raise UnsupportedError(
            f"{name} overflows {dtype_name(tensor.dtype)} when it is doubled",
            "a number format with a wider range",
            "convert a bfloat16 copy of the model",
        )
    return doubled


def _variant(config: Config, softmax: Config, weights: Tensors, made: Config, **fields: Any) -> tuple[Config, Tensors]:
    """Returns the configuration and tensors of a variant of a softmax model, with a note of what it was made from."""
    ours = DiffTransformerConfig.from_dict(softmax | fields | {"converted": {"from": config["model_type"], **made}})
    check_tensors(ours, weights)
    return ours.to_diff_dict(), weights
