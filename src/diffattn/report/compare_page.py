"""The page of a comparison, ``report.html``, which opens offline, and the picture of it for a README."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from diffattn.humanize import exact, signed
from diffattn.report import charts
from diffattn.report.compare_table import Cell, Measure, cell, present
from diffattn.report.curve_chart import PARTS, Curves, curve_caption, curve_chart, names_of
from diffattn.report.difference_chart import difference_chart, interval_heading, interval_text
from diffattn.report.map_chart import PANELS, lambda_text, map_alt, map_chart, panels, scale
from diffattn.report.page import render_charts
from diffattn.results.comparison import ComparisonResult
from diffattn.results.maps import HeadMaps
from diffattn.variants import BASELINE

if TYPE_CHECKING:
    import altair as alt

    Beside = TypeVar("Beside", alt.HConcatChart, alt.VConcatChart)

PICTURE_WIDTH, PICTURE_SIDE = 1200, 190


class Row(NamedTuple):
    """One measure of the table with the cells of all variants."""

    measure: Measure
    cells: list[Cell]


class Pair(NamedTuple):
    """One row of the table of pairs, as it is read; ``colour`` is the variant's, ``exact`` has every digit."""

    name: str
    verdict: str
    colour: str
    mean: str
    interval: str
    exact: str
    ratio: str


class Maps(NamedTuple):
    """One variant's maps on the page: its name, what is said beside it, and the names of their charts."""

    name: str
    title: str
    charts: list[str]


def render_compare(result: ComparisonResult, curves: Curves, maps: HeadMaps | None) -> str:
    """The page of a comparison, as HTML.

    Args:
        result: what was measured.
        curves: one for each run; empty for none.
        maps: of one head of each variant; None for none.

    Raises:
        DataError: a map whose sides are not the number of tokens.
    """
    drawn: dict[str, charts.AnyChart] = {}
    if result.pairs:
        drawn["differences-chart"] = difference_chart(result)
    if curves:
        drawn |= {f"{part}-chart": curve_chart(curves, part) for part in PARTS}
    shown = []
    for place, name in enumerate(maps.variants if maps is not None else ()):
        assert maps is not None
        own = {f"map-{place}-{key}": chart for key, chart in _maps(maps, name).items()}
        drawn |= own
        shown.append(Maps(name, _title(maps, name), list(own)))
    limit, largest = scale(maps) if maps is not None else (0.0, 0.0)
    seeds = len(result.seeds)
    details: dict[str, Mapping[str, object]] = {
        "Recipe": result.recipe, "Data": result.data, "Versions": result.versions
    }  # fmt: skip
    return render_charts(
        "compare.html",
        drawn,
        baseline=BASELINE,
        names=list(result.variants),
        seeds=result.seeds,
        interval_heading=interval_heading(seeds),
        pairs=[_pair(result, name) for name in result.pairs],
        curves=[f"{part}-chart" for part in PARTS] if curves else [],
        curve_caption=curve_caption(curves),
        rows=_rows(result),
        maps=shown,
        text="" if maps is None else maps.text,
        causal=maps is None or maps.causal,
        limit=f"{limit:g}",
        saturates=largest > limit,
        details={title: list(_flat(settings)) for title, settings in details.items()},
        command=result.command,
    )


def render_picture(curves: Curves, maps: HeadMaps, path: str | Path) -> None:
    """The loss curves and the maps as one PNG, 1200 pixels wide."""
    import altair as alt

    rows = []
    for name in maps.variants:
        title = alt.TitleParams(name, subtitle=_title(maps, name), color=_colour(name, names_of(curves)), fontSize=15)
        # One scale holds for all maps, and is drawn once.
        drawn = _maps(maps, name, side=PICTURE_SIDE, legends=("map_pos",) if name == list(maps.variants)[-1] else ())
        rows.append(_apart(alt.hconcat(*drawn.values(), spacing=12, title=title)))
    height = max(240, len(rows) * (PICTURE_SIDE + 130) // 2 - 110)
    losses = [curve_chart(curves, part).properties(width=400, height=height) for part in PARTS]
    sentence = textwrap.shorten(f"“{maps.text}”", 110, placeholder="…”")
    title = alt.TitleParams(sentence, fontStyle="italic", fontWeight="normal")
    right = _apart(alt.vconcat(*rows, spacing=18, title=title))
    whole = alt.hconcat(_apart(alt.vconcat(*losses, spacing=20)), right, spacing=36)
    charts.write_png(_apart(whole), path, width=PICTURE_WIDTH)


def _apart(chart: Beside) -> Beside:
    """Charts beside each other, each with its own legend."""
    return chart.resolve_scale(color="independent", strokeDash="independent", shape="independent")


def _maps(
    maps: HeadMaps, name: str, *, side: int | None = None, legends: Collection[str] = tuple(PANELS)
) -> dict[str, charts.AnyChart]:
    limits, entry = scale(maps), maps.variants[name]
    return {
        key: map_chart(
            weights, maps.tokens, PANELS[key], limits, map_alt(maps, name, key), side=side, legend=key in legends
        )
        for key, weights in panels(entry, maps.tokens, causal=maps.causal).items()
    }


def _colour(name: str, names: Sequence[str]) -> str:
    return charts.look(name, names).colour


def _title(maps: HeadMaps, name: str) -> str:
    setting, lam = f"layer {maps.layer}, head {maps.head}", lambda_text(maps.variants[name])
    return f"{setting}, {lam}" if lam else setting


def _pair(result: ComparisonResult, name: str) -> Pair:
    pair = result.pairs[name]
    difference = pair.val_loss_difference
    ends = {"mean": difference.mean, "low": difference.low, "high": difference.high}
    return Pair(
        name=name,
        verdict=pair.verdict,
        colour=_colour(name, list(result.variants)),
        mean=signed(difference.mean),
        interval=interval_text(difference, len(result.seeds)),
        exact=", ".join(f"{end} {exact(value)}" for end, value in ends.items() if value is not None),
        ratio=f"{pair.parameters_ratio:.4f}×",
    )


def _rows(result: ComparisonResult) -> list[Row]:
    baseline = result.variants.get(BASELINE)
    return [
        Row(
            measure,
            [
                cell(measure, variant, baseline if name != BASELINE else None)
                for name, variant in result.variants.items()
            ],
        )
        for measure in present(result)
    ]


def _flat(tree: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as dotted names and values."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
