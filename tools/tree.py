"""Writes the tree of CONTRIBUTING.md: each file with the first line of its docstring. A test compares the two.

python -m tools.tree
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
FOLDERS = ("src/diffattn", "examples", "benchmarks", "tools")
BEGIN, END = "<!-- made by python -m tools.tree -->\n", "<!-- end of the tree -->"


def tree() -> str:
    """The list of all files, folder by folder; files without a docstring hold no code."""
    parts = []
    for top in FOLDERS:
        files = [path for path in sorted((ROOT / top).rglob("*.py")) if first_line(path)]
        for folder in sorted({path.parent for path in files}):
            lines = [f"- `{path.name}`: {first_line(path)}" for path in files if path.parent == folder]
            parts.append(f"**{folder.relative_to(ROOT).as_posix()}**\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def first_line(path: Path) -> str:
    """The first line of a file's docstring, as Markdown; empty where there is none."""
    said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return said.partition("\n")[0].replace("``", "`")


def main() -> None:
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{tree()}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
