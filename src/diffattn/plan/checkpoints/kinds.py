"""The kinds of checkpoint that are planned, by ``model_type``: what each has beside a shape, and what no plan holds.

A kind stands here where its parameters are counted exactly, which a test holds to a built model of each. In ``KINDS``
a layer is the one that ``cost.py`` and ``activations.py`` count: two norms, rotary attention, a feed-forward network of
three matrices; the others are read into blocks. Everything else is refused by its name: a count that is wrong by a
third looks like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from diffattn.config_fields import OURS, shown
from diffattn.errors import ConfigError
from diffattn.plan.blocks import experts, hybrids, motif, older
from diffattn.plan.blocks.block import BlockShape
from diffattn.plan.blocks.fields import Fields
from diffattn.variants import BASELINE


class ModelType(NamedTuple):
    """The way to read the ``config.json`` of one ``model_type``; the defaults are those of a file that lacks the key.

    ``bias``: of W_Q, W_K and W_V, of W_O, and of the feed-forward network, what all files have or the field that says
    it; ``qkv_bias`` is as ``use_bias`` where it is null, and ``biased`` what the first of the three is where the file
    lacks it. ``window``: which layers look back no further than ``sliding_window``: all of them (unless ``layer_types``
    names some), those from ``max_window_layers`` on, those without rotary positions, all but the first of every four,
    or all but every n-th (a number). ``fills``: whether heads are as wide as the hidden size together, unless noise
    heads are shared. ``attention``: the variant, whose heads the file counts as the softmax model has them;
    ``grouped``: the one of files that have ``num_noise_heads``, whose heads are those of the call. ``own_code``:
    whether the published files name code of their own, which is never run. ``act_weights``: parameters of each layer's
    activation function. ``fixed``: fields that have one value in all published files, in which alone the kind is known.
    """

    architecture: str
    kv_heads: int | None = None
    head_dim: int | None = None
    tied: bool = False
    bias: tuple[str | bool, str | bool, str | bool] = (False, False, False)
    biased: bool = False
    qk_norm: Literal["none", "head", "all heads"] = "none"
    further_norms: int = 0
    window: Literal["none", "all", "late", "unrotated", "behind the first of four"] | int = "none"
    window_width: int | None = None
    fills: bool = False
    attention: str = BASELINE
    grouped: str | None = None
    own_code: bool = False
    act_weights: int = 0
    fixed: Mapping[str, object] = {}

    @property
    def own_fields(self) -> tuple[str, ...]:
        """The fields that such a file has beside those of plain decoders."""
        of_groups = ("num_noise_heads", "expanded") if self.grouped else ()
        return (*self.fixed, *of_groups, *(name for name in self.bias if isinstance(name, str)))


class BlockType(NamedTuple):
    """The way to read the ``config.json`` of a kind whose layers differ from those of ``KINDS``; as ``ModelType``."""

    architecture: str
    read: Callable[[Fields], BlockShape]
    attention: str = BASELINE
    own_code: bool = False
    fixed: Mapping[str, object] = {}


# What says that attention has biases, and the network has.
_A, _M = "attention_bias", "mlp_bias"
_ATTENTION, _ALL = (_A, _A, False), (_A, _A, _M)
KINDS: dict[str, ModelType] = {
    OURS: ModelType("DiffTransformerForCausalLM", tied=True, bias=(_A, "attention_output_bias", _M), window="all"),
    "llama": ModelType("LlamaForCausalLM", bias=_ALL),
    "mistral": ModelType("MistralForCausalLM", kv_heads=8, window="all", window_width=4096),
    "ministral": ModelType("MinistralForCausalLM", kv_heads=8, window="all", window_width=4096),
    "qwen2": ModelType(
        "Qwen2ForCausalLM", kv_heads=32, bias=(True, False, False), window="late", window_width=4096
    ),
    "qwen3": ModelType(
        "Qwen3ForCausalLM", kv_heads=32, head_dim=128, bias=_ATTENTION, qk_norm="head", window="late",
        window_width=4096,
    ),
    "smollm3": ModelType("SmolLM3ForCausalLM", kv_heads=4, tied=True, bias=_ALL, window="unrotated"),
    "olmo2": ModelType("Olmo2ForCausalLM", bias=_ATTENTION, qk_norm="all heads"),
    "phi3": ModelType("Phi3ForCausalLM", window="all", own_code=True),
    "granite": ModelType("GraniteForCausalLM", bias=_ALL),
    "seed_oss": ModelType(
        "SeedOssForCausalLM", kv_heads=8, head_dim=128, bias=(_A, "attention_out_bias", _M), biased=True
    ),
    "cwm": ModelType(
        "CwmForCausalLM", kv_heads=8, head_dim=128, bias=(False, False, _M), window="behind the first of four",
        window_width=8192,
    ),
    "helium": ModelType("HeliumForCausalLM", kv_heads=20, head_dim=128, bias=(_A, False, _M), fills=True),
    "ernie4_5": ModelType(
        "Ernie4_5ForCausalLM", kv_heads=2, head_dim=128, tied=True, bias=("use_bias", "use_bias", "use_bias")
    ),
    "internlm3": ModelType("InternLM3ForCausalLM", kv_heads=2, head_dim=128, bias=_ALL, own_code=True),
    "iquestcoder": ModelType("IQuestCoderForCausalLM", kv_heads=8, head_dim=128, bias=_ALL, own_code=True),
    "gemma": ModelType("GemmaForCausalLM", kv_heads=16, head_dim=256, tied=True, bias=_ATTENTION),
    "gemma2": ModelType(
        "Gemma2ForCausalLM", kv_heads=4, head_dim=256, tied=True, bias=_ATTENTION, further_norms=2, window=2,
        window_width=4096,
    ),
    "gemma3_text": ModelType(
        "Gemma3ForCausalLM", kv_heads=4, head_dim=256, tied=True, bias=_ATTENTION, qk_norm="head", further_norms=2,
        window=6, window_width=4096,
    ),
    "diffllama": ModelType("DiffLlamaForCausalLM", bias=_ATTENTION, attention="diff_v1"),
    "motif": ModelType(
        "MotifForCausalLM", bias=("qkv_bias", "use_bias", "use_bias"), fills=True, attention="diff_v1",
        grouped="diff_gda", own_code=True, act_weights=motif.POLYNORM,
        fixed={"hidden_act": "poly_norm", "use_sliding_window": False, "k_ratio": 1},
    ),
}  # fmt: skip
BLOCKS: dict[str, BlockType] = {
    "gpt2": BlockType("GPT2LMHeadModel", older.gpt2),
    "gpt_neox": BlockType("GPTNeoXForCausalLM", older.gpt_neox),
    "phi": BlockType("PhiForCausalLM", older.phi),
    "starcoder2": BlockType("Starcoder2ForCausalLM", older.starcoder2),
    "nemotron": BlockType("NemotronForCausalLM", older.nemotron),
    "mixtral": BlockType("MixtralForCausalLM", experts.mixtral),
    "qwen2_moe": BlockType("Qwen2MoeForCausalLM", experts.qwen2_moe),
    "qwen3_moe": BlockType("Qwen3MoeForCausalLM", experts.qwen3_moe),
    "gpt_oss": BlockType("GptOssForCausalLM", experts.gpt_oss),
    "deepseek_v2": BlockType("DeepseekV2ForCausalLM", experts.deepseek_v2, own_code=True),
    "deepseek_v3": BlockType("DeepseekV3ForCausalLM", experts.deepseek_v3, own_code=True),
    "qwen3_next": BlockType("Qwen3NextForCausalLM", hybrids.qwen3_next),
    "falcon_h1": BlockType("FalconH1ForCausalLM", hybrids.falcon_h1),
    "recurrent_gemma": BlockType("RecurrentGemmaForCausalLM", hybrids.recurrent_gemma),
    "phi4flash": BlockType("Phi4FlashForCausalLM", hybrids.phi4flash, attention="diff_v1", own_code=True),
}
# Motif's files have one name for three kinds: V1, groups that share a noise head, and Motif 3.
MOTIF_3 = BlockType("MotifForCausalLM", motif.motif3, attention="diff_gda_v2", own_code=True)

# Words in the name of a key that speak of parts which no layer here has.
_FOREIGN = {
    "expert", "experts", "moe", "router", "mamba", "ssm", "conv", "recurrent", "lora", "latent", "vision", "audio",
    "text", "diff", "differential", "lambda", "nextn", "mtp", "decoder", "cross", "quantization", "compression",
}  # fmt: skip
_KNOWN = {"lambda_std_dev", "is_decoder", "decoder_start_token_id", "cross_attention_hidden_size"}


def kind_of(values: Mapping[str, object], file: str) -> ModelType | BlockType:
    """Returns the kind of a ``config.json``, once it is known to be one that is counted, with nothing foreign in it.

    Raises:
        ConfigError: another ``model_type``, code of its own, another class, quantised weights, or a key that speaks of
            parts which a plan does not have; with its name.
    """
    name = values.get("model_type")
    code = values.get("auto_map")
    kind = _named(values)
    if kind is None:
        said = f"model_type {name!r}" if name is not None else "no model_type"
        own = ", with code of its own (auto_map), which is never run" if code else ""
        raise ConfigError(
            f"{file!r} has {said}{own}",
            f"one of {', '.join((*KINDS, *BLOCKS))}",
            "write its numbers as a .toml file, if it is a decoder with one gated feed-forward network per layer",
        )
    if name == OURS:
        return kind
    if code and not kind.own_code:
        raise ConfigError(
            f"{file!r} has model_type {name!r} with code of its own (auto_map), which is never run",
            f"the {name} of transformers",
            "remove auto_map, if it is that",
        )
    classes = values.get("architectures")
    if classes and (not isinstance(classes, list) or kind.architecture not in classes):
        said = ", ".join(map(str, classes)) if isinstance(classes, list) else repr(classes)
        raise ConfigError(
            f"{file!r} has model_type {name!r} and architectures {said}",
            f"{kind.architecture}, which can be planned of that type",
            "write its numbers as a .toml file",
        )
    for key, wanted in kind.fixed.items():
        if (given := values.get(key)) is not None and given != wanted:
            raise ConfigError(
                f"{file!r} has model_type {name!r} and {key}={shown(given)}",
                f"{key}={shown(wanted)}, as in all published files, because no other layout is known",
                "correct the file",
            )
    for key, value in values.items():
        if "quantization" in key or "compression" in key:
            if value:
                raise ConfigError(
                    f"{file!r} has model_type {name!r} and {key}",
                    "weights as they were before they were quantised",
                    "plan the model that it was made from, with --weights-dtype int8 or int4",
                )
        elif value and isinstance(kind, ModelType) and key not in _KNOWN and _FOREIGN & {*key.casefold().split("_")}:
            raise ConfigError(
                f"{file!r} has model_type {name!r} and {key}",
                f"a plain {name}, without such parts",
                "write its numbers as a .toml file",
            )
    return kind


def _named(values: Mapping[str, object]) -> ModelType | BlockType | None:
    """Returns the kind that a file's ``model_type`` names; None: it is not known."""
    name = values.get("model_type")
    if not isinstance(name, str):
        return None
    if name in ("motif", "Motif"):
        return MOTIF_3 if values.get("diff_v2") or values.get("attention_cls") else KINDS["motif"]
    return BLOCKS[name] if name in BLOCKS else KINDS.get(name)
