"""The public models that are refused by name: what each computes, and why no conversion of it can be exact.

Code that lies in a checkpoint folder is never run, so a model that is defined by such code alone is refused, whatever
``model_type`` it says. A model whose layout is public is read by that layout, as Motif is, and its code is not needed.
"""

from __future__ import annotations

from diffattn.config_fields import OURS, Config, shown
from diffattn.errors import UnsupportedError

MOTIF = ("Motif", "motif")
"""The two spellings of Motif's ``model_type``."""
OWN_CODE = "code of its own (auto_map), which is never run"
"""The words for code that lies in a checkpoint folder."""
_NO_LAYOUT = "one of another architecture, since only code of its own says what this one computes"
# What a model_type computes that no decoder of ours does.
_NAMED = {
    "diff_llama": ("differential layers defined by code of its own, which is never run", _NO_LAYOUT),
    "phi4flash": (
        "Mamba layers and layers that share one cache beside its differential attention",
        "a model whose layers all have attention with keys and values of their own",
    ),
}


def check_not_refused(config: Config) -> None:
    """Raises for a ``config.json`` that is refused by name, or whose fields say that it is another model.

    Raises:
        UnsupportedError: the reason.

    >>> check_not_refused({"model_type": "llama", "attn_family": "diff_attn"})
    Traceback (most recent call last):
    diffattn.errors.UnsupportedError: config.json has attn_family 'diff_attn', which the llama of transformers has \
not; wanted one of another architecture, since only code of its own says what this one computes: choose another \
model
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind == OURS:
        return
    if kind in _NAMED:
        parts, wanted = _NAMED[kind]
        raise UnsupportedError(f"{kind} has {parts}", wanted, "choose another model")
    if kind in MOTIF:
        if found := _latent(config):
            raise UnsupportedError(
                f"this is Motif 3: {found} in config.json means attention over latent keys and values, beside experts",
                "Motif-2.6B or Motif-2-12.7B, whose layers a decoder of ours has",
                "choose one of these",
            )
        return
    if config.get("attn_family") is not None:
        raise UnsupportedError(
            f"config.json has attn_family {shown(config['attn_family'])}, which the {kind} of transformers has not",
            _NO_LAYOUT,
            "choose another model",
        )


def check_own_code(config: Config) -> None:
    """Raises unless a model of a known ``model_type`` is the library's own class.

    Raises:
        UnsupportedError: it has code of its own, which may compute anything.
    """
    if config.get("auto_map"):
        kind = config["model_type"]
        raise UnsupportedError(
            f"config.json has model_type {kind!r} with {OWN_CODE}",
            f"the {kind} of transformers",
            "remove auto_map, if it is that",
        )


def _latent(config: Config) -> str | None:
    """Returns the field by which a Motif model says that it is of the third generation."""
    for name in ("diff_v2", "kv_lora_rank", "q_lora_rank", "num_experts"):
        if config.get(name):
            return f"{name} {shown(config[name])}"
    if config.get("attention_cls") == "gdla":
        return "attention_cls 'gdla'"
    return None
