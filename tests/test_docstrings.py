"""Every docstring begins with a whole phrase: its subject is not the name above it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import diffattn

ROOT = Path(diffattn.__file__).parent
FRAGMENT = re.compile(
    r"(As|At|Because|Behind|Beside|By|For|From|How|If|In|Its|Like|Of|On|That|The same|To|What|When|Where|Whether|"
    r"Which|With)\b"
)


def docstrings(source: str) -> Iterator[str]:
    """The docstrings of a module, of all that it defines, and of the fields of its classes."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef):
            # A text below a field is the field's.
            yield from (
                child.value.value
                for child in node.body
                if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
                and isinstance(child.value.value, str)
            )  # fmt: skip
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def test_no_docstring_begins_with_a_fragment() -> None:
    found = {
        str(file.relative_to(ROOT)): [
            text for text in docstrings(file.read_text(encoding="utf-8")) if FRAGMENT.match(text)
        ]
        for file in ROOT.rglob("*.py")
    }
    assert {file: texts for file, texts in found.items() if texts} == {}


def test_a_fragment_is_seen_wherever_it_stands() -> None:
    source = """'Whole.'
class A:
    'Of the draws.'
    b: int
    'Its own.'
    def c(self):
        'As d.'
"""
    assert [text for text in docstrings(source) if FRAGMENT.match(text)] == ["Of the draws.", "Its own.", "As d."]
