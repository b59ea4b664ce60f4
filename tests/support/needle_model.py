"""Small models and a tokenizer for the studies that read prompts with needles."""

import dataclasses

from support.small_models import SHAPE, small_model
from transformers import LlamaConfig, LlamaForCausalLM

from diffattn.data.needles import Haystack, Needle, answer, question
from diffattn.data.text import Document
from diffattn.data.tokenizer import train_tokenizer

VOCABULARY = 400
TEXT = " ".join(f"Line {number} is about {word}." for number in range(80) for word in ("rain", "a road", "old wine"))


def haystack() -> Haystack:
    needles = [Needle("Lima", "48219"), Needle("Oslo", "70035")]
    return Haystack([Document("a", TEXT)], train_tokenizer([TEXT, question(needles) + answer(needles)], VOCABULARY))


def reader(attention: str, **config):
    """A random model for the haystack's tokens; ``llama`` is that of transformers."""
    if attention == "llama":
        config = LlamaConfig(
            hidden_size=48, intermediate_size=29, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3,
            head_dim=10, initializer_range=0.3, vocab_size=VOCABULARY,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()
    shape = dataclasses.replace(SHAPE, vocab_size=VOCABULARY, max_position_embeddings=8192, **config)
    return small_model(attention, shape=shape)
