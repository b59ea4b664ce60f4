"""What a page is told of a model, which head it shows, and the models that no page takes."""

import dataclasses

import pytest
import torch
from support.needle_model import haystack, reader

from diffattn.demo.prompts import answer_tokens, hidden_number
from diffattn.demo.subject import LIMIT, best_head, check_models, facts
from diffattn.errors import CheckpointError, ConfigError, UnsupportedError
from diffattn.probes.lens import attention_maps


@pytest.fixture(scope="module")
def tokenizer():
    return haystack().tokenizer


@pytest.fixture(scope="module")
def asked(tokenizer):
    prompt = hidden_number(tokenizer, 1000)
    return tokenizer(prompt.text)["input_ids"], answer_tokens(prompt.text, prompt.answer, tokenizer)


@pytest.mark.parametrize("attention", ["softmax", "diff_v1", "diff_v2", "diff_gda", "dex", "gated"])
def test_facts_are_those_of_the_model(attention, asked):
    model = reader(attention)
    found = facts(model, asked[0], end=7)
    config = model.config
    assert found["heads"] == config.output_heads
    assert found["noise_heads"] == config.noise_heads
    assert found["layers"] == list(range(config.num_hidden_layers))
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["stop"] == [7]
    cache = model(torch.tensor([asked[0]])).past_key_values
    held = sum(x.numel() * 4 for layer in cache.layers for x in (layer.keys, layer.values))
    assert found["cache_bytes_per_token"] == held / len(asked[0])
    assert cache.layers[0].keys.shape[1::2] == (found["groups"], found["key_width"])


def test_windows_are_told(asked):
    model = reader("diff_v2", num_layers=2)
    model.config.sliding_window = 5
    model.config.layer_types = ["sliding_attention", "full_attention"]
    assert facts(model, asked[0], end=None)["windows"] == [5, None]


@pytest.mark.parametrize("attention", ["softmax", "diff_v1"])
def test_the_head_is_the_one_that_looks_most_at_the_answer(attention, asked):
    model, (ids, (first, behind)) = reader(attention), asked
    shares = {}
    for layer in range(model.config.num_hidden_layers):
        for head in range(model.config.output_heads):
            maps = attention_maps(model, torch.tensor([ids]), layer=layer, head=head).maps
            row = torch.tensor(maps.get("map_diff", maps["map_pos"])[-1])
            parts = [row[:1].sum(), row[1:first].sum(), row[first:behind].sum(), row[behind:].sum()]
            shares[layer, head] = parts[2] / sum(map(abs, parts))
    layer, head = max(shares, key=shares.get)
    assert best_head(model, ids, (first, behind)) == {"layer": layer, "head": head}


@pytest.fixture
def saved(tmp_path):
    def save(attention: str, **config):
        model = reader(attention)
        for name, value in config.items():
            setattr(model.config, name, value)
        model.save_pretrained(tmp_path / attention)
        return tmp_path / attention

    return save


def test_models_that_fit_pass(saved):
    check_models([saved("diff_v1"), saved("softmax")], 8)


def test_a_model_that_is_too_large_is_refused_with_its_bytes(saved, monkeypatch):
    folder = saved("diff_v1")
    monkeypatch.setattr("diffattn.demo.subject.LIMIT", 100_000)
    parameters = sum(parameter.numel() for parameter in reader("diff_v1").parameters())
    with pytest.raises(ConfigError) as error:
        check_models([folder], 8)
    assert str(error.value) == (
        f"the weights of diff_v1 take at least {parameters:,} bytes in 8 bits each; wanted at most 100,000 (97.7 KiB) "
        "in a page: --bits 4 or smaller models"
    )
    with pytest.raises(ConfigError, match=r"in a page: one model, or smaller ones$"):
        check_models([folder, folder], 4)
    check_models([folder], 4)
    assert LIMIT == 100_000_000


def test_models_that_no_page_can_run_are_refused(saved, tmp_path):
    with pytest.raises(UnsupportedError, match=r"'llama' is a model of the type 'llama'; wanted .* diffattn convert"):
        check_models([saved("llama")], 8)
    with pytest.raises(UnsupportedError, match="'diff_v1' is an encoder"):
        check_models([saved("diff_v1", is_causal=False)], 8)
    with pytest.raises(CheckpointError):
        check_models([tmp_path / "absent"], 8)


def test_maps_that_cannot_be_subtracted_are_refused(saved):
    with pytest.raises(UnsupportedError, match="have values of their own"):
        check_models([saved("diff_v2", pairs_share_group=False)], 8)


def test_options_of_the_library_are_those_of_the_verb():
    import inspect

    from diffattn.demo.build import build_demo
    from diffattn.demo.options import DemoOptions

    parameters = inspect.signature(build_demo).parameters
    for field in dataclasses.fields(DemoOptions):
        assert parameters[field.name].default == field.default
