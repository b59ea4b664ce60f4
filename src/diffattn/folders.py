"""Folders of ours: what each kind is known by, which of them may be written into, and where their models are.

A folder is known by what the program wrote into it, not by the name of one file: a checkpoint of anyone's has a
``config.json``, and other programs write ``metrics.jsonl``. One whose ``config.json`` is damaged is known by the rest,
so that its owner is told of the damage.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffattn.errors import ConfigError
from diffattn.files import entries, is_utf8, parse_json, resume_command, unwritable

_CONFIG = "config.json"
_MODEL = "model"
# The parts of the config.json of a run, and what a comparison's holds.
_RUN_PARTS = frozenset({"recipe", "model", "data"})
_COMPARISON_PARTS = frozenset({"options", "command"})
# Rows and lines of a file that are looked through for one of ours.
_LINES = 100
_LADDER_RUN = re.compile(r"[\w+.]+-\d+x\d+-seed\d+-\d+-[\d.e+-]+?(\.lock)?")
_ROW_BEGINS = b'{"attention": "'
_MODEL_FILE = re.compile(
    r"(generation_)?config\.json|training\.json|model[\w-]*\.safetensors(\.index\.json)?|"
    r"((added_|special_)?token\w*|vocab)\.json|merges\.txt|chat_template\.\w+"
)
_KEPT_FILE = re.compile(r"[a-z_]+-[0-9a-f]{24}\.jsonl?")


@dataclass(frozen=True)
class Kind:
    """What a folder is, in words, and whether one is of this kind."""

    words: str
    is_in: Callable[[Path], bool]


def own_folder(path: str | Path, kind: Kind | None = None, *, option: str | None = "--out") -> Path:
    """A folder to write into, once it is known that nothing in it is another's. Nothing is made or changed.

    Args:
        path: the folder, which need not exist.
        kind: of which it may be where it holds something; None: it has to be new or empty.
        option: by which it was given, None for an argument without a name.

    Returns:
        The path.

    Raises:
        ConfigError: a file, a folder that holds something else, or a place where nothing can be written.
    """
    path = Path(path)
    given, by = f"{str(path)!r} given", f" with {option}" if option else ""
    try:
        if path.is_symlink() and not path.exists():
            raise ConfigError(f"{given}; a folder is wanted; it is a link to nothing: choose another{by}")
        if not is_utf8(os.path.realpath(path)):
            raise ConfigError(
                f"{given}; a folder whose whole path is UTF-8 is wanted, since models cannot be written to another: "
                f"choose another{by}"
            )
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{given}; a new or an empty folder is wanted; it is a file: choose another{by}")
        held = entries(path) if path.is_dir() else []
    except OSError as error:
        raise ConfigError(f"cannot write to {path}: {error.strerror}; choose another folder{by}") from None
    if held and (kind is None or not kind.is_in(path)):
        other = next((f", of {found.words}" for found in KINDS if found.is_in(path)), "")
        names = ", ".join(map(repr, held[:3])) + (f" and {len(held) - 3} more" if len(held) > 3 else "")
        wanted = "a new or an empty folder is wanted" + ("" if kind is None else f", or that of {kind.words}")
        raise ConfigError(f"{given}; {wanted}; it is not empty: it holds {names}{other}; choose another{by}")
    if reason := unwritable(path):
        raise ConfigError(f"cannot write to {path}: {reason}; choose another folder{by}")
    return path


def no_model(folder: Path) -> str | None:
    """One sentence where the folder of a run, a comparison or a ladder is given for that of a model, or None.

    It names the folder of the model, or says that there is none yet and how the run goes on.
    """
    own = folder / _MODEL
    try:
        kind = next((kind for kind in (RUN, COMPARISON, LADDER) if kind.is_in(folder)), None)
    except OSError:
        # Whoever reads it says so.
        return None
    if kind is None and (own / _CONFIG).is_file():
        kind = RUN
    if kind is None:
        return None
    found = [own] if kind is RUN else sorted(folder.glob(f"*/{_MODEL}"))
    found = [path for path in found if (path / _CONFIG).is_file()]
    what = f"{str(folder)!r} is the folder of {kind.words}; a model's is wanted"
    if found:
        more = f", or that of another of its {len(found)} runs" if len(found) > 1 else ""
        return f"{what}: take {str(found[0])!r}{more}"
    if kind is RUN:
        return f"{what}; it has none yet: finish it with {resume_command('train', folder)}"
    return f"{what}; none of its runs has finished: finish one first, by the command that started it"


def holds_model_of_ours(folder: Path) -> bool:
    """Whether everything in a folder is what a run writes as its trained model."""
    config = _object(folder / _CONFIG)
    if folder.is_symlink() or config is None or config.get("model_type") != "diff_transformer":
        return False
    return all(_MODEL_FILE.fullmatch(name) for name in entries(folder))


def _is_run(folder: Path) -> bool:
    config = _object(folder / _CONFIG)
    if config is not None:
        if "model_type" in config:
            return False
        if len(_RUN_PARTS & config.keys()) >= 2:
            return True
    # Its config.json is damaged.
    return (folder / _CONFIG).is_file() and (
        any(folder.glob("checkpoint-*/manifest.json"))
        or any({"step", "tokens", "seconds"} <= row.keys() for row in _rows(folder / "metrics.jsonl"))
    )


def _is_comparison(folder: Path) -> bool:
    config = _object(folder / _CONFIG)
    if config is not None and config.keys() >= _COMPARISON_PARTS:
        return True
    damaged = (folder / _CONFIG).is_file() and "model_type" not in (config or {})
    return damaged and any(_is_run(run) for run in folder.glob("*-seed*/"))


def _is_ladder(folder: Path) -> bool:
    rows, names = folder / "rows.jsonl", entries(folder)
    # Before its first row, a ladder has a lock or a run; a process that was stopped in between leaves an empty file.
    if any(_LADDER_RUN.fullmatch(name) for name in names):
        return True
    if not rows.is_file() or not rows.stat().st_size:
        return names == [rows.name]
    # Its owner is told of a row that is damaged.
    with rows.open("rb") as file:
        begins = file.read(len(_ROW_BEGINS)) == _ROW_BEGINS
    return begins or any({"attention", "seed", "val_loss"} <= row.keys() for row in _rows(rows))


def _is_kept(folder: Path) -> bool:
    return any(_KEPT_FILE.fullmatch(name) for name in entries(folder))


def _object(file: Path) -> dict[str, Any] | None:
    try:
        content = parse_json(file.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """The objects among the first lines of a file, which may be anyone's and of any length."""
    try:
        with file.open("rb") as lines:
            for _ in range(_LINES):
                with contextlib.suppress(ValueError):
                    row = parse_json(lines.readline(1 << 20))
                    if isinstance(row, dict):
                        yield row
    except OSError:
        return


RUN = Kind("a run", _is_run)
COMPARISON = Kind("a comparison", _is_comparison)
LADDER = Kind("a ladder", _is_ladder)
KEPT = Kind("an eval with --keep", _is_kept)
KINDS = (RUN, COMPARISON, LADDER, KEPT)
