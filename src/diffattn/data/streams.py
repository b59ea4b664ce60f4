"""Reads a file from its beginning to its end, unpacked and decoded as UTF-8, in memory that does not grow with it."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any, Protocol, cast

from diffattn.errors import DataError, one_line
from diffattn.files import shown

# The bytes that are read at once. Blocks of a megabyte leave gaps between what is kept, which add up to 200 MB.
_CHUNK = 2**16
LONGEST = 2**27
"""The most characters of a line of JSON, and of a cell of a table: such a row is held in memory as a whole."""


class _Readable(Protocol):
    """A source of bytes."""

    def read(self, size: int, /) -> bytes:
        """Returns at most ``size`` bytes; none at the end."""


class Bytes:
    """Bytes that are read once, with a look at those that come next.

    Args:
        source: returns at most as many bytes as it is asked for; none at the end.
        packed: whether they are unpacked from others.
    """

    closed = False
    """Libraries that read from it ask for this, and call ``close``."""

    def __init__(self, source: Callable[[int], bytes], *, packed: bool = False) -> None:
        self._source = source
        self.packed = packed
        self._ahead = b""

    def close(self) -> None:
        """Does nothing: who opened the file closes it."""

    def peek(self, size: int) -> bytes:
        """Returns the next ``size`` bytes, or all if there are fewer; they will be read again."""
        while len(self._ahead) < size and (more := self._source(size - len(self._ahead))):
            self._ahead += more
        return self._ahead[:size]

    def read(self, size: int) -> bytes:
        """Returns at least one byte and at most ``size``; none at the end."""
        if self._ahead:
            found, self._ahead = self._ahead[:size], self._ahead[size:]
            return found
        return self._source(size)


def _gzip(packed: Any) -> _Readable:
    return gzip.GzipFile(fileobj=packed, mode="rb")


def _zstd(packed: Any) -> _Readable:
    # The standard library has zstd only from Python 3.14 on; pyarrow comes with datasets.
    import pyarrow

    return cast(_Readable, pyarrow.CompressedInputStream(pyarrow.PythonFile(packed, mode="r"), "zstd"))


# For each ending: the first bytes of the content, and what unpacks it.
_PACKED: dict[str, tuple[re.Pattern[bytes], Callable[[Any], _Readable]]] = {
    ".gz": (re.compile(rb"\x1f\x8b"), _gzip),
    ".xz": (re.compile(rb"\xfd7zXZ\x00"), lzma.LZMAFile),
    ".bz2": (re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"), bz2.BZ2File),
    ".zst": (re.compile(rb"\x28\xb5\x2f\xfd"), _zstd),
}
PACKED = tuple(_PACKED)
"""The endings of packed files."""


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[Bytes]:
    """Yields the content of a file, unpacked as often as it was packed.

    Raises:
        DataError: a file that cannot be read, or whose content is not what its ending says; while it is read, one that
            is damaged.
    """
    name = shown(path)
    try:
        file = path.open("rb", buffering=0)
    except OSError as error:
        raise _unreadable(name, error) from None
    with file:
        content = Bytes(_file_reader(name, file))
        said = PurePath(path.name.lower()).suffix
        if said in _PACKED and not _PACKED[said][0].match(content.peek(16)):
            raise DataError(
                f"{name}: its name says {said}, its content does not",
                f"a {said} file",
                "correct the ending of its name",
            )
        while unpack := next((unpack for begins, unpack in _PACKED.values() if begins.match(content.peek(16))), None):
            content = Bytes(_unpacker(name, unpack, content), packed=True)
        yield content


def _file_reader(name: str, file: io.FileIO) -> Callable[[int], bytes]:
    def read(size: int) -> bytes:
        try:
            return file.read(size)
        except OSError as error:
            raise _unreadable(name, error) from None

    return read


def _unpacker(name: str, unpack: Callable[[Any], _Readable], packed: Bytes) -> Callable[[int], bytes]:
    stream: list[_Readable] = []

    def read(size: int) -> bytes:
        try:
            if not stream:
                stream.append(unpack(packed))
            return stream[0].read(size)
        except (OSError, EOFError, lzma.LZMAError, zlib.error, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{name}: cannot be unpacked ({one_line(error)})",
                "a whole file",
                "get it again, since it is damaged or cut short",
            ) from None

    return read


def _unreadable(name: str, error: OSError) -> DataError:
    reason = error.strerror or error
    return DataError(f"{name}: cannot be read ({reason})", "a readable file", "check the file and its permissions")


class Characters:
    """The text of a file, read once, with a look at what comes next. A byte-order mark at its beginning is left out.

    Args:
        name: the name of the file in errors.
        content: its bytes.

    Raises:
        DataError: content that is no UTF-8. The error names the encoding that it seems to have instead, and the
            position of the first wrong byte.
    """

    def __init__(self, name: str, content: Bytes) -> None:
        head = content.peek(4096)
        self.name = name
        self._content = content
        self._wide = next((form for mark, form in _MARKS if head.startswith(mark)), None) or _without_mark(head)
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._bytes = 0
        self._ended = False
        if self._wide is None and _is_binary(head):
            raise DataError(f"{name}: no text but a program's data", "a file of text", "choose another file")
        if self._wide is not None:
            # The first wrong byte comes first, and there may be none.
            while self._decoded() is not None:
                pass
            raise self._not_utf8(f"not UTF-8 but {self._wide}")
        self._ahead = ""
        self._ahead = self.peek(1).removeprefix("\ufeff")

    def _decoded(self) -> str | None:
        """Returns the next characters, or None at the end; perhaps no characters."""
        if self._ended:
            return None
        data = self._content.read(_CHUNK)
        self._ended = not data
        before = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            place = self._bytes - before + error.start
            raise self._not_utf8(f"not UTF-8 at byte {place} (0x{error.object[error.start]:02x})") from None
        self._bytes += len(data)
        return text

    def _not_utf8(self, what: str) -> DataError:
        way_out = f"convert it first, for example: iconv -f {self._wide or 'latin1'} -t utf-8"
        return DataError(f"{self.name}: {what}", "text in UTF-8", way_out)

    def peek(self, size: int) -> str:
        """Returns at least the next ``size`` characters, or all if there are fewer; they will be read again."""
        found = [self._ahead]
        count = len(self._ahead)
        while count < size and (more := self._decoded()) is not None:
            found.append(more)
            count += len(more)
        self._ahead = "".join(found)
        return self._ahead

    def blocks(self) -> Iterator[str]:
        """Yields the text in blocks."""
        block: str | None = self._ahead
        self._ahead = ""
        while block is not None:
            if block:
                yield block
            block = self._decoded()

    def lines(self) -> Iterator[str]:
        r"""Yields the lines without the ``\n`` behind each.

        Raises:
            DataError: a line of more than ``LONGEST`` characters.
        """
        # str.splitlines would also split at other line ends, which a text in JSON may hold.
        begun: list[str] = []
        number, size = 1, 0
        for block in self.blocks():
            first, *more = block.split("\n")
            begun.append(first)
            size += len(first)
            if size > LONGEST:
                raise self._too_long(number)
            if more:
                yield "".join(begun)
                yield from more[:-1]
                begun, size, number = [more[-1]], len(more[-1]), number + len(more)
        yield "".join(begun)

    def table_lines(self) -> Iterator[str]:
        r"""Yields the lines with the ``\n``, ``\r\n`` or ``\r`` behind each, as ``csv`` wants them.

        Raises:
            DataError: a line of more than ``LONGEST`` characters.
        """
        begun: list[str] = []
        number, size = 1, 0
        for block in self.blocks():
            # The last character may be the first half of a line end.
            end = max(block.rfind("\n"), block.rfind("\r", 0, -1)) + 1
            if end or (begun and begun[-1].endswith("\r")):
                begun.append(block[:end])
                for line in io.StringIO("".join(begun), newline=""):
                    number += 1
                    yield line
                begun, size = [], 0
            begun.append(block[end:])
            size += len(block) - end
            if size > LONGEST:
                raise self._too_long(number)
        yield from io.StringIO("".join(begun), newline="")

    def _too_long(self, number: int) -> DataError:
        return DataError(
            f"{self.name}: line {number} has more than {LONGEST:,} characters",
            "shorter rows",
            "write that text into a .txt file, which may have any length",
        )


_MARKS = ((b"\xff\xfe\x00\x00", "utf-32"), (b"\x00\x00\xfe\xff", "utf-32"), (b"\xff\xfe", "utf-16"),
          (b"\xfe\xff", "utf-16"))  # fmt: skip


def _without_mark(data: bytes) -> str | None:
    """The name of a UTF-16 text without a byte-order mark, in which every second byte of most letters is 0, or None."""
    if not data:
        return None
    even, odd = data[::2].count(0), data[1::2].count(0)
    if max(even, odd) < len(data) / 5 or min(even, odd) > len(data) / 20:
        return None
    return "utf-16le" if odd > even else "utf-16be"


def _is_binary(data: bytes) -> bool:
    """Returns whether the beginning of a file has more control characters than a text may have by accident."""
    controls = sum(data.count(byte) for byte in (*range(9), *range(14, 27)))
    return controls > len(data) / 20
