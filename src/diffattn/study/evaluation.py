"""``diffattn eval``: one study of several models, which are read alike, compared and given their intervals.

Where a model stands for several runs of other seeds, its values are the runs' means and intervals are over runs; where
it is one folder they are over samples. Differences are from the first model, value by value where both were given the
same samples or have as many runs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from diffattn.checkpoint_files import folder_name
from diffattn.data.text import read_corpus, split_by_document
from diffattn.errors import ConfigError
from diffattn.model.loading import Device, Dtype, load, load_config
from diffattn.study.compare import versions
from diffattn.study.options import OPTIONS
from diffattn.study.statistics import interval, paired_difference
from diffattn.study.studies import STUDIES, Given

# By panel and place, the values of every run.
Runs = dict[tuple[str, float], list[list[float]]]


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
    dtype: Dtype = "auto",
    device: Device = "auto",
    command: str = "diffattn.evaluate(...)",
    on_progress: Callable[[str, int, int], None] = lambda name, done, all_: None,
) -> dict[str, Any]:
    """Run one study on several models.

    Args:
        study: a name in ``STUDIES``.
        models: as :func:`parse_models` reads them.
        options: an instance of the study's options; default: its defaults.
        text: a file, a folder or the id of a data set; the held-out documents of it are read (``data/text.py``).
        dtype, device: as in :func:`diffattn.model.loading.load`.
        command: what is said to have made the result.
        on_progress: called with a run's name, steps done and steps in all.

    Returns:
        ``study``, ``options``, ``text``, ``models`` (folders and parameters by name), and ``points``: for every panel
        and place the ``mean``, 95% interval (``low``, ``high``, None of one value) and number of values of each model,
        and the same of its ``difference`` from the first model.

    Raises:
        ConfigError, DataError, CheckpointError, UnsupportedError: what cannot be used, in one line.
    """
    if study not in STUDIES:
        raise ConfigError(f"study is {study!r}; wanted one of {', '.join(STUDIES)}")
    options = options or OPTIONS[study]()
    named = parse_models(models)
    documents = split_by_document(read_corpus(text)).validation
    # Before any is read for minutes.
    for entry in named:
        for folder in entry.folders:
            load_config(folder)
    found: dict[str, Runs] = {}
    facts: dict[str, Any] = {}
    for entry in named:
        mine = found.setdefault(entry.name, {})
        for folder in entry.folders:
            model, tokenizer = load(folder, dtype, device)
            facts.setdefault(entry.name, {"folders": [], "parameters": []})
            facts[entry.name]["folders"].append(str(folder))
            facts[entry.name]["parameters"].append(model.num_parameters())
            given = Given(model, tokenizer, documents, functools.partial(on_progress, entry.name))
            for point in STUDIES[study].measure(given, options):
                mine.setdefault((point.panel, point.x), []).append(point.values)
    return {
        "study": study,
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()},
        "text": text,
        "models": facts,
        "points": _compared(found),
        "axes": {"x": STUDIES[study].x, "y": STUDIES[study].y, "logarithmic": STUDIES[study].logarithmic},
        "versions": versions(),
        "command": command,
    }


def _compared(found: dict[str, Runs]) -> list[dict[str, Any]]:
    """Points in the order in which they were measured, each with all models that have it."""
    keys = list(dict.fromkeys(key for mine in found.values() for key in mine))
    points = []
    for panel, x in keys:
        runs = {name: mine[panel, x] for name, mine in found.items() if (panel, x) in mine}
        first = runs.get(next(iter(found)))
        points.append({"panel": panel, "x": x, "models": {name: _entry(own, first) for name, own in runs.items()}})
    return points


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
