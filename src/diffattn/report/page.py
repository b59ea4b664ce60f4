"""A page from its template: what all pages of reports share."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def render(template: str, **values: Any) -> str:
    """One self-contained HTML page: a template that extends ``base.html``, filled with ``values``.

    Raises:
        jinja2.UndefinedError: a value that the template names is not given.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    css = Markup((HERE / "page.css").read_text(encoding="utf-8"))
    return environment.get_template(template).render(css=css, **values)


def render_scripted(template: str, script: str, data: Any, **values: Any) -> str:
    """The same of a template that extends ``scripted.html``: its script, a file here, reads ``data`` as JSON.

    Nothing else that the page holds may run: the script's hash is in its policy.
    """
    from markupsafe import Markup

    code = (HERE / script).read_text(encoding="utf-8")
    return render(
        template,
        script=Markup(code),
        script_hash=base64.b64encode(hashlib.sha256(code.encode()).digest()).decode(),
        # No tag and no comment can begin inside the data.
        data=Markup(json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")),
        **values,
    )
