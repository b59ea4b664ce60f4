"""Writes files and folders that are whole or not there: first under another name, flushed to the disk, then renamed.

A half-written file lies in a folder ``NAME.….partial`` beside its final path. A mark in that folder is locked by the
process that writes it. So what a killed process left differs from what a living process writes, and both from a user's
own files.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypedDict

from diffattn.errors import CheckpointError, ConfigError, TrainingError, one_line

PARTIAL = ".partial"
# The file that lies in every half-written folder, and in no other.
_MARK = ".being-written-by-diffattn"
PROBE = ".diffattn-"
"""The beginning of the names of files that are removed again at once."""
LOCK = ".in-use-by-diffattn"
"""The lock file in the folder of a run that a process trains in; one that a killed process left locks nothing."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""The errors by which a file system says that it has no locks."""
# Files that operating systems put into folders by themselves.
_SYSTEM = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})
# The name of the program, which stands near the beginning of each page and picture that it writes.
GENERATOR = "diffattn"
_PAGE_MARK = f'<meta name="generator" content="{GENERATOR}">'
# A page that carries models is UTF-16.
_OUR_FILES = (_PAGE_MARK.encode(), _PAGE_MARK.encode("utf-16-le"), f"Software\0{GENERATOR}".encode())


def writable_folder(path: Path) -> Path:
    """Makes the folder; raises a ``ConfigError`` where nothing can be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        _probe(path)
    except OSError as error:
        raise ConfigError(
            f"cannot write to {path} ({error.strerror})",
            "a folder that can be written",
            "choose another folder with --out",
        ) from error
    return path


def unwritable(path: Path) -> str | None:
    """Returns the system's reason why a folder cannot be written or made, or None where it can; makes nothing."""
    try:
        nearest = next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
        _probe(nearest)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _probe(folder: Path) -> None:
    # The name is new, if the file has one at all: processes that share a folder do this at the same time.
    with tempfile.TemporaryFile(dir=folder, prefix=PROBE, suffix=PARTIAL):
        pass


def entries(folder: Path) -> list[str]:
    """The names in a folder, sorted, without the system's files, our lock and what we half wrote."""
    hidden = _SYSTEM | {LOCK}
    return sorted(path.name for path in folder.iterdir() if path.name not in hidden and not is_unfinished(path))


def check_files(**files: Path | None) -> None:
    """Raises unless pages and pictures may be written to these paths: new files, empty ones, or some that we wrote.

    Args:
        files: the paths by the option that gave them, such as ``html=Path("page.html")``; None for no option.

    Raises:
        ConfigError: a folder, a file that diffattn did not write, a path that cannot be written, or one path twice.
    """
    given = {name: path for name, path in files.items() if path is not None}
    for name, path in given.items():
        _check_file(path, f"--{name}")
    if len({os.path.realpath(path) for path in given.values()}) < len(given):
        names = " and ".join(f"--{name}" for name in given)
        raise ConfigError(f"{names} both name {str(path)!r}", "a file for each", "choose another name for one of them")


def _check_file(path: Path, option: str) -> None:
    given = f"{option} {str(path)!r}"
    try:
        if path.is_dir():
            raise ConfigError(f"{given} is a folder", "the name of a file", "add a name to it")
        # A device or a pipe holds nothing that could be lost.
        if path.is_file() and path.stat().st_size:
            with path.open("rb") as file:
                beginning = file.read(4096)
            if not any(mark in beginning for mark in _OUR_FILES):
                raise ConfigError(
                    f"{given} is a file that diffattn did not write",
                    "a new file, or one that diffattn wrote",
                    "choose another name, or move the file away",
                )
        reason = unwritable(Path(os.path.realpath(path)).parent)
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise ConfigError(f"{given} cannot be written ({reason})", "a file that can be written", "choose another path")


def is_utf8(name: str) -> bool:
    """Returns whether the name of a file is UTF-8; Python holds another as characters that cannot be written.

    >>> is_utf8("model"), is_utf8(os.fsdecode(bytes([255])))
    (True, False)
    """
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def shown(path: str | Path) -> str:
    r"""Returns a path that can be printed in one line: bytes that are no UTF-8 and invisible characters are escaped.

    >>> print(shown("caf\udce9\n.txt"))
    caf\xe9\n.txt
    """
    return "".join(
        sign if sign.isprintable()
        # Python's character for a byte of a name that is no UTF-8.
        else f"\\x{ord(sign) - 0xDC00:02x}" if "\udc80" <= sign <= "\udcff"
        else sign.encode("unicode_escape").decode("ascii")
        for sign in str(path)
    )  # fmt: skip


def command(arguments: Iterable[str]) -> str:
    """Returns a command in a form that can be copied into a shell, whatever characters its words hold.

    >>> print(command(["diffattn", "train", "--out", "my runs/first"]))
    diffattn train --out 'my runs/first'
    """
    return " ".join(map(_quoted, arguments))


def _quoted(word: str) -> str:
    if is_utf8(word):
        return shlex.quote(word)
    # Shells read $'…' byte by byte.
    return "$'" + "".join(f"\\x{byte:02x}" for byte in word.encode("utf-8", "surrogateescape")) + "'"


def resume_command(verb: str, folder: Path) -> str:
    """The command that continues what a verb began in a folder.

    >>> print(resume_command("train", Path("-mine")))
    diffattn train --resume --out ./-mine
    """
    name = str(folder)
    # A name that begins with a dash would be read as an option.
    return command(["diffattn", *verb.split(), "--resume", "--out", f"./{name}" if name.startswith("-") else name])


