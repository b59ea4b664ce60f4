"""JSON objects with a seal, by which a file shows whether anybody changed it after it was written.

A seal is the SHA-256 of everything else in the object, so a number that was edited, or a line that a disk lost, is
noticed before it is used. A seal is no signature: whoever can change a number can write a new seal too.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffattn.errors import CheckpointError
from diffattn.files import NO_LOCKS, explained, read_object

SEAL = "seal"


def sealed(content: Mapping[str, object]) -> dict[str, object]:
    """Returns the object with its seal.

    >>> unbroken(sealed({"val_loss": 4.5})), unbroken(sealed({"val_loss": 4.5}) | {"val_loss": 3.5})
    (True, False)
    """
    return {**content, SEAL: _seal_of(content)}


def unbroken(content: Mapping[str, object]) -> bool:
    """Returns whether the object is as it was sealed; an object without a seal counts as unbroken."""
    return SEAL not in content or content[SEAL] == _seal_of(content)


def read_sealed(path: Path, *, way_out: str) -> dict[str, Any]:
    """Reads the JSON object in a file and checks its seal; ``SEAL in content`` tells whether it has one.

    Raises:
        CheckpointError: no JSON object, or one that was changed after it was sealed; its last part is ``way_out``.
    """
    content = read_object(path, way_out=way_out)
    if not unbroken(content):
        raise CheckpointError(
            f"{path} was changed after it was written: its seal does not fit the rest",
            "the file as it was written",
            way_out,
        )
    return content


def append_row(path: Path, row: Mapping[str, object]) -> None:
    """Appends a row with its seal to a file of JSON lines, to which other processes may append at the same time.

    Raises:
        TrainingError: the disk is full; the file is as it was.
    """
    with explained(path), path.open("a+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            # Processes that share a file make sure of locks before (``train/lock.py``); one alone needs none.
            if error.errno not in NO_LOCKS:
                raise
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        # The last line may lack its end, if it was cut off or edited.
        start = b"" if file.read(1) in (b"", b"\n") else b"\n"
        try:
            # The disk may take only a part of it.
            left = start + json.dumps(sealed(row)).encode() + b"\n"
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(size)
            raise


def _seal_of(content: Mapping[str, object]) -> str:
    rest = {key: value for key, value in content.items() if key != SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
