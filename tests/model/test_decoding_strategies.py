"""Every way of decoding gives, or is distributed as, what forward passes without a cache say."""

import dataclasses
import itertools

import pytest
import torch
from scipy import stats
from support.small_models import SHAPE, assert_same_logits, small_model, tokens
from torch import Tensor
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, QuantizedCache

from diffattn.variants import DEFAULT_VARIANTS

# Few enough tokens to look at every text of some tokens.
FEW = dataclasses.replace(SHAPE, vocab_size=11, num_layers=2)
# Heads as wide as a group of quantised numbers, of which each has a scale.
WIDE = dataclasses.replace(SHAPE, head_dim=16, num_layers=2)
SAMPLES = 700


@torch.no_grad()
def next_log_p(model, ids: Tensor) -> Tensor:
    """(B, vocabulary), from a forward pass over everything."""
    return model(ids, use_cache=False).logits[:, -1].double().log_softmax(-1)


def greedy(model, ids: Tensor, count: int) -> Tensor:
    for _ in range(count):
        ids = torch.cat([ids, next_log_p(model, ids).argmax(-1, keepdim=True)], dim=1)
    return ids


def generate(model, ids: Tensor, count: int, **options):
    """Not drawn; with a mask of its own, since some prompts hold the padding's id."""
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0,
        disable_compile=True, **options,
    )  # fmt: skip


