"""The rows of a ladder as ``rows.jsonl`` holds them: read, checked, and found by what tells one run from another."""

from __future__ import annotations

from pathlib import Path

from diffattn.config_fields import is_count, is_measure
from diffattn.errors import DataError, one_line
from diffattn.files import parse_json
from diffattn.results.ladder import LadderRow
from diffattn.sealed import unbroken

ROWS = "rows.jsonl"
# What a field of a row has to be, by its key in the file.
_WORDS = ("attention", "match", "dtype", "data_digest")
_COUNTS = ("seed", "hidden_size", "num_layers", "num_heads", "vocab_size", "context", "tokens", "batch_size",
           "parameters", "non_embedding_parameters")  # fmt: skip
_MEASURES = ("learning_rate", "val_loss", "bits_per_byte", "train_tokens_per_second", "model_flops_per_token")


def by_key(folder: Path) -> dict[tuple[object, ...], LadderRow]:
    """Returns the rows in a folder by what tells one run from another."""
    return {row.key: row for row in read_rows(folder / ROWS)}


def read_rows(path: str | Path) -> list[LadderRow]:
    """Returns the rows of a ladder; a missing file has none.

    Raises:
        DataError: a line that is no JSON object with the fields of a row, or that was changed since it was written.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        given = f"{path} cannot be read ({error.strerror})"
        raise DataError(given, "the rows of a ladder there", "check the path and its rights") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip() and number == len(lines):
            break
        try:
            rows.append(_row(line))
        except ValueError as error:
            raise DataError(
                f"{path} line {number} is damaged ({one_line(error)})",
                "a row of a ladder, in JSON with all of its fields",
                "remove the line, and its run is trained again",
            ) from None
    return rows


def _row(line: bytes) -> LadderRow:
    """Returns the row that a line holds.

    Raises:
        ValueError: what is wrong with it, in a few words.
    """
    content = parse_json(line)
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}")
    row = LadderRow.from_json(content)
    right = {name: isinstance(content[name], str) for name in _WORDS}
    right |= {name: is_count(content[name]) for name in _COUNTS}
    right["group"] = is_count(row.group)
    right |= {name: is_measure(content[name]) and content[name] > 0 for name in _MEASURES}
    if wrong := [name for name, good in right.items() if not good]:
        raise ValueError(f"its {wrong[0]} is {content[wrong[0]]!r:.40}")
    if not unbroken(content):
        raise ValueError("it was changed after it was written: its seal does not fit the rest")
    return row
