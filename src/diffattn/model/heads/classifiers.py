"""The generic classes of ``transformers`` over our layers: for texts, tokens and answers, of decoders and encoders."""

from __future__ import annotations

from transformers import AutoModel
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.modeling import DiffTransformerModel, DiffTransformerPreTrainedModel

# The generic classes build their layers by it, also where these files lie beside the weights.
AutoModel.register(DiffTransformerConfig, DiffTransformerModel, exist_ok=True)


class DiffTransformerForSequenceClassification(GenericForSequenceClassification, DiffTransformerPreTrainedModel):
    """The layers with one logit per class, of the last token of each text that is no padding."""


class DiffTransformerForTokenClassification(GenericForTokenClassification, DiffTransformerPreTrainedModel):
    """The layers with one logit per class and token."""


class DiffTransformerForQuestionAnswering(GenericForQuestionAnswering, DiffTransformerPreTrainedModel):
    """The layers with two logits per token: an answer begins there, and ends there."""