def parse_json(text: str | bytes, *, unique: bool = False) -> Any:
    """Returns the content of a JSON text; every fault in it is a ``ValueError``.

    Args:
        text: the text, or its bytes in UTF-8.
        unique: refuse an object that has one name twice, of which Python would take the last.

    Raises:
        ValueError: no JSON, no UTF-8, nested too deeply, or a number of thousands of digits.

    >>> parse_json("[" * 100_000)
    Traceback (most recent call last):
    ValueError: it is nested too deeply
    """
    try:
        return json.loads(text, object_pairs_hook=_unique if unique else None)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"it has the name {name[:80]!r} twice")
        found[name] = value
    return found


def read_object(path: Path, *, way_out: str) -> dict[str, Any]:
    """Reads the JSON object that a file of ours, or of a checkpoint, holds.

    Args:
        path: the file.
        way_out: the last part of an error: what the reader can do.

    Raises:
        CheckpointError: no such file, one that cannot be read, or one that holds something else.
    """
    try:
        values = parse_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be read ({error.strerror})", "a file with a JSON object", way_out
        ) from None
    except ValueError as error:
        raise CheckpointError(
            f"{str(path)!r} is damaged: it is no JSON ({one_line(error)})", "a file with a JSON object", way_out
        ) from None
    if not isinstance(values, dict):
        what = f"it holds a {type(values).__name__}"
        raise CheckpointError(f"{str(path)!r} is damaged: {what}", "a file with a JSON object", way_out)
    return values


class FileFacts(TypedDict):
    """The number of bytes of a file and its SHA-256, by which a change of it is noticed."""

    bytes: int
    sha256: str


def file_facts(path: Path, size: int | None = None) -> FileFacts:
    """The number of bytes and the SHA-256 of a file, or of its first ``size`` bytes."""
    with path.open("rb") as stream:
        if size is None:
            return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
        start = stream.read(size)
    return {"bytes": len(start), "sha256": hashlib.sha256(start).hexdigest()}


def sync(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """Replaces ``path`` by ``content`` as JSON, in one step."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replaces ``path`` by ``text``, in one step."""
    # The text may hold a file name that is no UTF-8, whose characters no file can hold; JSON reads the escapes back.
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces ``path``, or what it points to if it is a link, by ``content`` in one step; makes its folder."""
    with explained(path):
        if path.exists() and not path.is_file():
            # A device or a pipe cannot be replaced by a file.
            path.write_bytes(content)
            return
        target = Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        with _apart(target) as scratch:
            new = scratch / "new"
            new.write_bytes(content)
            sync(new)
            os.replace(new, target)


@contextlib.contextmanager
def whole_folder(path: Path, *, replaces: Callable[[Path], bool] = lambda folder: False) -> Iterator[Path]:
    """Yields a folder to fill; it appears as ``path`` if the block ends without an error, and not at all otherwise.

    Args:
        path: a path where nothing is, or an empty folder, or a link to such a folder.
        replaces: returns whether a folder that holds something may be deleted for the new one. Default: never.

    Raises:
        ConfigError: at the end of the block, if ``path`` holds something that may not be deleted.
        TrainingError: the disk is full.
    """
    with explained(path):
        target = Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        with _apart(target) as scratch:
            new, old = scratch / "new", scratch / "old"
            new.mkdir()
            yield new
            for file in sorted(new.rglob("*")):
                sync(file)
            if target.exists():
                if entries(target) and not replaces(target):
                    raise ConfigError(
                        f"{path} holds files that diffattn did not write", "a new or an empty folder", "move them away"
                    )
                os.rename(target, old)
            os.rename(new, target)
            for name in _SYSTEM & set(os.listdir(old)) if old.exists() else ():
                os.rename(old / name, target / name)
            sync(target.parent)


@contextlib.contextmanager
def _apart(path: Path) -> Iterator[Path]:
    """Yields a folder beside ``path`` to prepare it in; removes those that killed processes left."""
    import filelock

    for left in path.parent.glob(f"{glob.escape(path.name)}.*{PARTIAL}"):
        remove_unfinished(left)
    scratch = Path(tempfile.mkdtemp(prefix=f"{path.name}.", suffix=PARTIAL, dir=path.parent))
    try:
        with contextlib.ExitStack() as held:
            # On a file system without locks nothing shows that a process lives, so nothing is ever removed there.
            with contextlib.suppress(NotImplementedError):
                held.enter_context(filelock.FileLock(scratch / _MARK))
            yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def is_unfinished(path: Path) -> bool:
    """Returns whether a path is a half-written folder of this program, or a file that it removes again at once."""
    if not path.name.endswith(PARTIAL) or path.is_symlink():
        return False
    return path.name.startswith(PROBE) or (path / _MARK).is_file()


def remove_unfinished(path: Path) -> bool:
    """Removes a half-written folder that no living process writes; returns whether it did so."""
    import filelock

    if not is_unfinished(path):
        return False
    try:
        with filelock.FileLock(path / _MARK, timeout=0):
            pass
    except (OSError, NotImplementedError, filelock.Timeout):
        return False
    shutil.rmtree(path, ignore_errors=True)
    return True


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns a full disk, however the writing library reports it, into a ``TrainingError``."""
    try:
        yield
    except Exception as error:
        if isinstance(error, TrainingError) or not is_disk_full(error):
            raise
        free = shutil.disk_usage(path.parent).free
        raise TrainingError(
            f"the disk is full: could not write {path} ({free:,} bytes are free)",
            "more free space",
            "free some space and run it again, or continue with --resume; what was saved before is kept",
        ) from error


def is_disk_full(error: BaseException) -> bool:
    """Returns whether an error means a full disk or quota; safetensors hides its number in its text."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in full:
            return True
        if any(words in str(seen) for words in map(os.strerror, full)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
