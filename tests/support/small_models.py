"""Models of a few thousand parameters whose attention is far from uniform: a mistake in it shows in the logits."""

from dataclasses import replace

import torch
from torch import Tensor

from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.modeling import DiffTransformerForCausalLM
from diffattn.plan.shape import ModelShape
from diffattn.variants import ATTENTIONS

# Every dimension is another prime where the rules allow it: n·d = 12·10 is not D, and six query heads share a key head.
SHAPE = ModelShape(
    hidden_size=61,
    num_layers=3,
    num_heads=12,
    num_kv_heads=4,
    head_dim=10,
    intermediate_size=67,
    vocab_size=71,
    max_position_embeddings=89,
)
# Two float32 logits of the order of 1 that were summed in another order.
ROUNDING = 1e-5


def grouped(shape: ModelShape, attention: str) -> ModelShape:
    """The shape, with the fewest key/value heads where the variant needs several query heads for each and has one."""
    record = ATTENTIONS[attention]
    alone = record.shares_noise and shape.num_heads == shape.num_kv_heads
    return replace(shape, num_kv_heads=record.join) if alone else shape


def small_model(attention: str, *, shape: ModelShape = SHAPE, seed: int = 0, **config) -> DiffTransformerForCausalLM:
    """With projections wide enough for scores of the order of 1, and gains that are not 1."""
    torch.manual_seed(seed)
    model = DiffTransformerForCausalLM(
        DiffTransformerConfig.from_shape(shape, attention, **{"initializer_range": 0.15, **config})
    )
    for name, parameter in model.named_parameters():
        if "norm" in name or "subln" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def tokens(batch: int, length: int, *, seed: int = 1) -> Tensor:
    return torch.randint(2, SHAPE.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def assert_same_logits(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=ROUNDING)
