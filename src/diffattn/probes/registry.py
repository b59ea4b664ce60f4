"""The studies of ``diffattn eval``: ours by name, and those of plug-ins, each loaded when it is asked for.

A study of ours is one file with its record, and a line in ``OURS``. Another package adds one by an entry point of the
group ``diffattn.studies``: the name of the study, and ``module:object`` of its record.
"""

from __future__ import annotations

import importlib
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from diffattn.errors import ConfigError, UnsupportedError
from diffattn.probes.study import Study

GROUP = "diffattn.studies"
OURS = {
    "retrieval": "diffattn.probes.retrieval:STUDY",
    "noise": "diffattn.probes.noise:STUDY",
    "noise_by_head": "diffattn.probes.noise:BY_HEAD",
    "icl": "diffattn.probes.icl:STUDY",
    "outliers": "diffattn.probes.outliers:STUDY",
    "low_bit": "diffattn.probes.low_bit:STUDY",
    "standard": "diffattn.probes.harness:STUDY",
    "long_context": "diffattn.probes.long_context:STUDY",
}
"""Our studies, in the order in which they are shown."""


def plug_ins() -> dict[str, EntryPoint]:
    """Returns the studies of other packages by name; nothing of them is imported. Names of ours are left out."""
    return {point.name: point for point in entry_points(group=GROUP) if point.name not in OURS}


def load_study(name: str) -> Study[Any]:
    """Returns a study by its name.

    Raises:
        ConfigError: there is no study of this name.
        UnsupportedError: a plug-in that cannot be imported, or whose object is no study of this name.
    """
    if name in OURS:
        module, _, record = OURS[name].partition(":")
        ours: Study[Any] = getattr(importlib.import_module(module), record)
        return ours
    points = plug_ins()
    if name not in points:
        raise ConfigError(f"study is {name!r}", f"one of {', '.join([*OURS, *points])}", "see diffattn eval --list")
    return _plugged_in(points[name])


def listing() -> tuple[dict[str, str], list[UnsupportedError]]:
    """Returns the sentence of each study by its name, and an error for each plug-in that is broken."""
    found, broken = {}, []
    for name in [*OURS, *plug_ins()]:
        try:
            found[name] = load_study(name).sentence
        except UnsupportedError as error:
            broken.append(error)
    for point in entry_points(group=GROUP):
        if point.name in OURS:
            given = f"{_described(point)} has the name of one of diffattn's own"
            broken.append(UnsupportedError(given, "another name", "update or uninstall the plug-in"))
    return found, broken


def _plugged_in(point: EntryPoint) -> Study[Any]:
    """Imports the study of another package."""
    try:
        study = point.load()
    # The code of others may raise anything when it is imported.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        given = f"{_described(point)} cannot be imported ({reason})"
        raise UnsupportedError(given, "a package that loads", "update or uninstall the plug-in") from error
    if not isinstance(study, Study) or study.name != point.name:
        found = f"named {study.name!r}" if isinstance(study, Study) else f"a {type(study).__name__}"
        wanted = f"a diffattn.probes.study.Study named {point.name!r}"
        raise UnsupportedError(f"{_described(point)} is {found}", wanted, "update or uninstall the plug-in")
    return study


def _described(point: EntryPoint) -> str:
    package = "an unknown package" if point.dist is None else f"{point.dist.name} {point.dist.version}"
    return f"the study {point.name!r} of {package}"
