"""One compact figure for a README: the loss curves on the left, every variant's maps on the right."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from diffattn.report import charts
from diffattn.report.curve_chart import Curves, draw_curves, draw_legend, legend_height
from diffattn.report.map_chart import (
    PANELS,
    colour_bar,
    draw_map,
    label_room,
    label_tokens,
    lambda_text,
    panels,
    scale,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, SIDE, GAP, TITLE = 1200, 206, 12, 40
LEFT, CURVES_WIDTH = 60, 410
FONT = 9.5


def picture_figure(curves: Curves, maps: Mapping[str, Any], names: Sequence[str]) -> "Figure":
    """The figure: one row of maps per variant, the two panels of curves as high as all of them."""
    tokens, rows = maps["tokens"], list(maps["variants"])
    font = min(FONT, SIDE / len(tokens) * 0.95)
    room = label_room(tokens, font)
    step = SIDE + TITLE
    below = max(room + 8, 52)
    height = 4 + len(rows) * step + below
    fig = charts.figure(WIDTH, height)

    columns = max(len(names), 3)
    curves_top, between = legend_height(curves, columns) + 40, 74
    panel = (height - curves_top - between - 50) / 2
    for place, (part, title) in enumerate((("train", "Training loss"), ("validation", "Validation loss"))):
        ax = charts.axes(fig, LEFT, curves_top + place * (panel + between), CURVES_WIDTH, panel)
        draw_curves(ax, curves, part)
        ax.set_title(title)
    draw_legend(fig, curves, columns=columns, left=LEFT, top=10)

    limit, largest = scale(maps)
    across = WIDTH - 3 * SIDE - 2 * GAP - 4
    image: Any = None
    for row, name in enumerate(rows):
        entry, top = maps["variants"][name], TITLE + row * step
        found = panels(entry, tokens)
        for column, (key, weights) in enumerate(found.items()):
            ax = charts.axes(fig, across + column * (SIDE + GAP), top, SIDE, SIDE)
            image = draw_map(ax, weights, limit)
            label_tokens(ax, tokens, font, rows=column == 0, columns=row == len(rows) - 1)
            ax.set_title(PANELS[key].split(" = ")[0], fontsize=11, weight="normal", pad=4)
        place_of_name = (across / WIDTH, 1 - (top - 20) / height)
        note = f"layer {maps['layer']}, head {maps['head']}"
        lam = lambda_text(entry)
        colour = charts.look(name, rows).colour
        fig.text(*place_of_name, name, weight="bold", fontsize=12, color=colour, va="bottom")
        beside = (place_of_name[0] + 66 / WIDTH, place_of_name[1])
        fig.text(*beside, f"{note}, {lam}" if lam else note, fontsize=11, va="bottom")
        if row == 0 and len(found) == 1:
            beside_it = across + SIDE + GAP + 24
            sentence = textwrap.fill(maps["text"], 58, max_lines=4)
            fig.text(
                beside_it / WIDTH, 1 - top / height, sentence, fontsize=11, style="italic", va="top", linespacing=1.4
            )
            bar = charts.axes(fig, beside_it, top + 0.55 * SIDE, 2 * SIDE - 40, 12)
            colour_bar(bar, image, limit, largest, across=True)
    return fig
