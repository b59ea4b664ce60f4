"""Pieces of text, repeats and needles: the same ones again, short ones first, and none in what is held out."""

import itertools
import re

import numpy as np
import pytest
import torch
from data.test_needles import TEXT

from diffattn.data.blocks import TrainingOrder
from diffattn.data.mixture import STAGES, MixedOrder, with_needles
from diffattn.data.packing import prepare_data
from diffattn.data.text import Corpus, Document
from diffattn.errors import ConfigError, DataError

CORPUS = Corpus.of("text", [Document(str(number), f"{TEXT} Number {number} ends.") for number in range(30)])
CONTEXT = 512
SAMPLES = 400


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return prepare_data(CORPUS, vocab_size=400, context=CONTEXT, cache_dir=tmp_path_factory.mktemp("cache"))


def mixed(plain, share=0.5, **options):
    return with_needles(plain, CORPUS, share=share, **{"most_needles": 4} | options)


def ordered(data, seed=0, num_samples=SAMPLES, batch_size=4) -> MixedOrder:
    return data.order(seed=seed, num_samples=num_samples, batch_size=batch_size)


def kind(data, piece: torch.Tensor) -> str:
    if "magic number" in data.tokenizer.decode(piece):
        return "needles"
    ids = piece.tolist()
    periods = range(3, len(ids) // 2 + 1)
    return "repeats" if any(ids[period:] == ids[:-period] for period in periods) else "text"


def test_pieces_grow_over_a_run_and_a_step_is_of_one_stage(plain):
    order = ordered(mixed(plain))
    shapes = [tuple(order[index]["input_ids"].shape) for index in range(len(order))]
    assert all(pieces * length == CONTEXT for pieces, length in shapes)
    lengths = [length for _, length in shapes]
    assert list(dict.fromkeys(lengths)) == [16, 32, 64, 128, 256, CONTEXT]
    assert lengths == sorted(lengths)
    assert all(len(set(lengths[step : step + 4])) == 1 for step in range(0, len(lengths), 4))
    ends = [0.0, *(stage.until for stage in STAGES if stage.piece != CONTEXT)]
    wanted = [round(SAMPLES * (after - before)) for before, after in itertools.pairwise(ends)]
    assert [lengths.count(length) for length in dict.fromkeys(lengths)] == pytest.approx(wanted, abs=4)


def test_the_shares_are_those_that_were_asked_for(plain):
    data = mixed(plain, share=0.6)
    order = ordered(data)
    kinds = [[kind(data, piece) for piece in order[index]["input_ids"]] for index in range(len(order))]
    text = sum(each.count("text") / len(each) for each in kinds)
    assert text / SAMPLES == pytest.approx(0.4, abs=0.04)
    early, late = kinds[: int(0.46 * SAMPLES)], kinds[int(0.66 * SAMPLES) :]
    assert {name for each in early for name in each} == {"text", "repeats"}
    # Both kinds in every step, so that no step unlearns what another has taught.
    assert sum(len(set(each)) == 2 for each in early) > 0.9 * len(early)
    needles = sum(each.count("needles") for each in late)
    assert needles / sum(map(len, late)) == pytest.approx(0.6 * STAGES[-1].needles, abs=0.12)


def test_repeats_have_periods_that_fit_and_few_different_tokens_at_first(plain):
    mixture = mixed(plain).mixture
    random = np.random.default_rng(0)
    for length in (16, 64, 512):
        found = set()
        for _ in range(200):
            ids = mixture.repeats(random, length).tolist()
            assert len(ids) == length
            periods = [period for period in range(1, length) if ids[period:] == ids[:-period]]
            found.add(periods[0])
        assert length // 6 - 1 <= min(p for p in found if p > 2) <= max(found) <= length // 2
        assert len(found) > 3
    drawn = [mixture.repeats(random, 16).tolist() for _ in range(400)]
    assert len({token for ids in drawn for token in ids}) <= 256
    assert {str(digit) for digit in range(10)} <= set(plain.tokenizer.decode([token for ids in drawn for token in ids]))
    of_digits = sum(plain.tokenizer.decode(ids).isdecimal() for ids in drawn)
    assert of_digits / len(drawn) == pytest.approx(0.25, abs=0.08)
    needle = plain.tokenizer(" The magic number of Lima is 48219.", add_special_tokens=False)["input_ids"]
    assert set(needle) <= {token for ids in drawn for token in ids}


def test_needle_documents_are_whole_and_ask_for_what_they_hide(plain):
    data = mixed(plain)
    random = np.random.default_rng(1)
    documents = []
    for _ in range(30):
        decoded = data.tokenizer.decode(data.mixture.needles(random, CONTEXT))
        parts = [part for part in decoded.split("<|endoftext|>") if part]
        assert decoded.count("<|endoftext|>") == 2 * len(parts)
        documents.append(len(parts))
        for part in parts:
            context, *questions = part.split("\n\n")
            hidden = re.findall(r"The magic number of \w+ is (\d{5})\.", context)
            assert hidden
            assert sorted(hidden) == sorted(re.findall(r"\d{5}", " ".join(questions)))
    assert set(documents) >= {1, 2}


def test_a_sample_depends_on_seed_and_index_alone(plain):
    first, again, other = ordered(mixed(plain)), ordered(mixed(plain)), ordered(mixed(plain), seed=1)
    for index in (399, 0, 170, 288):
        assert torch.equal(first[index]["input_ids"], again[index]["input_ids"])
        assert torch.equal(first[index]["labels"], first[index]["input_ids"])
    assert any(not torch.equal(first[index]["input_ids"], other[index]["input_ids"]) for index in range(4))


def test_a_piece_of_text_is_that_piece_of_the_block_that_it_would_be_alone(plain):
    data = mixed(plain)
    order, alone = ordered(data), TrainingOrder(plain.train, seed=0, num_samples=SAMPLES)
    same = 0
    for index in range(0, SAMPLES, 5):
        pieces = order[index]["input_ids"]
        for piece, text in zip(pieces, alone[index]["input_ids"].view(pieces.shape), strict=True):
            assert torch.equal(piece, text) == (kind(data, piece) == "text")
            same += torch.equal(piece, text)
    assert same > 300


def test_held_out_text_stays_and_the_digest_says_what_is_mixed(plain):
    data = mixed(plain)
    assert data.validation is plain.validation
    digests = {each.facts["digest"] for each in (plain, data, mixed(plain, share=0.4), mixed(plain, most_queries=1))}
    assert len(digests) == 4
    assert mixed(plain).facts == data.facts


def test_no_share_is_the_text_alone_and_a_wrong_one_is_refused(plain):
    assert mixed(plain, share=0) is plain
    for share in (-0.1, 1.0, 1.5):
        with pytest.raises(ConfigError, match="needles is"):
            mixed(plain, share=share)


def test_a_context_that_no_power_of_two_divides_is_not_cut(tmp_path):
    odd = prepare_data(CORPUS, vocab_size=400, context=300, cache_dir=tmp_path)
    order = ordered(mixed(odd))
    assert {tuple(order[index]["input_ids"].shape) for index in range(0, SAMPLES, 7)} == {(1, 300)}


def test_what_cannot_hold_a_needle_is_refused(tmp_path):
    short = prepare_data(CORPUS, vocab_size=400, context=40, cache_dir=tmp_path)
    with pytest.raises(ConfigError, match="wanted a context of at least"):
        mixed(short)
    with pytest.raises(DataError, match="wanted text of several sentences"):
        with_needles(short, Corpus.of("a", [Document("a", "none here")]), share=0.5)
