import dataclasses
import math

import pytest
import torch
from support.small_folders import TOKENS, small_folder, small_tokenizer
from support.small_models import SHAPE, small_model
from transformers import GenerationConfig

from diffattn.errors import CheckpointError, ConfigError
from diffattn.generate.decoding import Decoding
from diffattn.generate.generation import continue_text, generate
from diffattn.model.options import DECODING
from diffattn.variants import DEFAULT_VARIANTS

PROMPT = "lower löwe"
TEMPLATE = "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}[reply]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def loaded():
    return small_model("diff_v1", shape=dataclasses.replace(SHAPE, vocab_size=TOKENS)), small_tokenizer()


@torch.no_grad()
def greedy_tokens(model, ids: list[int], count: int) -> list[int]:
    """From a forward pass over everything for each token: no cache, no generate."""
    new: list[int] = []
    for _ in range(count):
        new.append(int(model(torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax()))
    return new


def dictate(model, tokens: list[int]) -> None:
    """Make these the likeliest tokens, one after another."""
    script = iter(tokens)

    def say(module, args, output):
        output.logits[:] = 0
        output.logits[:, -1, next(script)] = 1
        return output

    model.register_forward_hook(say)


@pytest.mark.parametrize("attention", DEFAULT_VARIANTS)
def test_the_text_is_that_of_the_likeliest_tokens(attention, tmp_path):
    folder = small_folder(tmp_path, attention)
    pieces: list[str] = []
    result = generate(folder, PROMPT, Decoding(max_new_tokens=21), device="cpu", on_text=pieces.append)
    tokenizer = small_tokenizer()
    ids = tokenizer(PROMPT)["input_ids"]
    model = small_model(attention, shape=dataclasses.replace(SHAPE, vocab_size=TOKENS))
    new = greedy_tokens(model, ids, 21)
    assert result.text == tokenizer.decode(new, skip_special_tokens=True)
    assert (result.prompt, result.prompt_tokens, result.new_tokens) == (PROMPT, len(ids), 21)
    assert "".join(pieces) == result.text
    assert len(pieces) > 3
    assert 0 < result.first_token_seconds < result.seconds
    assert result.tokens_per_second == pytest.approx(20 / (result.seconds - result.first_token_seconds))
    assert result.load_seconds > 0
    assert result.weight_bytes == sum(p.nbytes for p in model.parameters())


def test_text_comes_while_the_model_still_runs(loaded):
    model, tokenizer = loaded
    passes = 0

    def count(*_):
        nonlocal passes
        passes += 1

    model.register_forward_pre_hook(count)
    seen = []
    continue_text(model, tokenizer, PROMPT, Decoding(max_new_tokens=20), on_text=lambda text: seen.append(passes))
    assert passes == 20
    # No piece waits for more than the bytes of its character.
    assert len(set(seen)) > 5
    assert seen[0] <= 4


def test_half_a_character_waits_for_its_other_half_and_is_given_at_the_end(loaded):
    model, tokenizer = loaded
    wanted = tokenizer("é漢low")["input_ids"] + tokenizer("漢")["input_ids"][:2]
    dictate(model, wanted)
    pieces: list[str] = []
    result = continue_text(model, tokenizer, PROMPT, Decoding(max_new_tokens=len(wanted)), on_text=pieces.append)
    assert result.text == "".join(pieces) == tokenizer.decode(wanted)
    assert pieces[:2] == ["é", "漢"]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces[:-1])
    assert "\N{REPLACEMENT CHARACTER}" in pieces[-1]


