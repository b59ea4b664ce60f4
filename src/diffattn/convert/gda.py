"""The conversion of pretrained Llama-like Transformers to grouped differential attention with V2's rule.

With a softmax model of n query heads over G key/value heads, each group of n / G heads gets one noise head more, so
that n + G queries make the one call, in the order [signal … signal, noise] of each group. Keys, values and W_O are the
pretrained ones. The function is kept by λ = x W_λ (``lambda_form="linear"``) with W_λ = 0: what is subtracted is
multiplied by zero, and it need not be undone elsewhere, as V2's λ = 1/2 is by a doubled W_O.

The gradient into W_λ is what the noise head would change, which is not zero since it starts as a copy of a pretrained
head; the queries of the noise head follow once λ has left zero, one step later.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from diffattn.config_fields import Config
from diffattn.convert.layout import Tensors
from diffattn.convert.llama import to_softmax
from diffattn.convert.reading import check_tensors
from diffattn.model.configuration import DiffTransformerConfig


def to_diff_gda_v2(config: Config, tensors: Mapping[str, Tensor]) -> tuple[Config, Tensors]:
    """Returns a Llama-like checkpoint, or our softmax model, with one noise head for each key/value head.

    The noise head of a group starts as a copy of the group's first query head (rows of W_Q and of its bias). All other
    tensors are the pretrained ones, bit for bit.

    Args:
        config: as for :func:`diffattn.convert.llama.to_softmax`.
        tensors: as for :func:`diffattn.convert.llama.to_softmax`.

    Returns:
        The configuration of :class:`DiffTransformerForCausalLM` and its tensors; the function is the source's.

    Raises:
        UnsupportedError, ConfigError, CheckpointError: as :func:`diffattn.convert.llama.to_softmax`.
    """
    softmax, weights = to_softmax(config, tensors)
    heads, groups = softmax["num_attention_heads"], softmax["num_key_value_heads"]
    for layer in range(softmax["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.self_attn."
        query = weights[f"{prefix}q_proj.weight"]
        for name in (f"{prefix}q_proj.weight", f"{prefix}q_proj.bias"):
            if name in weights:
                weights[name] = with_noise_heads(weights[name], groups, softmax["head_dim"])
        weights[f"{prefix}lambda_proj.weight"] = query.new_zeros(heads, softmax["hidden_size"])
    ours = DiffTransformerConfig.from_dict(
        softmax
        | {
            "attention": "diff_gda_v2",
            "num_attention_heads": heads + groups,
            "num_noise_heads": groups,
            "lambda_form": "linear",
            "converted": {"from": config["model_type"], "same_function": True},
        }
    )
    check_tensors(ours, weights)
    return ours.to_diff_dict(), weights


def with_noise_heads(rows: Tensor, groups: int, width: int) -> Tensor:
    """Returns the rows with a copy of each group's first head behind its last: n heads of ``width`` become n + G.

    >>> import torch
    >>> with_noise_heads(torch.tensor([0, 1, 2, 3]), 2, 1).tolist()
    [0, 1, 0, 2, 3, 2]
    """
    grouped = rows.unflatten(0, (groups, -1, width))
    return grouped[:, [*range(grouped.shape[1]), 0]].flatten(0, 2)


def parameters_beside_v2(made: Config) -> tuple[int, int]:
    """Counts what attention of such a model has more than the softmax model's, and what that of V2 would have.

    Args:
        made: the configuration that :func:`to_diff_gda_v2` returned.
    """
    noise, hidden, width = made["num_noise_heads"], made["hidden_size"], made["head_dim"]
    heads = made["num_attention_heads"] - noise
    row = hidden + (1 if made.get("attention_bias") else 0)
    of_one = [queries * width * row + heads * hidden for queries in (noise, heads)]
    return made["num_hidden_layers"] * of_one[0], made["num_hidden_layers"] * of_one[1]
