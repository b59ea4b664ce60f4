import pytest
from support.served import SENTENCES

from diffattn.data.tokenizer import train_tokenizer
from diffattn.serve.answer_text import Text

TOKENIZER = train_tokenizer(SENTENCES, 320)


def fed(tokens: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], Text]:
    text = Text(TOKENIZER.decode, stop)
    return [text.feed(token, last=at == len(tokens) - 1) for at, token in enumerate(tokens)], text


@pytest.mark.parametrize("text", ["The boat left.", "naïve — 🦁🦁 日本", " led by a space", "\ufffd as such, \ufffd"])
def test_pieces_are_the_text_and_no_piece_has_half_a_character(text):
    pieces, _ = fed(TOKENIZER.encode(text))
    assert "".join(pieces) == text
    assert len([piece for piece in pieces if piece]) > 1
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_are_no_text_are_sent_at_the_end():
    lion = TOKENIZER.encode("🦁")
    assert len(lion) == 4
    pieces, _ = fed(TOKENIZER.encode("a") + lion[:2])
    assert pieces == ["a", "", TOKENIZER.decode(lion[:2])]
    assert pieces[2].startswith("\ufffd")


def test_every_way_to_cut_random_bytes_gives_the_decoded_text():
    tokens = [(7919 * at) % (len(TOKENIZER) - 1) + 1 for at in range(300)]
    for length in range(1, 300, 7):
        assert "".join(fed(tokens[:length])[0]) == TOKENIZER.decode(tokens[:length])


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("winter",), "Nobody had seen the old man since the end of "),
        (("old man since", "seen"), "Nobody had "),
        (("Nobody",), ""),
        (("winters",), None),
        (("r.",), "Nobody had seen the old man since the end of winte"),
        # Begins like what comes before it, and is found all the same.
        (("e en",), "Nobody had seen the old man since th"),
    ],
)
def test_text_ends_before_a_stop_text_which_is_never_sent_in_part(stop, expected):
    sentence = SENTENCES[1]
    pieces, text = fed(TOKENIZER.encode(sentence), stop)
    assert "".join(pieces) == (sentence if expected is None else expected)
    assert text.stopped == (expected is not None)
    sent = ""
    for piece in pieces:
        sent += piece
        assert (sentence if expected is None else expected).startswith(sent)


def test_text_that_could_begin_a_stop_text_waits():
    text = Text(TOKENIZER.decode, ("ab!",))
    sent = [text.feed(token, last=False) for token in TOKENIZER.encode("xab") + TOKENIZER.encode("?")]
    assert "".join(sent) == "xab?"
    # "a" and "b" came out only when the sign behind them was known.
    assert sent[-1].endswith("?")
    assert "a" not in "".join(sent[:-1])
