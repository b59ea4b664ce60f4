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

from diffattn.errors import ConfigError, TrainingError

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
