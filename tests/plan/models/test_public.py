"""Public models by name: their parameters are those that their makers publish, and those of the built class."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from diffattn.errors import ConfigError
from diffattn.plan.answer import plan
from diffattn.plan.blocks.estimate import estimate_model
from diffattn.plan.models.public import public_models
from diffattn.plan.named_model import load_shape, parse_model
from diffattn.plan.search import fits
from diffattn.plan.setting import Setting

MODELS = public_models()
SETTING = Setting(context=4096, precision="bf16", machine=None)
DOCS = Path(__file__).parents[3] / "docs" / "plan.md"
# Whose classes are code of their own, which is never run; their count is held to the list of their tensors elsewhere.
ELSEWHERE = {name for name, model in MODELS.items() if model.config["model_type"] in ("Motif", "phi4flash")}


def parameters(name: str) -> int:
    model = parse_model(name)
    return estimate_model(model.built, model.attention, SETTING).parameters.total


def test_the_models_that_people_ask_for_are_there() -> None:
    wanted = """motif-2.6B motif-2-12.7B motif-3 phi-4-mini-flash diffllama-0.3B diffllama-1B diffllama-375M
        diffllama-300M llama-3.2-1B llama-3.2-3B llama-3.1-8B qwen3-0.6B qwen3-1.7B qwen3-4B qwen3-8B
        smollm2-135M smollm2-360M smollm2-1.7B mistral-7B-v0.1 gemma-3-1B gemma-3-4B phi-4-mini olmo-2-1B olmo-2-7B"""
    assert set(wanted.split()) <= set(MODELS)


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.published])
def test_parameters_are_the_published_ones(name: str) -> None:
    published = MODELS[name].published
    assert published is not None
    exact = MODELS[name].published_in == "weights"
    assert parameters(name) == (published if exact else pytest.approx(published, rel=0.005))


@pytest.mark.parametrize("name", ["smollm2-135M", "diffllama-375M", "gpt-2"])
def test_parameters_are_those_of_the_class(name: str) -> None:
    assert parameters(name) == built(name)


@pytest.mark.full
@pytest.mark.parametrize("name", sorted(set(MODELS) - ELSEWHERE))
def test_parameters_of_every_model_are_those_of_its_class(name: str) -> None:
    assert parameters(name) == built(name)


def built(name: str) -> int:
    values = dict(MODELS[name].config)
    with torch.device("meta"):
        tokens = {f"{name}_token_id": 0 for name in ("bos", "eos", "pad")}
        config = AutoConfig.for_model(values.pop("model_type"), **values, **tokens)
        return AutoModelForCausalLM.from_config(config).num_parameters()


def test_the_table_of_the_docs_is_what_is_planned() -> None:
    """Each row has the name, the source, the variant, the count, the published one and the cache at 32,768 tokens."""
    text = DOCS.read_text(encoding="utf-8")
    wanted = {row.split("|")[1].strip(): row for row in rows()}
    found = {row.split("|")[1].strip(): row for row in text.splitlines() if row.startswith("| `")}
    assert {name: found.get(name) for name in wanted} == wanted


def rows() -> list[str]:
    """The rows of the table in docs/plan.md; ``python -m tests.plan.models.test_public`` prints them."""
    found = []
    for name, record in sorted(MODELS.items(), key=lambda item: item[0].casefold()):
        model = parse_model(name)
        cost = estimate_model(model.built, model.attention, Setting(context="32k", precision="bf16", machine=None))
        total, active = cost.parameters.total, cost.active_parameters
        count = f"{total:,}" + (f" ({active / 1e9:.2f} B for a token)" if active != total else "")
        published = "none" if record.published is None else f"{record.published:,} ({record.published_in})"
        cache = cost.decoding.memory.cache / 2**20
        cells = (f"`{name}`", record.source, model.attention, count, published, f"{cache:,.0f} MiB")
        found.append(f"| {' | '.join(cells)} |")
    return found


@pytest.mark.parametrize(
    ("text", "name"),
    [("MOTIF-2.6b", "motif-2.6B"), ("Qwen3 0.6B", "qwen3-0.6B"), ("gpt2-xl", "gpt-2-XL"), ("mixtral", "mixtral-8x7B"),
     ("next", "qwen3-next-80B-A3B"), (" phi 4 mini flash ", "phi-4-mini-flash")],
)  # fmt: skip
def test_names_are_found_in_any_case_and_by_a_part(text: str, name: str) -> None:
    assert parse_model(text).name == name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lama-3.2-1B", "did you mean llama-3.2-1B"),
        ("qwen3-0.7B", "did you mean qwen3-"),
        ("llama-3.2", "llama-3.2-1B and llama-3.2-3B fit"),
        ("diff_v1:lama-3.2-1B", "did you mean llama-3.2-1B"),
        ("diff_v1:gpt-2", "a variant of gpt-2"),
        ("no-such-model", "check the name or the path"),
    ],
)
def test_a_name_that_is_none_is_one_line(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        parse_model(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("attention", ["diff_v1", "diff_v2", "gated"])
def test_a_variant_of_a_public_model_has_as_many_parameters_and_its_windows(attention: str) -> None:
    softmax, other = (parse_model(f"{name}:gemma-3-4B") for name in ("softmax", attention))
    counts = [estimate_model(each.built, each.attention, SETTING).parameters.total for each in (softmax, other)]
    assert counts[1] == pytest.approx(counts[0], rel=0.005)
    assert {getattr(each.built, "window", None) for each in (softmax, other)} == {(29, 1024)}
    assert (other.name, other.attention) == (f"{attention}:gemma-3-4B", attention)


def test_public_models_stand_on_either_side() -> None:
    for pair in (("motif-2.6B", "softmax:motif-2.6B"), ("softmax:llama-3.2-3B", "motif-2.6B"), ("motif-3", "gpt-2")):
        result = plan(*pair, setting=SETTING)
        assert [model.name for model in result.models] == list(pair)
    assert plan("motif-2-12.7B", "softmax:motif-2-12.7B", setting=SETTING).models[0].attention == "diff_gda"
    assert plan("motif-2.6B", "diff_v1:motif-2.6B", setting=SETTING).models[0].attention == "diff_v1"


def test_the_part_that_is_planned_is_said() -> None:
    assert "Of gemma-3-4B the text model alone is planned." in plan("gemma-3-4B", setting=SETTING).notes


def test_the_longest_context_that_a_memory_holds_is_found_for_each_kind() -> None:
    found = {(row.phase, row.what): row.value for row in fits("24GiB", "phi-4-mini-flash", SETTING) if row.model}
    assert ("training", "context") not in found
    assert found["inference", "context"] > 100_000


def test_a_public_model_is_no_shape_of_a_file() -> None:
    with pytest.raises(ConfigError):
        load_shape("motif-2.6B")


if __name__ == "__main__":
    print("\n".join(rows()))
