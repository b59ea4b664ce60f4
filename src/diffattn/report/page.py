"""A page from its template: what all pages of reports share."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffattn.report import charts
from diffattn.variants import ATTENTIONS

if TYPE_CHECKING:
    from markupsafe import Markup

HERE = Path(__file__).parent


def render(
    template: str,
    *,
    folder: Path = HERE,
    scripts: Sequence[str] = (),
    data: Mapping[str, object] | None = None,
    **values: object,
) -> str:
    """One self-contained HTML page: a template that extends ``base.html``, filled with ``values``.

    Args:
        template: the name of a file in ``folder``.
        folder: where the template lies; what it extends may lie here. Default: here.
        scripts: code that the page runs, in this order. Nothing else may run: their hashes are in the page's policy.
        data: JSON-able values for the scripts, each in an element that has its key as ``id``.
        values: what the template names.

    Raises:
        jinja2.UndefinedError: a value that the template names is not given.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader([folder, HERE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    css = Markup((HERE / "page.css").read_text(encoding="utf-8") + look_css())
    return environment.get_template(template).render(
        css=css,
        scripts=[Markup(code) for code in scripts],
        hashes=[base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in scripts],
        data={key: _json(value) for key, value in (data or {}).items()},
        look=variable,
        **values,
    )


def render_charts(
    template: str, drawn: Mapping[str, charts.AnyChart], data: Mapping[str, object] | None = None, **values: object
) -> str:
    """One page with charts: Vega lies in it once, and draws each chart in the element that has its key as ``id``.

    Vega reads expressions with its interpreter, so that the page's policy need not allow code that is made of text.

    Args:
        template, values: as of ``render``.
        drawn: charts by the ``id`` of their element.
        data: what else the page's script reads.
    """
    found = {key: charts.specification(chart) for key, chart in drawn.items()}
    content = {"charts": found} | dict(data or {})
    return render(template, folder=HERE, scripts=[vega(), script("charts.js")], data=content, **values)


def script(name: str) -> str:
    """The text of a script that lies here."""
    return (HERE / name).read_text(encoding="utf-8")


@functools.cache
def vega() -> str:
    """Vega, Vega-Lite and vega-embed as one script, which gives the page ``vegaEmbed`` and nothing else."""
    import vl_convert

    return f"(() => {{{vl_convert.javascript_bundle('window.vegaEmbed = vegaEmbed;')}}})();"


def variable(colour: str) -> str:
    """The CSS variable of a variant's colour, which is another one on a dark page.

    >>> variable("#0072B2")
    'var(--c0072B2)'
    """
    return f"var(--c{colour.removeprefix('#')})"


def look_css() -> str:
    """The colours of all looks as CSS: a variable of each, by which the charts' marks are drawn too."""
    looks = [*(variant.look for variant in ATTENTIONS.values()), *charts.MORE_LOOKS]
    light = "".join(f"--c{look.colour[1:]}:{look.colour};" for look in looks)
    dark = "".join(f"--c{look.colour[1:]}:{look.dark_colour};" for look in looks)
    marks = "".join(
        f'.chart [{side}="{look.colour}"]{{{side}:{variable(look.colour)}}}'
        for look in looks
        for side in ("fill", "stroke")
    )
    return f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}{marks}"


def _json(value: object) -> Markup:
    """The value as JSON in which no tag and no comment can begin."""
    from markupsafe import Markup

    return Markup(json.dumps(value, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c"))
