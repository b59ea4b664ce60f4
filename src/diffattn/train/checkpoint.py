"""Checkpoints that survive a kill at any moment: complete, verified by content, or skipped by name."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

from diffattn.files import PARTIAL, write_json

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
        skipped.append(f"skipped {partial.name}: the run ended while it was being written")
        shutil.rmtree(partial)
    for step, path in reversed(checkpoints(folder)):
        reason = defect(path)
        if reason is None:
            return (step, path), skipped
        aside = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        skipped.append(f"skipped {path.name}: {reason}; it is kept as {aside.name}")
    return None, skipped


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints."""
    for _, path in checkpoints(folder)[:-keep]:
        shutil.rmtree(path)


def _digest(file: Path) -> dict[str, int | str]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
