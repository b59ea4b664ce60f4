"""Files that are whole or not there: written beside their place, flushed to the disk, then renamed.

What is half-written lies in a folder ``NAME.….partial`` beside its place, with a mark in it that the process which
writes it has locked. So what a killed process left is known from what another lives on, and both from a person's own.
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
from typing import Any

from diffattn.errors import CheckpointError, ConfigError, TrainingError

PARTIAL = ".partial"
# Lies in every half-written folder, and in no other.
_MARK = ".being-written-by-diffattn"
# With which the names of files begin that are gone again at once.
_PROBE = ".diffattn-"
LOCK = ".in-use-by-diffattn"
"""In the folder of a run, while a process has it; one that a killed process left locks nothing."""
# What systems put into folders by themselves.
_SYSTEM = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})
# What stands near the beginning of each page and picture of ours, the name of the program that made it.
GENERATOR = "diffattn"
_OUR_FILES = (f'<meta name="generator" content="{GENERATOR}">'.encode(), f"Software\0{GENERATOR}".encode())
# What torch.save makes of a write that fails, which leaves no number.
_TORCH_WRITE_FAILED = ("file write failed", "basic_ios::clear: iostream error")


def writable_folder(path: Path) -> Path:
    """Make the folder, or say in one line why nothing can be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        _probe(path)
    except OSError as error:
        raise ConfigError(f"cannot write to {path}: {error.strerror}; choose another folder with --out") from error
    return path


def unwritable(path: Path) -> str | None:
    """Why a folder cannot be written or made, in the system's words, or None where it can; nothing is made."""
    try:
        nearest = next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
        _probe(nearest)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _probe(folder: Path) -> None:
    # Of a name of its own, if any: processes that share a folder ask at once, and each looks at what it holds.
    with tempfile.TemporaryFile(dir=folder, prefix=_PROBE, suffix=PARTIAL):
        pass


def entries(folder: Path) -> list[str]:
    """What a folder holds, sorted by name, without what the system puts there, our lock and what we half wrote."""
    hidden = _SYSTEM | {LOCK}
    return sorted(path.name for path in folder.iterdir() if path.name not in hidden and not is_unfinished(path))


def check_files(**files: Path | None) -> None:
    """Raise unless pages and pictures may be written there: new files, empty ones, or some that we wrote.

    Args:
        files: by the option that gave them, such as ``html=Path("page.html")``; None where it was not given.

    Raises:
        ConfigError: a folder, another's file, a place where nothing can be written, or one file for two.
    """
    given = {name: path for name, path in files.items() if path is not None}
    for name, path in given.items():
        _check_file(path, f"--{name}")
    if len({os.path.realpath(path) for path in given.values()}) < len(given):
        names = " and ".join(f"--{name}" for name in given)
        raise ConfigError(f"{names} both name {str(path)!r}; a file for each is wanted: choose another name")


def _check_file(path: Path, option: str) -> None:
    given = f"{option} {str(path)!r} given"
    try:
        if path.is_dir():
            raise ConfigError(f"{given}; the name of a file is wanted; it is a folder: put a name behind it")
        # A device or a pipe holds nothing that could be lost.
        if path.is_file() and path.stat().st_size:
            with path.open("rb") as file:
                beginning = file.read(4096)
            if not any(mark in beginning for mark in _OUR_FILES):
                raise ConfigError(
                    f"{given}; a new file is wanted, or one that diffattn wrote; there is another file: choose another "
                    "name, or move it away"
                )
    except OSError as error:
        raise ConfigError(f"{given}; a file that can be written is wanted; the system says: {error.strerror}") from None
    if reason := unwritable(Path(os.path.realpath(path)).parent):
        raise ConfigError(f"{given}; a file that can be written is wanted; the system says: {reason}")


def is_utf8(name: str) -> bool:
    """Whether a name of a file is text; of others, Python makes characters that cannot be written.

    >>> is_utf8("model"), is_utf8(os.fsdecode(bytes([255])))
    (True, False)
    """
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def shown(path: str | Path) -> str:
    r"""A path as it can be printed in one line: bytes that are no UTF-8 and signs that cannot be seen are escaped.

    >>> print(shown("caf\udce9\n.txt"))
    caf\xe9\n.txt
    """
    return "".join(
        sign if sign.isprintable()
        # What stands in a name for a byte that is no UTF-8.
        else f"\\x{ord(sign) - 0xDC00:02x}" if "\udc80" <= sign <= "\udcff"
        else sign.encode("unicode_escape").decode("ascii")
        for sign in str(path)
    )  # fmt: skip


def command(arguments: Iterable[str]) -> str:
    """A command that a shell takes as it is printed, whatever is in its words.

    >>> print(command(["diffattn", "train", "--out", "my runs/first"]))
    diffattn train --out 'my runs/first'
    """
    return " ".join(map(_quoted, arguments))


