"""Recognises the folders that diffattn writes, so that no other is written into, and finds the models in them.

A folder is recognised by what the program wrote into it, not by the name of one file: every checkpoint has a
``config.json``, and other programs write ``metrics.jsonl`` too. A folder whose ``config.json`` is damaged is recognised
by its other files, so that its owner reads of the damage.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from diffattn.errors import ConfigError, DiffattnError
from diffattn.files import entries, is_utf8, parse_json, resume_command, unwritable

_CONFIG = "config.json"
_MODEL = "model"
# The parts of the config.json of a run, and of that of a comparison.
_RUN_PARTS = frozenset({"recipe", "model", "data"})
_COMPARISON_PARTS = frozenset({"options", "command"})
# The number of lines of a file that are searched for one of ours.
_LINES = 100
_LADDER_RUN = re.compile(r"[\w+.]+-\d+x\d+-seed\d+-\d+-[\d.e+-]+?(\.lock)?")
_ROW_BEGINS = b'{"attention": "'
_MODEL_FILE = re.compile(
    r"(generation_)?config\.json|training\.json|model[\w-]*\.safetensors(\.index\.json)?|"
    r"((added_|special_)?token\w*|vocab)\.json|merges\.txt|chat_template\.\w+"
)
_Error = TypeVar("_Error", bound=DiffattnError)
_KEPT_FILE = re.compile(r"[a-z_]+-[0-9a-f]{24}\.jsonl?")


@dataclass(frozen=True)
class Kind:
    """A kind of folder that diffattn writes."""

    words: str
    """The name in an error, such as ``a run``."""
    is_in: Callable[[Path], bool]
    """Returns whether a folder is of this kind."""


def own_folder(path: str | Path, kind: Kind | None = None, *, option: str | None = "--out") -> Path:
    """Checks that a folder may be written into: that it holds nothing of anybody else's. Makes and changes nothing.

    Args:
        path: the folder, which need not exist.
        kind: the kind of folder that it may be if it holds something. Default: it has to be new or empty.
        option: the option by which it was given, None for an argument without a name.

    Returns:
        The path.

    Raises:
        ConfigError: a file, a folder that holds something else, or a path that cannot be written.
    """
    path = Path(path)
    given, way_out = repr(str(path)), f"choose another folder with {option}" if option else "choose another folder"
    try:
        if path.is_symlink() and not path.exists():
            raise ConfigError(f"{given} is a link to nothing", "a folder", way_out)
        if not is_utf8(os.path.realpath(path)):
            raise ConfigError(
                f"the path {given} is not UTF-8",
                "a folder whose whole path is UTF-8, since models cannot be written to another",
                way_out,
            )
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{given} is a file", "a new or an empty folder", way_out)
        held = entries(path) if path.is_dir() else []
        reason = unwritable(path)
    except OSError as error:
        held, reason = [], error.strerror or str(error)
    if held and (kind is None or not kind.is_in(path)):
        other = next((f", of {found.words}" for found in KINDS if found.is_in(path)), "")
        names = ", ".join(map(repr, held[:3])) + (f" and {len(held) - 3} more" if len(held) > 3 else "")
        wanted = "a new or an empty folder" + ("" if kind is None else f", or that of {kind.words}")
        raise ConfigError(f"{given} is not empty: it holds {names}{other}", wanted, way_out)
    if reason:
        raise ConfigError(f"cannot write to {path} ({reason})", "a folder that can be written", way_out)
    return path


def no_model(folder: Path, kind_of_error: type[_Error]) -> _Error | None:
    """Returns an error if a folder is that of a run, a comparison or a ladder, where that of a model is wanted.

    The error names the folder of the model, or says that there is none yet and how the run is continued. So it does for
    a folder of any program whose models lie in folders inside it, such as the checkpoint-500 of a ``Trainer``.
    """
    own = folder / _MODEL
    try:
        kind = next((kind for kind in (RUN, COMPARISON, LADDER) if kind.is_in(folder)), None)
    except OSError:
        # The caller reads the folder next, and says that it cannot be read.
        return None
    if kind is None and (own / _CONFIG).is_file():
        kind = RUN
    if kind is None:
        return _model_inside(folder, kind_of_error)
    found = [own] if kind is RUN else sorted(folder.glob(f"*/{_MODEL}"))
    found = [path for path in found if (path / _CONFIG).is_file()]
    given, wanted = f"{str(folder)!r} is the folder of {kind.words}", "the folder of a model"
    if found:
        more = f", or that of another of its {len(found)} runs" if len(found) > 1 else ""
        return kind_of_error(given, wanted, f"take {str(found[0])!r}{more}")
    if kind is RUN:
        return kind_of_error(
            f"{given}, which has no model yet", wanted, f"finish it with {resume_command('train', folder)}"
        )
    return kind_of_error(
        f"{given}, none of whose runs has finished", wanted, "finish one first, with the command that started it"
    )


def _model_inside(folder: Path, kind_of_error: type[_Error]) -> _Error | None:
    """Returns the error that names the last model inside a folder that is none itself; None: there is none."""
    try:
        held = [file.parent for inside in ("*", "*/checkpoint-*") for file in folder.glob(f"{inside}/{_CONFIG}")]
        found = [path for path in held if "model_type" in (_object(path / _CONFIG) or {})]
    except OSError:
        return None
    if not found:
        return None
    # checkpoint-1000 is later than checkpoint-500.
    last = max(found, key=lambda path: [(len(name), name) for name in path.relative_to(folder).parts])
    more = f", the last of {len(found)}" if len(found) > 1 else ""
    return kind_of_error(
        f"{str(folder)!r} is no model, but there is one inside it", "the folder of a model", f"take {str(last)!r}{more}"
    )


def holds_model_of_ours(folder: Path) -> bool:
    """Returns whether a folder holds only files that a run writes as its trained model."""
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
    # Here config.json is damaged, so the other files decide.
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
    # Before its first row, a ladder has a lock or a run. A process that is stopped in between leaves an empty file.
    if any(_LADDER_RUN.fullmatch(name) for name in names):
        return True
    if not rows.is_file() or not rows.stat().st_size:
        return names == [rows.name]
    # A damaged row counts too, so that the owner reads of the damage.
    with rows.open("rb") as file:
        begins = file.read(len(_ROW_BEGINS)) == _ROW_BEGINS
    return begins or any({"attention", "seed", "val_loss"} <= row.keys() for row in _rows(rows))


def _is_kept(folder: Path) -> bool:
    return any(_KEPT_FILE.fullmatch(name) for name in entries(folder))


def _object(file: Path) -> dict[str, object] | None:
    try:
        content = parse_json(file.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _rows(file: Path) -> Iterator[dict[str, object]]:
    """Yields the objects among the first lines of a file, which may be of any origin and length."""
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
