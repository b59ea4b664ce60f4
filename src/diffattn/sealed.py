"""Files that say by themselves whether anybody changed them: JSON with a seal, and digests of files.

A seal is the SHA-256 of everything else in the object, so a number that was edited, or a line that a disk lost, is
noticed before it is believed. It is no signature: who writes a new seal can write a new number too.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from diffattn.errors import CheckpointError
from diffattn.files import explained, parse_json

SEAL = "seal"


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """The object with its seal.

    >>> unbroken(sealed({"val_loss": 4.5})), unbroken(sealed({"val_loss": 4.5}) | {"val_loss": 3.5})
    (True, False)
    """
    return content | {SEAL: _seal_of(content)}


def unbroken(content: dict[str, Any]) -> bool:
    """Whether the object is as it was sealed; one without a seal is."""
    return SEAL not in content or content[SEAL] == _seal_of(content)


def read_sealed(path: Path, *, way_out: str) -> dict[str, Any]:
    """The JSON object in a file; ``SEAL in`` it says whether it has a seal, as all have that this version writes.

    Raises:
        CheckpointError: no JSON object, or one that was changed since it was sealed; ``way_out`` ends the message.
    """
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} is damaged ({reason}); {way_out}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged (it holds a {type(content).__name__}, not an object); {way_out}")
    if not unbroken(content):
        raise CheckpointError(f"{path} was changed after it was written: its seal does not fit the rest; {way_out}")
    return content


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append a row with its seal to a file of JSON lines, to which other processes may append too.

    Raises:
        TrainingError: the disk is full; the file is as it was.
    """
    with explained(path), path.open("a+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        # A line that was cut, or edited, may lack its end.
        start = b"" if file.read(1) in (b"", b"\n") else b"\n"
        try:
            # The disk may take a part of it only.
            left = start + json.dumps(sealed(row)).encode() + b"\n"
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(size)
            raise


def _seal_of(content: dict[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
