"""The page of ``diffattn lens``: maps that the reader's browser makes from the model's own queries, keys and λ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffattn.report import charts
from diffattn.report.map_chart import map_figure, scale
from diffattn.report.page import render_scripted


def render_lens(result: Mapping[str, Any]) -> str:
    """One self-contained HTML page of what :func:`diffattn.probes.lens.lens` returned."""
    return render_scripted(
        "lens.html",
        "lens.js",
        {**result, "picture": None},
        names=[model["name"] for model in result["models"]],
        layers=[layer["layer"] for layer in result["models"][0]["layers"]],
        heads=result["models"][0]["heads"],
        count=len(result["tokens"]),
        answer=None if result["answer"] is None else "".join(result["tokens"][slice(*result["answer"])]),
        halves=any(model["dtype"] == "float16" for model in result["models"]),
        differential=any(layer["lam"] is not None for model in result["models"] for layer in model["layers"]),
        command=result["command"],
    )


def lens_pngs(names: Sequence[str], path: Path) -> list[Path]:
    """The pictures of models of these names: the first is ``path``, a second has its name behind that of the file.

    >>> [str(file) for file in lens_pngs(["v1", "runs/v2"], Path("maps.png"))]
    ['maps.png', 'maps-runs-v2.png']
    """
    return [path, *(path.with_stem(f"{path.stem}-{name.replace('/', '-')}") for name in names[1:])]


def write_lens_pngs(result: Mapping[str, Any], path: Path) -> list[Path]:
    """The ``picture`` of what ``lens`` returned: the maps of one head, one file per model, on one scale."""
    maps = result["picture"]
    names = list(maps["variants"])
    written = lens_pngs(names, path)
    limit, largest = scale(maps)
    for name, target in zip(names, written, strict=True):
        with charts.style():
            charts.write_png(map_figure(maps, name, limit, largest, wide=True), target)
    return written
