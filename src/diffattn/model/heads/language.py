"""The encoder with an output head, which names hidden tokens, and the class of either model with such a head."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.modeling_outputs import MaskedLMOutput
from transformers.utils.generic import can_return_tuple

from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.modeling import DiffTransformerForCausalLM, DiffTransformerLanguageModel
from diffattn.ops.half import quick_products


class DiffTransformerForMaskedLM(DiffTransformerLanguageModel):
    """An encoder with its output head: the logits of each token, which sees all others, and the loss of hidden ones.

    The weights have the names of ``DiffTransformerForCausalLM``, so that
    ``from_pretrained(folder, is_causal=False)`` makes an encoder of a decoder.

    >>> import torch
    >>> from diffattn.plan.shape import ModelShape
    >>> config = DiffTransformerConfig.from_shape(ModelShape.preset("300K"), "diff_v2", is_causal=False)
    >>> DiffTransformerForMaskedLM(config)(torch.tensor([[1, 2, 3]])).logits.shape[:2]
    torch.Size([1, 3])
    """

    causal = False

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Logits ``(B, T, vocab_size)``; with ``labels`` (−100 where nothing is asked) the mean loss in nats."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        with quick_products(outputs.last_hidden_state):
            logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def language_class(config: DiffTransformerConfig) -> type[DiffTransformerLanguageModel]:
    """Returns the class with an output head: the one that writes text, or the one of an encoder."""
    return DiffTransformerForCausalLM if config.is_causal else DiffTransformerForMaskedLM