def test_a_seed_repeats_a_drawn_text_and_leaves_the_callers_random_numbers_alone(folder):
    def draw(seed: int) -> str:
        return generate(folder, PROMPT, Decoding(temperature=1.0, seed=seed, max_new_tokens=15), device="cpu").text

    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    texts = [draw(0), draw(0), draw(1)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert texts[0] == texts[1] != texts[2]
    greedy = generate(folder, PROMPT, Decoding(max_new_tokens=15), device="cpu").text
    assert generate(folder, PROMPT, Decoding(temperature=1.0, top_k=1, max_new_tokens=15), device="cpu").text == greedy
    assert greedy not in texts


@pytest.mark.parametrize("cache", ["static", "quantized"])
@pytest.mark.usefixtures("uncompiled")
def test_a_cache_by_name_is_used(cache, loaded, monkeypatch):
    model, tokenizer = loaded
    forward, used = type(model).forward, []

    def recording(self, *args, **kwargs):
        used.append(type(kwargs.get("cache", kwargs.get("past_key_values"))).__name__)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", recording)
    result = continue_text(model, tokenizer, PROMPT, Decoding(cache=cache, max_new_tokens=5))
    assert set(used) == {{"static": "StaticCache", "quantized": "QuantizedCache"}[cache]}
    expected = continue_text(model, tokenizer, PROMPT, Decoding(max_new_tokens=5))
    assert used[-1] == "DynamicCache"
    if cache == "static":
        assert result.text == expected.text


def test_beams_give_their_likeliest_text_once(loaded):
    model, tokenizer = loaded
    pieces: list[str] = []
    result = continue_text(model, tokenizer, PROMPT, Decoding(num_beams=3, max_new_tokens=6), on_text=pieces.append)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    expected = model.generate(ids, num_beams=3, do_sample=False, max_new_tokens=6)[0, ids.shape[1] :]
    assert pieces == [result.text] == [tokenizer.decode(expected)]
    assert result.first_token_seconds is None
    assert result.tokens_per_second is None
    assert result.new_tokens == 6


def test_an_assistants_drafts_change_no_token(folder, tmp_path):
    assistant = small_folder(tmp_path, "diff_v2", seed=3)
    texts = {
        generate(folder, PROMPT, Decoding(max_new_tokens=20), device="cpu", assistant=drafts).text
        for drafts in (None, folder, assistant)
    }
    assert len(texts) == 1


def test_an_assistant_with_another_tokenizer_or_with_beams_is_refused(folder, tmp_path):
    other = small_folder(tmp_path, tokens=290)
    with pytest.raises(CheckpointError, match=r"the tokenizer of the assistant .* is not that of"):
        generate(folder, PROMPT, device="cpu", assistant=other)
    for decoding in (Decoding(num_beams=2), Decoding(cache="static"), Decoding(cache="quantized")):
        with pytest.raises(ConfigError, match="beside an assistant"):
            generate(folder, PROMPT, decoding, assistant=folder)


def test_the_prompt_goes_into_the_chat_template(loaded):
    model, tokenizer = loaded
    with pytest.raises(ConfigError, match="has no chat template"):
        continue_text(model, tokenizer, "low", chat=True)
    tokenizer.chat_template = TEMPLATE
    chatted = continue_text(model, tokenizer, "low", Decoding(max_new_tokens=9), chat=True)
    written = continue_text(model, tokenizer, "[user]low[reply]", Decoding(max_new_tokens=9))
    assert chatted.prompt_tokens == written.prompt_tokens
    assert chatted.text == written.text


def test_of_a_checkpoints_own_habits_only_the_end_tokens_count(loaded):
    model, tokenizer = loaded
    ids = tokenizer(PROMPT)["input_ids"]
    plain = greedy_tokens(model, ids, 12)
    end = plain[5]
    assert end not in plain[:5]
    own = GenerationConfig(eos_token_id=[end, 7], repetition_penalty=9.0, do_sample=True, temperature=5.0, max_length=3)
    model.generation_config = own
    result = continue_text(model, tokenizer, PROMPT, Decoding(max_new_tokens=12))
    assert result.new_tokens == 6
    assert result.text == tokenizer.decode(plain[:6])
    assert model.generation_config is own


def test_a_text_ends_at_the_tokenizers_end_where_the_checkpoint_names_none(loaded):
    model, tokenizer = loaded
    assert model.generation_config.eos_token_id is None
    said = tokenizer("lower")["input_ids"]
    dictate(model, [*said, tokenizer.eos_token_id, *said])
    result = continue_text(model, tokenizer, PROMPT, Decoding(max_new_tokens=12))
    assert (result.text, result.new_tokens) == ("lower", len(said) + 1)


def test_a_prompt_that_the_model_cannot_go_on_from_is_refused(loaded):
    model, tokenizer = loaded
    count = len(tokenizer(PROMPT)["input_ids"])
    room = SHAPE.max_position_embeddings - count
    model.generation_config = GenerationConfig(eos_token_id=TOKENS - 1)
    assert continue_text(model, tokenizer, PROMPT, Decoding(max_new_tokens=room)).prompt_tokens == count
    with pytest.raises(ConfigError, match=f"at most 89 together, .* take max_new_tokens of at most {room}"):
        continue_text(model, tokenizer, PROMPT, Decoding(max_new_tokens=room + 1))
    with pytest.raises(ConfigError, match="take a shorter prompt"):
        continue_text(model, tokenizer, "x" * 89)
    for prompt, message in (("", "the prompt is empty"), ("low\udcff", "character 3 of the prompt is no text")):
        with pytest.raises(ConfigError, match=message):
            continue_text(model, tokenizer, prompt)
    fewer = small_model("diff_v1")
    with pytest.raises(CheckpointError, match="and the model knows 71; wanted the model's own tokenizer"):
        continue_text(fewer, tokenizer, PROMPT)


NO_NUMBERS = (True, "1", None, float("nan"), float("inf"), float("-inf"), 10**400, -(10**400))


@pytest.mark.parametrize("name", DECODING)
def test_each_number_is_taken_to_both_ends_of_its_range_and_the_error_says_that_range(name):
    wanted = DECODING[name]
    # Filters and beams have their own rule about the temperature.
    beside = {"temperature": 1.0} if name in ("top_p", "top_k", "min_p") else {}
    if wanted.whole:
        inside, outside = (wanted.lowest, wanted.highest), (wanted.lowest - 1, wanted.highest + 1, 1.5)
    else:
        least = math.nextafter(wanted.lowest, math.inf) if wanted.above else wanted.lowest
        inside = (least, wanted.highest)
        outside = (math.nextafter(least, -math.inf), math.nextafter(wanted.highest, math.inf))
    for value in inside:
        assert getattr(Decoding(**{name: value, **beside}), name) == value
    for value in (*outside, *NO_NUMBERS):
        with pytest.raises(ConfigError, match=f"^{name} is ") as caught:
            Decoding(**{name: value, **beside})
        assert f"; wanted {wanted}: " in str(caught.value)


def test_a_cache_of_another_name_is_refused():
    with pytest.raises(ConfigError, match="cache is 'paged'; wanted one of dynamic, static, quantized"):
        Decoding(cache="paged")


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-40, 9.9e-6, 1e-5, 1e-4])
def test_a_temperature_next_to_nothing_is_greedy(loaded, temperature):
    model, tokenizer = loaded
    greedy = continue_text(model, tokenizer, PROMPT, Decoding(max_new_tokens=9)).text
    for filters in ({}, {"top_p": 5e-324, "top_k": 3, "min_p": 1.0}):
        cold = Decoding(max_new_tokens=9, temperature=temperature, **filters)
        assert continue_text(model, tokenizer, PROMPT, cold).text == greedy


