"""Every causal architecture of transformers is converted exactly or refused in one line; none is silently different."""

import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import PreTrainedModel

from benchmarks.architectures import (
    ARCHITECTURES,
    CONVERTED,
    DIFFERENT,
    EQUAL,
    NO_MODEL,
    REFUSED,
    SIZES,
    outcome,
    row_of,
    small_model,
)
from diffattn.convert import architectures, llama, sources
from diffattn.convert.architectures import reasons
from diffattn.convert.convert import kind_of
from diffattn.errors import UnsupportedError

ROOT = Path(__file__).parents[2]
PINNED = re.search(r"^transformers==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)[1]


def test_every_other_architecture_is_refused_in_one_line() -> None:
    for kind in ARCHITECTURES:
        if kind in CONVERTED:
            assert kind_of({"model_type": kind}) in ("llama", "diffllama")
            assert reasons(kind) == []
            continue
        with pytest.raises(UnsupportedError) as caught:
            kind_of({"model_type": kind})
        assert "\n" not in str(caught.value)
        assert all(part in str(caught.value) for part in [repr(kind), *reasons(kind), "wanted one of"])


def test_an_architecture_that_an_older_transformers_lacks_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CONFIG_MAPPING", {})
    with pytest.raises(UnsupportedError, match=r"'cwm', which transformers .* does not know; wanted a release"):
        sources.softmax_config({"model_type": "cwm"})


def test_the_reasons_are_of_architectures_that_there_are() -> None:
    named = {kind for kinds in architectures._MODELS.values() for kind in kinds.split()}
    if transformers.__version__ == PINNED:
        assert named <= set(ARCHITECTURES)
    # Those that only have a generic line were not named by anyone yet; most have a reason.
    assert len(named) > 140


def test_the_rows_are_of_all_architectures_of_the_pinned_release_and_none_is_different() -> None:
    lines = (ROOT / "benchmarks/results/architectures.jsonl").read_text().splitlines()
    rows = {row["model_type"]: row for row in map(json.loads, lines)}
    assert {row["versions"]["transformers"] for row in rows.values()} == {PINNED}
    if transformers.__version__ == PINNED:
        assert list(rows) == ARCHITECTURES
    assert {kind for kind, row in rows.items() if row["outcome"] == EQUAL} == set(CONVERTED)
    assert {row["outcome"] for row in rows.values()} == {EQUAL, REFUSED}
    for kind, row in rows.items():
        if "varied" in row:
            assert DIFFERENT not in row["varied"].values()
            assert sum(found == EQUAL for found in row["varied"].values()) >= 18, kind


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("phi3", {"sliding_window": 5}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2, "sliding_window": 5, "use_sliding_window": True}),
    "qwen2": ("qwen2", {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1}),
    "ernie4_5": ("ernie4_5", {"use_bias": True}),
    "helium": ("helium", {"attention_bias": True}),
    "granite": ("granite", {}),
    "seed_oss": ("seed_oss", {"attention_out_bias": True, "mlp_bias": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_with_and_without_a_cache_are_the_sources(name: str) -> None:
    kind, changes = CASES[name]
    assert outcome(kind, changes)["outcome"] == EQUAL


@pytest.mark.parametrize("to", ["diff_v2", "dex", "diff_gda_v2"])
@pytest.mark.parametrize("name", ["smollm3", "phi3"])
def test_differential_models_of_them_keep_windows_and_layers_without_positions(name: str, to: str) -> None:
    kind, changes = CASES[name]
    assert outcome(kind, changes, to)["outcome"] == EQUAL


AGAIN = {
    "llama": "llama", "internlm3": "llama", "iquestcoder": "llama", "mistral": "mistral", "ministral": "mistral",
    "qwen2": "qwen2", "qwen3": "qwen3", "phi3": "llama", "smollm3": "smollm3", "cwm": "ministral", "seed_oss": "qwen2",
    "helium": "llama", "ernie4_5": "llama", "granite": "llama",
}  # fmt: skip


@pytest.mark.parametrize("kind", [kind for kind in sources.LLAMA_LIKE if kind in ARCHITECTURES])
def test_what_each_is_written_as_again(kind: str) -> None:
    model = small_model(kind, {"no_rope_layer_interval": 2} if kind == "smollm3" else {})
    assert model is not None
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    config, _ = llama.to_llama(*llama.to_softmax(model.config.to_diff_dict(), tensors))
    assert config["model_type"] == AGAIN[kind]


def no_windows(*_: Any) -> dict:
    return {}


def one_matrix(kind: object, ours: Any, tensors: Any) -> dict:
    """Channels of queries and keys as they were."""
    return dict(tensors)


WRONG = {
    "windows forgotten": (sources, "_windows", no_windows, "mistral", {"sliding_window": 5}),
    "layers without positions forgotten": (sources, "_windows", no_windows, "smollm3", {"no_rope_layer_interval": 2}),
    "order of channels": (llama, "in_our_layout", one_matrix, "helium", {}),
    "a constant overlooked": (sources, "_check_multipliers", no_windows, "granite", {"residual_multiplier": 0.5}),
    "scores overlooked": (sources, "_check_multipliers", no_windows, "granite", {"attention_multiplier": 0.2}),
    "half a head": (sources, "rope_of", lambda source: {**source.rope_parameters, "partial_rotary_factor": 1.0},
                    "phi3", {"partial_rotary_factor": 0.5}),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_conversion_that_overlooks_something_is_found_to_be_different(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, function, wrong, kind, changes = WRONG[name]
    monkeypatch.setattr(module, function, wrong)
    assert outcome(kind, changes)["outcome"] == DIFFERENT


def test_a_field_that_is_not_known_is_refused_where_a_model_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a later release of the library had added mlp_bias."""
    monkeypatch.setitem(sources.LLAMA_LIKE, "llama", sources.Source(mlp_bias=False))
    assert outcome("llama")["outcome"] == EQUAL
    assert outcome("llama", {"mlp_bias": True})["reason"].startswith("config.json has mlp_bias, whose meaning is not")


def found(reason: str, model: PreTrainedModel) -> bool:
    """Whether a model has the part: in the names of its weights, its classes, or the code of its file."""
    names = "\n".join(name for name, _ in [*model.named_parameters(), *model.named_buffers(), *model.named_modules()])
    classes = "\n".join({type(module).__name__ for module in model.modules()})
    code = inspect.getsource(sys.modules[type(model).__module__])
    weights = dict(model.named_parameters())
    if reason == architectures.NO_GATE:
        return "gate" not in names
    if reason == architectures.PLAIN_NORM:
        return "Norm" in classes and not any("norm" in name for name in weights)
    if reason == architectures.WIDE_NORM:
        widths = {weight.numel() for name, weight in weights.items() if "q_norm" in name}
        return widths == {SIZES["num_attention_heads"] * SIZES["head_dim"]}
    if reason == architectures.LATE_NORM:
        norm = re.search(r"self\.(q_norm|query_layernorm)\(", code)
        return norm is not None and 0 < code.find("apply_rotary_pos_emb(query_states") < norm.start()
    where, pattern = {
        architectures.EXPERTS: (names, r"expert|router"),
        architectures.LATENT: (names, r"kv_a_proj"),
        architectures.RECURRENT: (names + code, r"mamba|A_log|conv1d|linear_attn|time_|lstm|rglru|LightningAttention"),
        architectures.CONVOLUTION: (code, r"ShortConv"),
        architectures.POST_NORM: (names, r"post_(feedforward|mlp|self_attn)_?(layer)?norm"),
        architectures.LAYER_NORM: (classes, r"LayerNorm"),
        architectures.PLACES: (names + code, r"wpe|position_?embed|embed_positions|positions_embed|pos_encoding"),
        architectures.BIASES: (code, r"alibi|relative|rel_"),
        architectures.PARTIAL: (code, r"partial_rotary_factor"),
        architectures.SCALED: (code, r"embed_scale|normalizer|hidden_size\*\*0\.5"),
        architectures.OFFSET_GAIN: (code, r"1\.0 \+ self\.weight|weight \+ 1|1 \+ self\.weight"),
        architectures.CAPPED: (code, r"soft_?cap"),
        architectures.LOGIT_SCALE: (code, r"logit_scale"),
        architectures.SINKS: (names, r"sinks"),
        architectures.GATED: (code, r"sigmoid\(.*gate|gate.*sigmoid"),
        architectures.CROSS: (names, r"encoder_attn|cross_attn|crossattention"),
        architectures.MANY_INPUTS: (names, r"vision|image|visual|audio|patch|depth"),
        architectures.SUB_NORM: (names, r"sub_norm|post_norm"),
        architectures.QUERY_SCALE: (code, r"get_llama_4_attn_scale"),
    }[reason]
    return re.search(pattern, where, re.S) is not None


@pytest.mark.full
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_each_is_equal_or_refused_for_a_part_that_it_has(kind: str) -> None:
    row = row_of(kind)
    assert row["outcome"] == (EQUAL if kind in CONVERTED else REFUSED)
    assert DIFFERENT not in row.get("varied", {}).values()
    model = small_model(kind, {}) if row["built"] else None
    for reason in reasons(kind) if model is not None else []:
        assert found(reason, model), reason
    assert row["built"] or kind not in CONVERTED
    assert row["outcome"] != NO_MODEL
