"""Writes checkpoints that survive a kill at any moment, and finds the last one whose content is as it was written."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TypeGuard

from diffattn.errors import CheckpointError
from diffattn.files import PARTIAL, FileFacts, file_facts, parse_json, remove_unfinished, write_json

MANIFEST = "manifest.json"
WAY_OUT = "restore the file, or start again with another --out"
# The names that whole_folder gives to unfinished folders.
_UNMARKED = re.compile(rf"checkpoint-\d+\.\w{{8}}{re.escape(PARTIAL)}")
_PART = re.compile(r"shard-\d+-of-\d+\.safetensors")
# A file that each checkpoint of an earlier version has, and none of this one.
_EARLIER = "optimizer.pt"
OF_THE_RUN = ("../config.json", "../metrics.jsonl")
"""Files of the run that a checkpoint's manifest names too, with their length when the checkpoint was begun."""


def seal(folder: Path, known: Mapping[str, FileFacts]) -> None:
    """Writes the manifest of a complete checkpoint: size and SHA-256 of every file.

    Args:
        folder: the checkpoint.
        known: the facts of the files that were taken when they were written, and of the files of the run.
    """
    others = {file.name for file in folder.iterdir()} - known.keys()
    write_json(folder / MANIFEST, {**{name: file_facts(folder / name) for name in sorted(others)}, **known})


def defect(folder: Path) -> str | None:
    """The reason, in a few words, why a checkpoint cannot be used, or None if every file is as it was written."""
    try:
        manifest = parse_json((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        return "it has no manifest, so it was not completed"
    except (OSError, ValueError):
        return "its manifest is damaged"
    if not isinstance(manifest, dict) or not manifest:
        return "its manifest names no files"
    for name, expected in manifest.items():
        file = folder / name
        if not _are_facts(expected) or (file.parent != folder and name not in OF_THE_RUN):
            return "its manifest is damaged"
        if name in OF_THE_RUN:
            continue
        if not file.is_file():
            return f"{name} is missing"
        if file_facts(file) != expected:
            return f"{name} is not what was written ({file.stat().st_size:,} bytes of {expected['bytes']:,})"
    return None


def is_sealed(folder: Path) -> bool:
    """Returns whether a folder is a checkpoint that a run has completed, whatever happened to its files since."""
    return (folder / MANIFEST).is_file() and not folder.is_symlink()


def has_run_files(checkpoint: Path) -> bool:
    """Returns whether the manifest of a checkpoint without defect also seals the files of its run."""
    return set(OF_THE_RUN) <= parse_json((checkpoint / MANIFEST).read_bytes()).keys()


def sealed_rows(checkpoint: Path) -> bytes:
    """Returns the content of ``metrics.jsonl`` when a checkpoint without defect was written that seals it.

    Raises:
        CheckpointError: ``config.json`` or ``metrics.jsonl`` of the run is not as it was then.
    """
    manifest: dict[str, FileFacts] = parse_json((checkpoint / MANIFEST).read_bytes())
    step = checkpoint.name.removeprefix("checkpoint-")
    for name in OF_THE_RUN:
        file, expected = checkpoint.parent / Path(name).name, manifest[name]
        # Rows are appended; the configuration never changes.
        grows = file.suffix == ".jsonl"
        size = file.stat().st_size if file.is_file() else 0
        if grows and size < expected["bytes"]:
            raise CheckpointError(f"{file} ends before step {step} of the checkpoint", "all rows up to there", WAY_OUT)
        if not file.is_file() or file_facts(file, expected["bytes"] if grows else None) != expected:
            raise CheckpointError(
                f"{file} was changed after the checkpoint of step {step} was written", "the file as it was", WAY_OUT
            )
    with file.open("rb") as stream:
        return stream.read(expected["bytes"])


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a run folder as (step, path), oldest first, complete or not."""
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*"))
    return sorted((int(match[1]), path) for match, path in found if match)


def check_form(checkpoint: Path) -> None:
    """Raises a CheckpointError if an earlier version of diffattn wrote a checkpoint, of which no pickle is read now."""
    if (checkpoint / _EARLIER).is_file():
        raise CheckpointError(
            f"{checkpoint} was written by an earlier version of diffattn, in a format that holds a pickle",
            "a checkpoint of this version",
            "finish the run with the version that began it, or start again with another --out",
        )


def last_good(folder: Path) -> tuple[tuple[int, Path] | None, list[str]]:
    """Finds the newest usable checkpoint; returns it, and a line for each newer one that was skipped.

    It removes half-written checkpoints and renames damaged ones.

    Raises:
        CheckpointError: an earlier version of diffattn wrote it, in a format of which no pickle is read any more.
    """
    skipped = []
    for partial in folder.glob(f"checkpoint-*{PARTIAL}"):
        if is_sealed(partial) or remove_unfinished(partial) or _is_unmarked(partial):
            skipped.append(f"skipped {partial.name}: the run ended while it was being written")
            shutil.rmtree(partial, ignore_errors=True)
    for step, path in reversed(checkpoints(folder)):
        reason = defect(path)
        if reason is None:
            check_form(path)
            return (step, path), skipped
        aside = _free(path.with_name(f"damaged-{path.name}"))
        path.rename(aside)
        skipped.append(f"skipped {path.name}: {reason}; it is kept as {aside.name}")
    return None, skipped


def _is_unmarked(partial: Path) -> bool:
    """Returns whether a folder is one of a run that was killed before it marked it, or while it removed it.

    It is empty, or holds parts that other ranks wrote after the mark was gone. No process trains in the run now.
    """
    if _UNMARKED.fullmatch(partial.name) is None or partial.is_symlink():
        return False
    held = [path for path in partial.rglob("*") if path != partial / "new"]
    return all(path.parent == partial / "new" and _PART.fullmatch(path.name) for path in held)


def prune(folder: Path, keep: int) -> None:
    """Removes all but the newest ``keep`` of the checkpoints that the run has written."""
    found = [path for _, path in checkpoints(folder)]
    for path in [path for path in found if is_sealed(path)][:-keep]:
        # The manifest goes last: what a kill leaves of a checkpoint is known by it, and goes the next time.
        for file in sorted(path.iterdir(), key=lambda file: file.name == MANIFEST):
            file.unlink()
    for path in found:
        # Not empty: a checkpoint that is kept, or somebody's own.
        with contextlib.suppress(OSError):
            path.rmdir()


def _free(path: Path) -> Path:
    """Returns the path, or the path with a number after it if something is there already."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(found for found in itertools.chain([path], numbered) if not os.path.lexists(found))


def _are_facts(value: object) -> TypeGuard[FileFacts]:
    return isinstance(value, dict) and isinstance(value.get("bytes"), int) and isinstance(value.get("sha256"), str)
