"""``diffattn eval``: one study of several models, each with its mean, its interval, and its difference from the first.

Where a model has several runs of other seeds, its values are the runs' means and intervals are over runs; where it is
one folder they are over samples. Differences are from the first model, value by value where both were given the same
samples or have as many runs.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Self

from diffattn.checkpoint_files import folder_name, weights_digest
from diffattn.data.roundtrip import check_round_trip
from diffattn.data.text import read_corpus, split_by_document
from diffattn.errors import CheckpointError, ConfigError
from diffattn.files import parse_json, writable_folder, write_json
from diffattn.folders import KEPT, own_folder
from diffattn.intervals import interval, paired_difference
from diffattn.machine import Provenance
from diffattn.model.loading import load, load_config, positions_of
from diffattn.probes.options import EvaluateOptions, StudyOptions
from diffattn.probes.registry import load_study
from diffattn.probes.study import Point, StudiedModel
from diffattn.progress import OnStage, Stage, unseen
from diffattn.results.base import Result
from diffattn.results.study import ModelPoint, PointResult, StudyModel, StudyResult
from diffattn.sealed import SEAL, sealed, unbroken

Runs = dict[tuple[str, float, float | None], list[list[float]]]
"""The values of every run of a model, by the panel, the ``x`` and the ``by`` of a point."""


class Named(NamedTuple):
    """A model of the study."""

    name: str
    """The name in the result."""
    folders: tuple[Path, ...]
    """The folders of its runs."""


@dataclass(frozen=True)
class _Run(Result):
    """The measured points of one run, as they are kept in a file."""

    folder: str
    parameters: int
    points: tuple[Point, ...]

    def to_json(self) -> dict[str, object]:
        return super().to_json() | {"points": [point._asdict() for point in self.points]}

    @classmethod
    def from_json(cls, content: Any) -> Self:
        points = tuple(Point(**point) for point in content["points"])
        return cls(content["folder"], content["parameters"], points)


def parse_models(words: Sequence[str]) -> list[Named]:
    """Reads ``FOLDER``, or ``NAME=FOLDER,FOLDER…`` for the runs of one model with several seeds.

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
            wanted = "FOLDER, or NAME=FOLDER,FOLDER for runs of several seeds"
            raise ConfigError(f"model {word!r} given", wanted, "correct it")
        models.append(Named(name or folder_name(paths[0]) or str(paths[0]), paths))
    names = [model.name for model in models]
    if not names or len(set(names)) < len(names):
        given = f"models are {', '.join(names) or 'none'}"
        raise ConfigError(given, "at least one, each of a name of its own", "write NAME=FOLDER")
    return models


