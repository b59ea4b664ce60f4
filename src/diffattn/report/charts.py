"""What every figure of a report shares: one look per variant, sizes in CSS pixels, an SVG that any browser shows.

A figure is measured in units of 1/72 inch, matplotlib's point: a unit is one CSS pixel when the figure is shown at
its own width, so a font size here is the size that is read. matplotlib is imported when a figure is drawn.
"""

import base64
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from diffattn.files import GENERATOR, write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, NARROW = 1100, 376
INK, MUTED, GRID = "#1b1f24", "#57606a", "#d8dee4"
FONT_STACK = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"


class Look(NamedTuple):
    """Colour (Okabe and Ito's set, safe for the colour-blind) and line style: a variant is known by either."""

    colour: str
    line: Any


LOOKS = {
    "softmax": Look("#222222", "-"),
    "diff_v1": Look("#0072B2", (0, (5, 2))),
    "diff_v2": Look("#D55E00", (0, (6, 2, 1.5, 2))),
    "gated": Look("#009E73", (0, (1.5, 1.5))),
}
MORE_LOOKS = (
    Look("#B0548A", (0, (9, 3))),
    Look("#8A6A00", (0, (3, 1, 1, 1, 1, 1))),
    Look("#4B6A9B", (0, (1, 1, 4, 1))),
)


def look(name: str, names: Sequence[str]) -> Look:
    """The look of a variant; those that have none of their own take one by their place in `names`."""
    if name in LOOKS:
        return LOOKS[name]
    others = [other for other in names if other not in LOOKS]
    return MORE_LOOKS[others.index(name) % len(MORE_LOOKS)]


class Image(NamedTuple):
    """An SVG as a data address, with its size in CSS pixels."""

    uri: str
    width: int
    height: int


class Picture(NamedTuple):
    """One figure for wide screens and one for narrow ones, with the words for those who see neither."""

    wide: Image
    narrow: Image
    alt: str


def picture(draw: "Callable[[bool], Figure]", alt: str) -> Picture:
    """Both renderings of a figure; `draw` is told whether the screen is wide."""
    with style():
        return Picture(svg(draw(True)), svg(draw(False)), alt)


@contextmanager
def style() -> Iterator[None]:
    """matplotlib as the reports want it, whatever the user's own settings; they come back at the end."""
    import matplotlib.style

    settings = {
        "font.family": "DejaVu Sans",
        "font.size": 12,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "axes.labelsize": 12,
        "axes.titlesize": 13,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "text.color": INK,
        "text.hinting": "none",
        # A token such as "$x$" is text, not a formula.
        "text.parse_math": False,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "xtick.labelsize": 11,
        "ytick.labelsize": 11,
        "legend.frameon": False,
        "legend.fontsize": 12,
        # Text stays text, and the same figure gives the same bytes.
        "svg.fonttype": "none",
        "svg.hashsalt": "diffattn",
    }
    with matplotlib.style.context(["default", settings]), warnings.catch_warnings():
        # The browser has the fonts for a token in another script; matplotlib only measures it.
        warnings.filterwarnings("ignore", message=r".*[Gg]lyph .*missing from.*")
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support .* natively")
        yield


def figure(width: float, height: float) -> "Figure":
    """An empty figure of this size in CSS pixels."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72), dpi=72, facecolor="white")


def axes(fig: "Figure", left: float, top: float, width: float, height: float) -> "Axes":
    """Axes at this place, in CSS pixels from the top left corner."""
    total_width, total_height = fig.get_figwidth() * 72, fig.get_figheight() * 72
    bottom = total_height - top - height
    return fig.add_axes((left / total_width, bottom / total_height, width / total_width, height / total_height))


def write_png(fig: "Figure", path: str | Path, *, dpi: int = 144) -> None:
    """The figure as a PNG that says which program made it, whole or not at all."""
    target = io.BytesIO()
    fig.savefig(target, format="png", dpi=dpi, metadata={"Software": GENERATOR})
    write_bytes(Path(path), target.getvalue())


def svg(fig: "Figure") -> Image:
    """The figure as a data address that asks nothing of the network."""
    target = io.StringIO()
    nothing = {"Creator": None, "Date": None, "Format": None, "Type": None}
    fig.savefig(target, format="svg", metadata=nothing)
    text = target.getvalue()
    # The prologue names a document type by its address; a browser needs neither.
    text = text[text.index("<svg") :].replace("'DejaVu Sans'", FONT_STACK)
    encoded = base64.b64encode(text.encode()).decode("ascii")
    width, height = round(fig.get_figwidth() * 72), round(fig.get_figheight() * 72)
    return Image(f"data:image/svg+xml;base64,{encoded}", width, height)
