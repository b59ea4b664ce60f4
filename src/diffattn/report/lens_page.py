"""The page of ``diffattn lens``: maps that the reader's browser makes from the model's own queries, keys and λ."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from diffattn.errors import ConfigError
from diffattn.report import charts
from diffattn.report.map_chart import PANELS, lambda_text, map_alt, map_chart, panels, scale
from diffattn.report.page import render, script
from diffattn.results.lens import LensResult

SIDE = 300


def render_lens(result: LensResult) -> str:
    """One self-contained HTML page of what :func:`diffattn.probes.lens.lens` returned."""
    return render(
        "lens.html",
        scripts=[script("maps.js"), script("lens.js")],
        data={"data": dataclasses.replace(result, picture=None).to_json()},
        names=[model.name for model in result.models],
        layers=[layer.layer for layer in result.models[0].layers],
        heads=result.models[0].heads,
        count=len(result.tokens),
        answer=None if result.answer is None else "".join(result.tokens[slice(*result.answer)]),
        halves=any(model.dtype == "float16" for model in result.models),
        differential=any(layer.lam is not None for model in result.models for layer in model.layers),
        command=result.command,
    )


def lens_pngs(names: Sequence[str], path: Path) -> list[Path]:
    """The pictures of models of these names: the first is ``path``, a second has its name behind that of the file.

    >>> [str(file) for file in lens_pngs(["v1", "runs/v2"], Path("maps.png"))]
    ['maps.png', 'maps-runs-v2.png']
    """
    return [path, *(path.with_stem(f"{path.stem}-{name.replace('/', '-')}") for name in names[1:])]


def write_lens_pngs(result: LensResult, path: Path) -> list[Path]:
    """The ``picture`` of what ``lens`` returned: the maps of one head, one file per model, on one scale.

    Raises:
        ConfigError: the result has no picture.
    """
    import altair as alt

    maps = result.picture
    if maps is None:
        raise ConfigError("a result without a picture", "the maps of one head", "call lens with picture=(layer, head)")
    written = lens_pngs(list(maps.variants), path)
    for (name, entry), target in zip(maps.variants.items(), written, strict=True):
        drawn = [
            map_chart(weights, maps.tokens, PANELS[key], scale(maps), map_alt(maps, name, key), side=SIDE)
            for key, weights in panels(entry, maps.tokens).items()
        ]
        charts.write_png(alt.hconcat(*drawn, title=alt.TitleParams(name, subtitle=lambda_text(entry))), target)
    return written
