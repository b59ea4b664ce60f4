"""The names of vLLM that the server uses although vLLM does not promise to keep them.

vLLM is imported inside the functions: it is installed apart, and another process of vLLM's own calls them.

vLLM reads our models, too. Its Transformers backend takes the class name ``RMSNorm…`` for a norm that it may replace,
and reads the source of the attention's ``forward`` for the one call and its scale; see ``diffattn.model.attention``.
"""

from __future__ import annotations

from typing import Any

from diffattn.private_names import PrivateName

SERVER = "vllm.entrypoints.openai.api_server"
BACKEND = "vllm.model_executor.models.transformers:TransformersForCausalLM"


def built_for() -> Any:
    """Returns the device that the installed vLLM was built for, such as ``"cuda"``; empty where it finds none."""
    from vllm.platforms import current_platform

    return current_platform.device_type


def add_architecture(name: str) -> None:
    """Has vLLM serve an architecture by its Transformers backend, unless it does so already."""
    from vllm import ModelRegistry

    if name not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(name, BACKEND)


_TESTED = "==0.32.*"
_SERVE = ("diffattn serve --engine vllm", "vLLM documents this name for plug-ins")
NAMES = (
    PrivateName("vllm:ModelRegistry.get_supported_archs", _TESTED, *_SERVE),
    PrivateName("vllm:ModelRegistry.register_model", _TESTED, *_SERVE),
    PrivateName(BACKEND, _TESTED, *_SERVE),
    PrivateName("vllm.platforms:current_platform.device_type", _TESTED, *_SERVE),
    PrivateName(f"{SERVER}:run_server", _TESTED, *_SERVE),
)
