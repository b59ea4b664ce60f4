"""What a run folder says of its run: read, and held against the seals, before any of it is believed."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffattn.config_fields import is_measure
from diffattn.errors import CheckpointError, ConfigError
from diffattn.files import file_facts
from diffattn.sealed import SEAL, read_sealed
from diffattn.train.callbacks import parse_metrics, read_metrics, warn
from diffattn.train.checkpoint import MANIFEST, WAY_OUT, checkpoints, defect, has_run_files, sealed_rows

# Of fields that were added since a run was started, by part of its config.json.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "recipe": {"anneal_fraction": 0.5},
    "model": {
        "attention_bias": False,
        "attention_output_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
        "dex_heads": None,
    },
}
NO_SEAL = "an earlier version of diffattn began this run and sealed nothing; its numbers are taken as they are"


@dataclass(frozen=True)
class TrainResult:
    """What a finished run measured: held-out loss in nats per token, bits per byte, median training speed."""

    folder: Path
    val_loss: float
    bits_per_byte: float
    train_tokens_per_second: float

    @property
    def model_folder(self) -> Path:
        """Where ``save_pretrained`` wrote the trained model and its tokenizer."""
        return self.folder / "model"


def check_claim(folder: Path, config: dict[str, Any]) -> bool:
    """Whether ``config.json`` has a seal, once it is known to say the same as ``config``.

    Raises:
        CheckpointError: it is damaged, or was changed after it was written.
        ConfigError: another recipe, model, text or source.
    """
    file = folder / "config.json"
    stored = read_sealed(file, way_out=WAY_OUT)
    wanted = json.loads(json.dumps(config))
    for part in ("recipe", "model", "data", *(["source"] if "source" in stored else [])):
        if not isinstance(stored.get(part), dict):
            raise CheckpointError(f"{file} is damaged ({part} is no object); {WAY_OUT}")
    if ("source" in stored) != ("source" in wanted):
        began = f"from {stored['source'].get('folder')}" if "source" in stored else "without a model to start from"
        raise ConfigError(f"{folder} was started {began}; resume it with the same --from or choose another --out")
    for part in ("recipe", "model", "data", "source"):
        for key in wanted.get(part, {}):
            # A folder may move, and a run of an earlier version knows fewer fields.
            then = stored.get(part, {}).get(key, _DEFAULTS.get(part, {}).get(key))
            if then != wanted[part][key] and (part, key) not in (("source", "folder"), ("data", "name")):
                raise ConfigError(
                    f"{folder} was started with {part} {key} = {then!r}, now it is "
                    f"{wanted[part][key]!r}; resume with the same settings or choose another --out"
                )
    return SEAL in stored


def read_result(folder: Path) -> TrainResult | None:
    """The result of a finished run folder, or None where it is not finished.

    Raises:
        CheckpointError: a file of the run is damaged, missing, or was changed after the run ended.
    """
    file = folder / "result.json"
    if not file.exists():
        return None
    stored = read_sealed(file, way_out=WAY_OUT)
    names = [field.name for field in dataclasses.fields(TrainResult) if field.name != "folder"]
    if not all(is_measure(stored.get(name)) for name in names):
        raise CheckpointError(f"{file} is damaged (it lacks one of the numbers {', '.join(names)}); {WAY_OUT}")
    if SEAL in stored:
        for name, expected in stored["files"].items():
            if not (folder / name).is_file() or file_facts(folder / name) != expected:
                raise CheckpointError(f"{folder / name} is missing, or was changed after the run ended; {WAY_OUT}")
    else:
        _check_unsealed(folder, file)
        warn(f"{folder}: {NO_SEAL}")
    return TrainResult(folder, *(stored[name] for name in names))


def _check_unsealed(folder: Path, file: Path) -> None:
    """Raise where a file lacks its seal though the run's others have theirs."""
    config = folder / "config.json"
    known = [path for _, path in checkpoints(folder) if defect(path) is None]
    if (config.exists() and SEAL in read_sealed(config, way_out=WAY_OUT)) or any(map(has_run_files, known)):
        raise CheckpointError(f"{file} was changed after it was written: its seal is gone; {WAY_OUT}")


def kept_rows(folder: Path, start: tuple[int, Path] | None, has_seal: bool) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl`` up to a checkpoint; what was measured behind it is measured again."""
    if start is None:
        return []
    step, checkpoint = start
    if has_run_files(checkpoint):
        return parse_metrics(sealed_rows(checkpoint))
    if has_seal:
        raise CheckpointError(
            f"{checkpoint / MANIFEST} was changed after it was written: it does not name config.json and "
            f"metrics.jsonl; {WAY_OUT}"
        )
    warn(f"{folder}: {NO_SEAL}")
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if row["step"] <= step]
    if not any(row["step"] == step for row in rows):
        raise CheckpointError(f"{folder / 'metrics.jsonl'} ends before step {step} of the checkpoint; {WAY_OUT}")
    return rows
