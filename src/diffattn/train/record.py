"""Reads the record of a run from its folder, and checks it against the seals before any of it is used."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffattn.config_fields import is_measure
from diffattn.errors import CheckpointError, ConfigError
from diffattn.files import file_facts
from diffattn.sealed import SEAL, read_sealed
from diffattn.train.callbacks import MetricsRow, parse_metrics, warn
from diffattn.train.checkpoints.sealing import MANIFEST, WAY_OUT, checkpoints, defect, has_run_files, sealed_rows

NO_SEAL = "an earlier version of diffattn began this run and sealed nothing; its numbers are taken as they are"

# The config.json of a run: an object for each of recipe, model and data, and for source and options if there are any.
Claim = dict[str, Mapping[str, object]]


@dataclass(frozen=True)
class TrainResult:
    """The measurements of a finished run."""

    folder: Path
    val_loss: float
    """The held-out loss in nats per token."""
    bits_per_byte: float | None
    """The held-out loss in bits per byte of the text; None for an encoder, which is asked for some tokens alone."""
    train_tokens_per_second: float
    """The median training speed."""

    def numbers(self) -> dict[str, Any]:
        """Returns the measurements by name, without the folder."""
        return {name: value for name, value in vars(self).items() if name != "folder"}

    @property
    def model_folder(self) -> Path:
        """The folder in which ``save_pretrained`` wrote the trained model and its tokenizer."""
        return self.folder / "model"


def check_claim(folder: Path, config: Claim) -> None:
    """Checks that ``config.json`` says the same as ``config``.

    Raises:
        CheckpointError: it is damaged, or was changed after it was written.
        ConfigError: another recipe, model, text or source.
    """
    file = folder / "config.json"
    stored = read_sealed(file, way_out=WAY_OUT)
    wanted = json.loads(json.dumps(config))
    for part in ("recipe", "model", "data", *(["source"] if "source" in stored else [])):
        if not isinstance(stored.get(part), dict):
            raise CheckpointError(f"{file} is damaged ({part} is no object)", "the config.json of a run", WAY_OUT)
    if ("source" in stored) != ("source" in wanted):
        began = f"from {stored['source'].get('folder')}" if "source" in stored else "without a model to start from"
        raise ConfigError(
            f"{folder} was started {began}", "the same start", "resume it with the same --from or choose another --out"
        )
    for part in ("recipe", "model", "data", "source"):
        for key in wanted.get(part, {}):
            then = stored.get(part, {}).get(key)
            # A folder may move, so the name of a text and the path of a source may differ.
            if then != wanted[part][key] and (part, key) not in (("source", "folder"), ("data", "name")):
                raise ConfigError(
                    f"{folder} was started with {part} {key} = {then!r}, now it is {wanted[part][key]!r}",
                    "the same settings",
                    "resume with the same settings or choose another --out",
                )


def read_result(folder: Path) -> TrainResult | None:
    """Reads the result of a run folder; returns None if the run is not finished.

    Raises:
        CheckpointError: a file of the run is damaged, missing, or was changed after the run ended.
    """
    file = folder / "result.json"
    if not file.exists():
        return None
    stored = read_sealed(file, way_out=WAY_OUT)
    names = [field.name for field in dataclasses.fields(TrainResult) if field.name != "folder"]
    absent = [name for name in ("bits_per_byte",) if name in stored and stored[name] is None]
    if not all(is_measure(stored.get(name)) for name in names if name not in absent):
        raise CheckpointError(f"{file} is damaged", f"the numbers {', '.join(names)} in it", WAY_OUT)
    if SEAL in stored:
        for name, expected in stored["files"].items():
            if not (folder / name).is_file() or file_facts(folder / name) != expected:
                raise CheckpointError(
                    f"{folder / name} is missing, or was changed after the run ended", "the file as it was", WAY_OUT
                )
    else:
        _check_unsealed(folder, file)
        warn(f"{folder}: {NO_SEAL}")
    return TrainResult(folder, *(stored[name] for name in names))


def _check_unsealed(folder: Path, file: Path) -> None:
    """Raises if a file lacks its seal though the run's other files have theirs."""
    config = folder / "config.json"
    known = [path for _, path in checkpoints(folder) if defect(path) is None]
    if (config.exists() and SEAL in read_sealed(config, way_out=WAY_OUT)) or any(map(has_run_files, known)):
        raise CheckpointError(
            f"{file} was changed after it was written: its seal is gone", "the file as it was written", WAY_OUT
        )


def kept_rows(start: tuple[int, Path] | None) -> list[MetricsRow]:
    """Returns the rows of ``metrics.jsonl`` up to a checkpoint; later rows are measured again."""
    if start is None:
        return []
    _, checkpoint = start
    if not has_run_files(checkpoint):
        raise CheckpointError(
            f"{checkpoint / MANIFEST} was changed after it was written: it does not name config.json and metrics.jsonl",
            "the file as it was written",
            WAY_OUT,
        )
    return parse_metrics(sealed_rows(checkpoint))