def _quoted(word: str) -> str:
    if is_utf8(word):
        return shlex.quote(word)
    # Byte by byte, as shells read it.
    return "$'" + "".join(f"\\x{byte:02x}" for byte in word.encode("utf-8", "surrogateescape")) + "'"


def resume_command(verb: str, folder: Path) -> str:
    """The command by which what a verb wrote into a folder goes on.

    >>> print(resume_command("train", Path("-mine")))
    diffattn train --resume --out ./-mine
    """
    name = str(folder)
    # A name that looks like an option is none in this form.
    return command(["diffattn", *verb.split(), "--resume", "--out", f"./{name}" if name.startswith("-") else name])


def parse_json(text: str | bytes, *, unique: bool = False) -> Any:
    """What a JSON text holds; whatever is wrong with it is a ValueError.

    Args:
        unique: refuse an object that has one name twice, of which Python takes the last.

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


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"it has the name {name[:80]!r} twice")
        found[name] = value
    return found


def read_object(path: Path, *, way_out: str = "check the path") -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        CheckpointError: no such file, one that cannot be read, or one that holds something else; ``way_out`` is the end
            of the message.
    """
    try:
        values = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{str(path)!r} given; a readable JSON file is wanted; it says: {reason}: {way_out}"
        ) from None
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{str(path)!r} given; a JSON object is wanted; it holds a {type(values).__name__}: {way_out}"
        )
    return values


def file_facts(path: Path, size: int | None = None) -> dict[str, int | str]:
    """Bytes and SHA-256 of a file, or of its first ``size`` bytes."""
    with path.open("rb") as stream:
        if size is None:
            return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
        start = stream.read(size)
    return {"bytes": len(start), "sha256": hashlib.sha256(start).hexdigest()}


def sync(path: Path) -> None:
    """Flush a file or the entries of a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """Replace ``path`` by ``content`` as JSON, in one step."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text``, in one step."""
    # Of a file name that is no UTF-8, Python makes characters that no file can hold; JSON reads them back as they were.
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content``, in one step; where it is a link, what it points to. Makes its folder."""
    with explained(path):
        if path.exists() and not path.is_file():
            # A device or a pipe, whose place no file can take.
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
    """Yield a folder to fill; it appears as ``path`` when the block ends well, and not at all otherwise.

    Args:
        path: where nothing is, or an empty folder. Where it is a link, the folder that it points to.
        replaces: whether a folder that holds something may be deleted for the new one; no other is.

    Raises:
        ConfigError: at the end of the block, where ``path`` holds something.
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
                    raise ConfigError(f"{path} holds what diffattn did not write, and it stays; move it away")
                os.rename(target, old)
            os.rename(new, target)
            for name in _SYSTEM & set(os.listdir(old)) if old.exists() else ():
                os.rename(old / name, target / name)
            sync(target.parent)


@contextlib.contextmanager
def _apart(path: Path) -> Iterator[Path]:
    """A folder beside ``path`` to prepare it in; what killed processes left of theirs is removed."""
    import filelock

    for left in path.parent.glob(f"{glob.escape(path.name)}.*{PARTIAL}"):
        remove_unfinished(left)
    scratch = Path(tempfile.mkdtemp(prefix=f"{path.name}.", suffix=PARTIAL, dir=path.parent))
    try:
        with contextlib.ExitStack() as held:
            # A file system may know no locks; then nothing says that a process lives, and nothing of its is removed.
            with contextlib.suppress(NotImplementedError):
                held.enter_context(filelock.FileLock(scratch / _MARK))
            yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def is_unfinished(path: Path) -> bool:
    """Whether a path is a half-written folder of this program's, or a file of its own that is gone again at once."""
    if not path.name.endswith(PARTIAL) or path.is_symlink():
        return False
    return path.name.startswith(_PROBE) or (path / _MARK).is_file()


def remove_unfinished(path: Path) -> bool:
    """Remove a half-written folder that no living process writes; whether that was done."""
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
    """Turn a full disk, however the writing library reports it, into one line."""
    try:
        yield
    except Exception as error:
        if isinstance(error, TrainingError) or not is_disk_full(error):
            raise
        free = shutil.disk_usage(path.parent).free
        raise TrainingError(
            f"the disk is full: could not write {path} ({free:,} bytes are free); what was saved before is kept: "
            "free some space and run it again, or continue with --resume"
        ) from error


def is_disk_full(error: BaseException) -> bool:
    """Whether an error stands for a full disk or quota; safetensors and torch.save hide the number in their text."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in full:
            return True
        if any(words in str(seen) for words in (*map(os.strerror, full), *_TORCH_WRITE_FAILED)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