def test_numbers_at_the_ends_of_their_ranges_give_a_text(loaded):
    model, tokenizer = loaded
    for options in (
        {"temperature": 100.0, "seed": 2**63 - 1, "top_k": 2**31 - 1},
        {"temperature": 100.0, "repetition_penalty": 100.0},
        {"repetition_penalty": 0.01},
    ):
        assert continue_text(model, tokenizer, PROMPT, Decoding(max_new_tokens=9, **options)).new_tokens == 9


def test_a_repetition_penalty_and_min_p_reach_the_model(loaded):
    model, tokenizer = loaded
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    expected = model.generate(ids, do_sample=False, max_new_tokens=9, repetition_penalty=1.8)[0, ids.shape[1] :]
    penalised = continue_text(model, tokenizer, PROMPT, Decoding(max_new_tokens=9, repetition_penalty=1.8)).text
    greedy = continue_text(model, tokenizer, PROMPT, Decoding(max_new_tokens=9)).text
    assert penalised == tokenizer.decode(expected) != greedy
    only_the_likeliest = Decoding(max_new_tokens=9, temperature=1.0, min_p=1.0)
    assert continue_text(model, tokenizer, PROMPT, only_the_likeliest).text == greedy


def test_options_that_exclude_each_other_are_refused():
    with pytest.raises(ConfigError, match=r"top_p is 0\.5 and temperature is 0"):
        Decoding(top_p=0.5)
    with pytest.raises(ConfigError, match="top_k is 5 and temperature is 0"):
        Decoding(top_k=5)
    with pytest.raises(ConfigError, match=r"min_p is 0\.1 and temperature is 0"):
        Decoding(min_p=0.1)
    with pytest.raises(ConfigError, match=r"num_beams is 2 and temperature is 0\.7"):
        Decoding(temperature=0.7, num_beams=2)
