"""`report.html` of a comparison, one file that opens offline, and the picture of it for a README."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffattn.humanize import exact, signed
from diffattn.report import charts
from diffattn.report.curve_chart import curve_alt, curve_caption, curve_figure, names_of
from diffattn.report.difference_chart import (
    difference_alt,
    difference_figure,
    interval_heading,
    interval_text,
)
from diffattn.report.format import BASELINE, cell, present
from diffattn.report.map_chart import lambda_text, map_alt, map_figure, scale
from diffattn.report.page import render
from diffattn.report.picture import picture_figure


def render_compare(result: dict[str, Any], curves: list[dict[str, Any]], maps: dict[str, Any]) -> str:
    """The page of a comparison, as HTML.

    Args:
        result: `variants` (measures by variant), `pairs` (difference, verdict, parameter ratio), `recipe`, `versions`,
            `data`, `seeds`, `command`.
        curves: one entry per run: `attention`, `seed`, and the points of `train` and `validation` (tokens, loss).
        maps: `text`, `tokens`, `layer`, `head` and per variant `map_pos`, `lam_map_neg`, `map_diff` (T×T) and `lam`;
            empty for none.

    Raises:
        DataError: a map whose sides are not the number of tokens.
    """
    seeds = len(result["seeds"])
    return render(
        "compare.html",
        baseline=BASELINE,
        names=list(result["variants"]),
        seeds=result["seeds"],
        interval_heading=interval_heading(seeds),
        pairs=[_pair(result, name) for name in result["pairs"]],
        differences=_differences(result),
        curves=charts.picture(lambda wide: curve_figure(curves, wide), curve_alt(curves)) if curves else None,
        curve_caption=curve_caption(curves),
        rows=_rows(result),
        maps=_maps(maps),
        details={title: list(_flat(result.get(title.lower()) or {})) for title in ("Recipe", "Data", "Versions")},
        command=result["command"],
    )


def render_picture(curves: list[dict[str, Any]], maps: dict[str, Any], path: str | Path) -> None:
    """The loss curves and the maps as one PNG, 1200 pixels wide."""
    with charts.style():
        charts.write_png(picture_figure(curves, maps, names_of(curves)), path, dpi=72)


def _pair(result: Mapping[str, Any], name: str) -> dict[str, str]:
    pair = result["pairs"][name]
    difference = pair["val_loss_difference"]
    ends = ("mean", "low", "high")
    return {
        "name": name,
        "verdict": pair["verdict"],
        "colour": charts.look(name, list(result["variants"])).colour,
        "mean": signed(difference["mean"]),
        "interval": interval_text(difference, len(result["seeds"])),
        "exact": ", ".join(f"{end} {exact(difference[end])}" for end in ends if difference[end] is not None),
        "ratio": f"{pair['parameters_ratio']:.4f}×",
    }


def _differences(result: Mapping[str, Any]) -> charts.Picture | None:
    if not result["pairs"]:
        return None
    return charts.picture(lambda wide: difference_figure(result, wide), difference_alt(result))


def _rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    variants = result["variants"]
    baseline = variants.get(BASELINE)
    return [
        {
            "measure": measure,
            "cells": [cell(measure, variants[name], baseline if name != BASELINE else None) for name in variants],
        }
        for measure in present(result)
    ]


def _maps(maps: Mapping[str, Any]) -> dict[str, Any] | None:
    if not maps.get("variants") or not maps.get("tokens"):
        return None
    limit, largest = scale(maps)

    def shown(name: str) -> dict[str, Any]:
        picture = charts.picture(lambda wide: map_figure(maps, name, limit, largest, wide), map_alt(maps, name))
        place = f"layer {maps['layer']}, head {maps['head']}"
        lam = lambda_text(maps["variants"][name])
        return {
            "name": name,
            "title": f"{place}, {lam}" if lam else place,
            "picture": picture,
            "share": f"{100 * picture.wide.width / charts.WIDE:.1f}%",
        }

    return {
        "text": maps["text"],
        "limit": f"{limit:g}",
        "saturates": largest > limit,
        "variants": [shown(name) for name in maps["variants"]],
    }


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as dotted names and values."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
