"""Makes Markdown of what docstrings hold beside text: examples become blocks of code, roles plain names."""

import re
from typing import Any

from griffe import Extension, Object

EXAMPLE = re.compile(r"^( *)>>> .*\n(?:\1\S.*(?:\n|$)|\1 {4,}\S.*(?:\n|$))*", re.MULTILINE)
ROLE = re.compile(r":(?:func|class|mod|meth|data):(?=`)")


def fenced(match: re.Match[str]) -> str:
    """An example of the interpreter as a block of code."""
    indent = match[1]
    return f"{indent}```pycon\n{match[0].rstrip()}\n{indent}```\n"


class Markdown(Extension):
    """Changes every docstring before it is parsed."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = ROLE.sub("", EXAMPLE.sub(fenced, obj.docstring.value))
