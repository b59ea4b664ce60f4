"""Files that are whole or not there: written beside their place, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffattn.errors import CheckpointError, ConfigError, TrainingError

PARTIAL = ".partial"
# What torch.save makes of a write that fails, which leaves no number.
_TORCH_WRITE_FAILED = ("file write failed", "basic_ios::clear: iostream error")


def writable_folder(path: Path) -> Path:
    """Make the folder, or say in one line why nothing can be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Of a name of its own: processes that share a folder ask at once.
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ConfigError(f"cannot write to {path}: {error.strerror}; choose another folder with --out") from error
    return path


def parse_json(text: str | bytes) -> Any:
    """What a JSON text holds; whatever is wrong with it is a ValueError.

    Raises:
        ValueError: no JSON, no UTF-8, nested too deeply, or a number of thousands of digits.

    >>> parse_json("[" * 100_000)
    Traceback (most recent call last):
    ValueError: it is nested too deeply
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


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
    partial = path.with_name(path.name + PARTIAL)
    with explained(path):
        try:
            partial.write_text(text, encoding="utf-8")
            sync(partial)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill; it appears as ``path`` when the block ends well, and not at all otherwise."""
    partial = path.with_name(path.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    with explained(path):
        try:
            partial.mkdir(parents=True)
            yield partial
            for file in sorted(partial.rglob("*")):
                sync(file)
            if path.exists():
                shutil.rmtree(path)
            os.rename(partial, path)
            sync(path.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


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
