"""The plug-in that vLLM calls before it looks for a model: ``diffattn`` of the group ``vllm.general_plugins``.

vLLM's Transformers backend builds a model with ``AutoModel``, replaces its linear layers, and serves the one attention
call of each layer from its paged cache. It only has to know that our architecture is one of those.
"""

from __future__ import annotations

from diffattn.serve.vllm_private import add_architecture

ARCHITECTURE = "DiffTransformerForCausalLM"


def register() -> None:
    """Makes vLLM know our configuration and models. It calls this in each of its processes, and may call it again."""
    from diffattn.model.registration import register as register_auto_classes

    register_auto_classes()
    add_architecture(ARCHITECTURE)