def evaluate(
    study: str,
    models: Sequence[str],
    options: StudyOptions | None = None,
    shared: EvaluateOptions | None = None,
    *,
    command: str = "diffattn.evaluate(...)",
    on_progress: Callable[[str, int, int], None] = lambda name, done, all_: None,
    on_stage: OnStage = unseen,
    on_note: Callable[[str], None] = lambda line: None,
) -> StudyResult:
    """Runs one study on several models.

    Args:
        study: the name of a study, ours or a plug-in's (``diffattn eval --list``).
        models: the models, as :func:`parse_models` reads them.
        options: the study's own options; default: those of an instance of its options' class.
        shared: the options that are the same for every study, such as the text. What is in the folder ``keep`` is not
            measured again, unless the run's files, the text, the options or diffattn's version changed.
        command: the command that made the result, to be named in it.
        on_progress: called with a run's name, steps done and steps in all.
        on_stage: called with what is done before a model is measured.
        on_note: called with a line that a person should see, such as what a tokenizer loses.

    Raises:
        ConfigError, DataError, CheckpointError, UnsupportedError: a study, a model, a text or options that cannot be
            used, in one line.
    """
    record = load_study(study)
    shared = shared or EvaluateOptions()
    named = parse_models(models)
    if shared.keep is not None:
        own_folder(shared.keep, KEPT, option="--keep")
    # Before text is read, and models for minutes; one length for all, so that they are given the same samples.
    known = [positions_of(load_config(folder)) for entry in named for folder in entry.folders]
    options = (options or record.options()).fitted(min((limit for limit in known if limit is not None), default=None))
    on_stage(Stage("reading the text"))
    corpus = read_corpus(shared.text, text_column=shared.text_column, on_note=on_note)
    documents = split_by_document(corpus).validation
    if shared.keep is not None:
        writable_folder(shared.keep)
    # Another release may measure otherwise.
    asked = json.dumps([version("diffattn"), study, asdict(options), corpus.digest, shared.dtype])
    found: dict[str, Runs] = {}
    measured: dict[str, StudyModel] = {}
    for entry in named:
        mine = found.setdefault(entry.name, {})
        parameters = []
        for folder in entry.folders:
            file = None if shared.keep is None else shared.keep / f"{study}-{_identity(folder, asked)}.json"
            run = _kept(file)
            if run is None:
                on_stage(Stage(f"loading {folder}"))
                model, tokenizer = load(folder, shared.dtype, shared.device)
                on_stage(Stage(f"getting ready to measure {folder}"))
                check_round_trip(tokenizer, documents, lossy=shared.lossy_tokenizer, on_note=on_note)
                subject = StudiedModel(
                    model=model,
                    tokenizer=tokenizer,
                    documents=documents,
                    on_progress=functools.partial(on_progress, entry.name),
                    rows=None if file is None else file.with_suffix(".jsonl"),
                )
                run = _Run(str(folder), model.num_parameters(), tuple(record.measure(subject, options)))
                if file is not None:
                    write_json(file, sealed(run.to_json()))
            parameters.append(run.parameters)
            for point in run.points:
                mine.setdefault((point.panel, point.x, point.by), []).append(point.values)
        folders = [str(folder) for folder in entry.folders]
        measured[entry.name] = StudyModel(folders=folders, parameters=parameters)
    return StudyResult(
        study=study,
        options=asdict(options),
        text=shared.text,
        models=measured,
        points=compared(found),
        axes=record.axes,
        versions=Provenance.here().to_json(),
        command=command,
    )


def compared(found: dict[str, Runs]) -> list[PointResult]:
    """Returns the points of a study, in the order in which they were measured, each with all models that have it.

    Args:
        found: the values of each model's runs, by model; the others are compared with the first.
    """
    keys = list(dict.fromkeys(key for mine in found.values() for key in mine))
    points = []
    for key in keys:
        panel, x, by = key
        runs = {name: mine[key] for name, mine in found.items() if key in mine}
        first = runs.get(next(iter(found)))
        models = {name: _model_point(own, first) for name, own in runs.items()}
        points.append(PointResult(panel=panel, x=x, by=by, models=models))
    return points


def _identity(folder: Path, asked: str) -> str:
    """Returns a name for what is asked of the run in a folder; it changes when the files do."""
    # The size and time of the weights do not do: models of several seeds, unpacked from one archive, may share both.
    digest = hashlib.sha256((asked + weights_digest(folder)).encode())
    for file in sorted(folder.glob("*.json")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:24]


def _kept(file: Path | None) -> _Run | None:
    """Returns what is kept of a run; a file that cannot be read counts as none, since it is written whole.

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
            f"{file} was changed after it was written: its seal does not fit the rest",
            "the file as it was",
            "remove it, and the model is measured again",
        )
    return _Run.from_json(run)


def _model_point(runs: list[list[float]], first: list[list[float]] | None) -> ModelPoint:
    """Returns one model's mean with its interval, and its difference from the first where the two can be paired."""
    own = _values(runs)
    difference = None
    if runs is not first and first is not None and len(runs) == len(first) and len(own) == len(_values(first)):
        difference = paired_difference(own, _values(first))
    return ModelPoint(**vars(interval(own)), values=len(own), difference=difference, is_first=runs is first)


def _values(runs: list[list[float]]) -> list[float]:
    """Returns the mean of each run where there are several, else the samples of the one run."""
    return [math.fsum(run) / len(run) for run in runs] if len(runs) > 1 else runs[0]