def filtered(log_p: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """What is left of one distribution: the top_k likeliest, and of these as few as hold top_p of the probability."""
    p = (log_p / temperature).softmax(-1)
    order = p.argsort(descending=True)
    kept = order[: top_k or None]
    before = (p[kept] / p[kept].sum()).cumsum(-1).roll(1)
    before[0] = 0
    kept = kept[before < top_p]
    return torch.zeros_like(p).index_add(0, kept, p[kept]) / p[kept].sum()


def pairs_of(model, prompt: Tensor, options: dict) -> Tensor:
    """(vocabulary, vocabulary): the probability of every first and second token."""
    first = filtered(next_log_p(model, prompt[None])[0], **options)
    every = torch.cat([prompt.expand(len(first), -1), torch.arange(len(first))[:, None]], dim=1)
    second = torch.stack([filtered(row, **options) for row in next_log_p(model, every)])
    return first[:, None] * second


def p_value(counts: Tensor, expected_p: Tensor) -> float:
    """Of the chi-square test; pairs that are too rare for it count as one."""
    counts, expected = counts.flatten(), expected_p.flatten() * counts.sum()
    if bool((counts[expected == 0] > 0).any()):
        return 0.0
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
    possible = wanted > 0
    return float(stats.chisquare(observed[possible], wanted[possible]).pvalue)


SAMPLING = {
    "plain": ({"temperature": 1.0, "top_k": 0, "top_p": 1.0}, "dynamic"),
    "warm, few": ({"temperature": 1.4, "top_k": 5, "top_p": 1.0}, "static"),
    "cool, likeliest": ({"temperature": 0.8, "top_k": 0, "top_p": 0.8}, "static"),
    "all three": ({"temperature": 0.9, "top_k": 7, "top_p": 0.9}, "dynamic"),
}


@pytest.mark.parametrize(("options", "cache"), SAMPLING.values(), ids=list(SAMPLING))
@pytest.mark.parametrize("attention", DEFAULT_VARIANTS)
def test_drawn_tokens_of_a_left_padded_batch_are_distributed_as_the_uncached_model_says(attention, options, cache):
    model = small_model(attention, shape=FEW)
    prompts = [tokens(1, length, seed=length)[0] % FEW.vocab_size for length in (3, 5)]
    padded = torch.stack([torch.nn.functional.pad(prompt, (5 - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([(torch.arange(5) >= 5 - len(prompt)).long() for prompt in prompts])
    torch.manual_seed(0)
    drawn = model.generate(
        padded.repeat_interleave(SAMPLES, 0), attention_mask=mask.repeat_interleave(SAMPLES, 0), do_sample=True,
        max_new_tokens=2, pad_token_id=0, disable_compile=True, cache_implementation=cache, **options,
    )[:, 5:]  # fmt: skip
    stranger = small_model({"softmax": "diff_v2"}.get(attention, "softmax"), shape=FEW)
    for prompt, rows in zip(prompts, drawn.split(SAMPLES), strict=True):
        counts = torch.zeros(FEW.vocab_size, FEW.vocab_size).index_put(
            tuple(rows.T), torch.ones(SAMPLES), accumulate=True
        )
        assert p_value(counts, pairs_of(model, prompt, options)) > 1e-3
        # The test has the power to tell another temperature, other filters and another variant apart.
        for other in ({"temperature": 0.5 * options["temperature"]}, {"top_p": 0.6}, {"top_k": 3}):
            assert p_value(counts, pairs_of(model, prompt, options | other)) < 1e-6
        assert p_value(counts, pairs_of(stranger, prompt, options)) < 1e-6


def beams_by_hand(model, prompt: Tensor, beams: int, length: int) -> tuple[list[list[int]], list[float]]:
    kept = [([], 0.0)]
    for _ in range(length):
        ids = torch.stack([torch.cat([prompt, torch.tensor(text, dtype=torch.long)]) for text, _ in kept])
        log_p = next_log_p(model, ids)
        longer = [
            ([*text, token], score + float(row[token]))
            for (text, score), row in zip(kept, log_p, strict=True)
            for token in range(len(row))
        ]
        kept = sorted(longer, key=lambda beam: -beam[1])[:beams]
    return [text for text, _ in kept], [score for _, score in kept]


def beams_by_generate(model, prompts: Tensor, beams: int, length: int, **options):
    found = generate(
        model, prompts, length, num_beams=beams, num_return_sequences=beams, length_penalty=0.0, output_scores=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    texts = found.sequences[:, prompts.shape[1] :].unflatten(0, (-1, beams))
    return texts, found.sequences_scores.unflatten(0, (-1, beams))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("attention", DEFAULT_VARIANTS)
def test_beams_are_the_likeliest_prefixes_at_every_step(attention, cache):
    model, prompts = small_model(attention, shape=FEW), tokens(2, 5) % FEW.vocab_size
    texts, scores = beams_by_generate(model, prompts, 3, 4, cache_implementation=cache)
    for row, prompt in enumerate(prompts):
        by_hand, wanted = beams_by_hand(model, prompt, 3, 4)
        assert texts[row].tolist() == by_hand
        torch.testing.assert_close(scores[row].double(), torch.tensor(wanted).double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("attention", DEFAULT_VARIANTS)
def test_beams_enough_for_every_text_find_the_likeliest_of_all(attention):
    model, prompt = small_model(attention, shape=FEW), tokens(1, 5) % FEW.vocab_size
    count = FEW.vocab_size**2
    texts, _ = beams_by_generate(model, prompt, count, 3)
    every = torch.tensor(list(itertools.product(range(FEW.vocab_size), repeat=3)))
    with torch.no_grad():
        log_p = model(torch.cat([prompt.expand(len(every), -1), every], dim=1)).logits.double().log_softmax(-1)
    likelihood = log_p[:, 4:-1].gather(-1, every[..., None]).sum((1, 2))
    best = likelihood.topk(20).indices
    assert texts[0, :20].tolist() == every[best].tolist()


def dequantised(cache: QuantizedCache, config) -> DynamicCache:
    """A cache of ordinary numbers with what a quantised one stands for."""
    plain = DynamicCache(config=config)
    for index, layer in enumerate(cache.layers):
        held = []
        for old, new in ((layer._quantized_keys, layer.keys), (layer._quantized_values, layer.values)):
            old = layer._dequantize(old)
            held.append(torch.cat([old, new], dim=-2) if new.dim() == 4 else old)
        plain.update(*held, index)
    return plain


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("attention", DEFAULT_VARIANTS)
@torch.no_grad()
def test_a_quantised_cache_gives_what_its_dequantised_numbers_give(attention):
    model, ids = small_model(attention, shape=WIDE), tokens(2, 13)
    exact = model(ids, use_cache=False).logits
    errors = {}
    for nbits in (4, 2):
        cache = QuantizedCache("quanto", model.config, nbits=nbits, q_group_size=16, residual_length=4)
        model(ids[:, :6], past_key_values=cache)
        errors[nbits] = 0.0
        for position in range(6, 13):
            one, plain = ids[:, position : position + 1], dequantised(cache, model.config)
            assert plain.get_seq_length() == position
            logits = model(one, past_key_values=cache).logits
            assert_same_logits(logits, model(one, past_key_values=plain).logits)
            errors[nbits] = max(errors[nbits], float((logits[:, 0] - exact[:, position]).abs().max()))
    # It is quantised; with 4 bits the logits, whose spread is about 1.2, stay near, with 2 bits they do not.
    assert 1e-2 < errors[4] < 1.0 < errors[2]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("attention", DEFAULT_VARIANTS)
def test_greedy_decoding_from_a_quantised_cache_follows_its_dequantised_numbers(attention):
    model, ids = small_model(attention, shape=WIDE), tokens(2, 8)
    settings = {"backend": "quanto", "nbits": 2, "q_group_size": 16, "residual_length": 4}
    found = generate(model, ids, 9, cache_implementation="quantized", cache_config=settings)
    cache = QuantizedCache(config=model.config, **settings)
    expected = ids
    with torch.no_grad():
        new = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        for _ in range(9):
            expected = torch.cat([expected, new], dim=1)
            plain = dequantised(cache, model.config)
            model(new, past_key_values=cache)
            new = model(new, past_key_values=plain).logits[:, -1:].argmax(-1)
    assert torch.equal(found, expected)
    assert not torch.equal(found, greedy(model, ids, 9))


def counted(model) -> list[int]:
    """Lengths of what the model is called with, from now on."""
    lengths: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return lengths


@pytest.mark.parametrize("assistant", ["itself", *DEFAULT_VARIANTS])
@pytest.mark.parametrize("attention", DEFAULT_VARIANTS)
def test_drafts_of_an_assistant_change_no_token(attention, assistant):
    model, ids = small_model(attention), tokens(1, 9)
    expected = greedy(model, ids, 12)
    shallow = dataclasses.replace(SHAPE, num_layers=1)
    draft = small_model(attention) if assistant == "itself" else small_model(assistant, shape=shallow, seed=2)
    lengths = counted(model)
    found = generate(model, ids, 12, assistant_model=draft)
    assert torch.equal(found, expected)
    # Drafts were checked several at a time; where they are the model's own they are taken.
    assert max(lengths[1:]) > 1
    assert (len(lengths) < 12) if assistant == "itself" else (len(lengths) <= 12)


@pytest.mark.parametrize("attention", ["diff_v1", "diff_v2"])
def test_drawn_tokens_checked_by_the_model_are_distributed_as_it_says_and_not_as_the_assistant_does(attention):
    model, draft = small_model(attention, shape=FEW), small_model("softmax", shape=FEW, seed=2)
    prompt = tokens(1, 5)[0] % FEW.vocab_size
    torch.manual_seed(0)
    counts, draws = torch.zeros(FEW.vocab_size, FEW.vocab_size), 300
    for _ in range(draws):
        found = model.generate(
            prompt[None], attention_mask=torch.ones(1, 5, dtype=torch.long), do_sample=True, max_new_tokens=2,
            pad_token_id=0, top_k=0, assistant_model=draft,
        )  # fmt: skip
        counts[tuple(found[0, 5:])] += 1
    plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    assert p_value(counts, pairs_of(model, prompt, plain)) > 1e-3
    assert p_value(counts, pairs_of(draft, prompt, plain)) < 1e-6


@pytest.mark.parametrize("attention", DEFAULT_VARIANTS)
def test_drafts_looked_up_in_the_prompt_change_no_token(attention):
    model = small_model(attention)
    # Its own continuation, so that what is looked up is taken.
    ids = greedy(model, tokens(1, 9), 14)
    prompt = torch.cat([ids, ids[:, :9]], dim=1)
    expected = greedy(model, prompt, 12)
    lengths = counted(model)
    found = generate(model, prompt, 12, prompt_lookup_num_tokens=4)
    assert torch.equal(found, expected)
    assert max(lengths[1:]) > 1


@pytest.mark.parametrize("attention", DEFAULT_VARIANTS)
def test_an_engine_with_shared_prefixes_gives_every_request_its_own_greedy_tokens(attention):
    model = small_model(attention, shape=dataclasses.replace(SHAPE, num_layers=2))
    prefix = tokens(1, 9, seed=5)[0].tolist()
    # More than the engine's blocks and tokens hold at once, so that requests wait for others to end.
    prompts = [prefix + tokens(1, 1 + index % 4, seed=index)[0].tolist() for index in range(8)]
    alone = [greedy(model, torch.tensor([prompt]), 5)[0, len(prompt) :].tolist() for prompt in prompts]
    assert len({tuple(text) for text in alone}) > 5
    config = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=-1)
    processed = {}
    lengths = counted(model)
    for sharing in (True, False):
        engine = ContinuousBatchingConfig(
            page_size=4, num_blocks=12, max_batch_tokens=16, allow_block_sharing=sharing, use_async_batching=False
        )
        lengths.clear()
        results = model.generate_batch(prompts, generation_config=config, continuous_batching_config=engine)
        assert [results[key].generated_tokens for key in sorted(results, key=_number)] == alone
        processed[sharing] = sum(lengths)
    # Whole pages of the prefix were not computed again.
    assert processed[True] < processed[False]
    assert processed[False] >= sum(len(prompt) for prompt in prompts) + 4 * len(prompts)


def _number(key: str) -> int:
    return int(key.rpartition("_")[2])
