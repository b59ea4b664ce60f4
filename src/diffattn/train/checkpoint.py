"""Checkpoints that survive a kill at any moment: complete, verified by content, or skipped by name."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
from pathlib import Path

from diffattn.files import PARTIAL, remove_unfinished, write_json

MANIFEST = "manifest.json"


def seal(folder: Path) -> None:
    """Write the manifest: size and SHA-256 of every file of a checkpoint that is complete."""
    files = {file.name: _digest(file) for file in sorted(folder.iterdir()) if file.is_file()}
    write_json(folder / MANIFEST, files)


def defect(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, in a few words, or None where every file is as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "it has no manifest, so it was not completed"
    except ValueError:
        return "its manifest is damaged"
    if not isinstance(manifest, dict) or not manifest:
        return "its manifest names no files"
    for name, expected in manifest.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if _digest(file) != expected:
            return f"{name} is not what was written ({file.stat().st_size:,} bytes of {expected['bytes']:,})"
    return None


def is_sealed(folder: Path) -> bool:
    """Whether a folder is a checkpoint that a run has completed: ours, whatever became of its files."""
    return (folder / MANIFEST).is_file() and not folder.is_symlink()


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a run folder, oldest first, complete or not, as (step, path)."""
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*"))
    return sorted((int(match[1]), path) for match, path in found if match)


def last_good(folder: Path) -> tuple[tuple[int, Path] | None, list[str]]:
    """The newest usable checkpoint, and one line for each newer one that was skipped.

    A half-written one is removed; a damaged one is set aside under another name.
    """
    skipped = []
    for partial in folder.glob(f"checkpoint-*{PARTIAL}"):
        if is_sealed(partial) or remove_unfinished(partial):
            skipped.append(f"skipped {partial.name}: the run ended while it was being written")
            shutil.rmtree(partial, ignore_errors=True)
    for step, path in reversed(checkpoints(folder)):
        reason = defect(path)
        if reason is None:
            return (step, path), skipped
        aside = _free(path.with_name(f"damaged-{path.name}"))
        path.rename(aside)
        skipped.append(f"skipped {path.name}: {reason}; it is kept as {aside.name}")
    return None, skipped


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` of the checkpoints that the run has written."""
    for path in [path for _, path in checkpoints(folder) if is_sealed(path)][:-keep]:
        shutil.rmtree(path)


def _free(path: Path) -> Path:
    """The path, or one with a number behind it where something is there already."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(place for place in itertools.chain([path], numbered) if not os.path.lexists(place))


def _digest(file: Path) -> dict[str, int | str]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
