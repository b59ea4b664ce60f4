"""The models beside the one that writes text: masked tokens, and the classifiers of ``transformers`` over our layers.

The library's generic classes are the models of texts, tokens and answers; a causal model and an encoder may have each.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AutoModel
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import MaskedLMOutput
from transformers.utils.generic import can_return_tuple

from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.modeling import (
    DiffTransformerForCausalLM,
    DiffTransformerLanguageModel,
    DiffTransformerModel,
    DiffTransformerPreTrainedModel,
)
from diffattn.ops.half import quick_products

# The generic classes build their layers by it, also where these files lie beside the weights.
AutoModel.register(DiffTransformerConfig, DiffTransformerModel, exist_ok=True)


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


class DiffTransformerForSequenceClassification(GenericForSequenceClassification, DiffTransformerPreTrainedModel):
    """The layers with one logit per class, of the last token of each text that is no padding."""


class DiffTransformerForTokenClassification(GenericForTokenClassification, DiffTransformerPreTrainedModel):
    """The layers with one logit per class and token."""


class DiffTransformerForQuestionAnswering(GenericForQuestionAnswering, DiffTransformerPreTrainedModel):
    """The layers with two logits per token: an answer begins there, and ends there."""
