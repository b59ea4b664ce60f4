"""What one reading of a text finds: the same documents are held out as where all of it is in memory."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffattn.data import survey as survey_module
from diffattn.data.documents import Piece, documents_of
from diffattn.data.survey import Sides, Survey, sides_of
from diffattn.data.text import Corpus, Document, split_by_document
from diffattn.errors import ConfigError, DataError

_DRAW = random.Random(5)


def in_pieces(documents: tuple[Document, ...], size: int = 777) -> Iterator[Piece]:
    for document in documents:
        for start in range(0, len(document.text), size):
            yield Piece(document.name, document.text[start : start + size], last=start + size >= len(document.text))


def held(corpus: Corpus, fraction: float, folder: Path) -> tuple[Sides, list[list[str]]]:
    """The sides of a corpus that comes in pieces, and their texts."""
    found = Survey.make(folder, in_pieces(corpus.documents), lambda read: None)
    assert found.digest == corpus.digest
    sides = sides_of("c", found, lambda: in_pieces(corpus.documents), fraction)
    parts: list[list[str]] = [[], []]
    for number, document in enumerate(documents_of(sides.pieces(in_pieces(corpus.documents)))):
        parts[sides.side(number) == "validation"].append(document.text)
    return sides, parts


@pytest.mark.parametrize("together", [4, 1 << 20], ids=["in many buckets", "in one"])
@pytest.mark.parametrize("fraction", [0.02, 0.2, 0.5])
def test_the_same_documents_are_held_out(fraction: float, together: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(survey_module, "_TOGETHER", together)
    words = [" ".join(_DRAW.choices(["people", "law", "漢字", "🦁"], k=_DRAW.randint(1, 300))) for _ in range(60)]
    # Some of them twice, and one that is too large to be held out.
    words += [*words[:9], "house " * 5000]
    corpus = Corpus.of("c", [Document(str(number), text) for number, text in enumerate(words)])
    split = split_by_document(corpus, validation_fraction=fraction)
    sides, (train, validation) = held(corpus, fraction, tmp_path)
    assert train == [document.text for document in split.train]
    assert validation == [document.text for document in split.validation]
    for side, documents in (("train", split.train), ("validation", split.validation)):
        assert sides.documents[side] == len(documents)
        assert sides.bytes[side] == sum(len(document.text.encode()) for document in documents)
        assert sides.characters[side] == sum(len(document.text) for document in documents)


_LINES = "\n".join(" ".join(_DRAW.choices(["naïve", "law", "漢字", "🦁"], k=9)) for _ in range(400))
_ONE = {
    "paragraphs": _LINES.replace("law\n", "law\n\n"),
    "lines": _LINES,
    "no end at all": "漢" * 5000,
    "a paragraph at the end": "a" * 4000 + "\n\n",
    "two characters": "漢🦁",
}


@pytest.mark.parametrize("near", [500, 1 << 22], ids=["longer than memory", "short"])
@pytest.mark.parametrize("name", _ONE)
@pytest.mark.parametrize("copies", [1, 3])
def test_one_text_is_cut_at_the_same_place(copies: int, name: str, near: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(survey_module, "_NEAR", near)
    corpus = Corpus.of("c", [Document(str(number), _ONE[name]) for number in range(copies)])
    for fraction in (0.02, 0.3):
        split = split_by_document(corpus, validation_fraction=fraction)
        sides, parts = held(corpus, fraction, tmp_path)
        assert parts == [[split.train[0].text], [split.validation[0].text]]
        assert sides.note == split.note
        assert sides.bytes == {"train": len(parts[0][0].encode()), "validation": len(parts[1][0].encode())}
        assert sides.characters == {"train": len(parts[0][0]), "validation": len(parts[1][0])}


def test_what_cannot_be_split_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a: only one character"):
        held(Corpus.of("c", [Document("a", "x")]), 0.02, tmp_path)
    with pytest.raises(ConfigError, match=r"validation_fraction is 0\.7"):
        held(Corpus.of("c", [Document("a", "xy")]), 0.7, tmp_path)


def test_a_survey_is_read_back_only_if_it_is_whole(tmp_path: Path) -> None:
    corpus = Corpus.of("c", [Document(str(number), f"text {number}") for number in range(9)])
    made = Survey.make(tmp_path, in_pieces(corpus.documents), lambda read: None)
    found = Survey.read(tmp_path)
    assert found is not None
    assert (found.digest, found.equal) == (made.digest, False)
    assert found.documents.tobytes() == made.documents.tobytes()
    file = tmp_path / "documents.bin"
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    assert Survey.read(tmp_path) is None
    assert Survey.read(tmp_path / "nothing") is None


@pytest.mark.parametrize("change", ["other", "fewer", "more"])
def test_another_text_is_noticed(change: str, tmp_path: Path) -> None:
    documents = tuple(Document(str(number), f"text {number}") for number in range(9))
    found = Survey.make(tmp_path, in_pieces(documents), lambda read: None)
    others = {
        "other": (*documents[:4], Document("4", "text x"), *documents[5:]),
        "fewer": documents[:-1],
        "more": (*documents, documents[0]),
    }
    assert len(list(found.verified("c", in_pieces(documents)))) == 9
    with pytest.raises(DataError, match="the text changed while it was prepared"):
        list(found.verified("c", in_pieces(others[change])))
