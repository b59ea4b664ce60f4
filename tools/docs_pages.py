"""The pages of the documentation that are made when the site is built, so that they cannot go stale.

mkdocs runs it (`make docs`): the command line's pages are what `--help` says, Python's are the docstrings of the public
names, and the files beside `docs` that a page links to come along.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path

import mkdocs_gen_files

import diffattn
from diffattn.cli.main import VERBS, main

ROOT = Path(__file__).parents[1]
# Pages of the site that are files beside the folder docs.
PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks/index.md",
}
ROOMS = {
    "ops": "The operation",
    "model": "Models",
    "plan": "Planning",
    "data": "Text",
    "train": "Training",
    "convert": "Converting",
    "generate": "Generating",
    "export": "Export",
    "demo": "A page in which models run",
    "serve": "Serving",
    "scaling": "Scaling and ablations",
    "probes": "Studies of a model",
    "study": "Comparing",
}
LINK = re.compile(r"\[([^\]]*)\]\(([^)#:\s]+)(#[^)]*)?\)")


def help_of(*words: str) -> str:
    """What `diffattn WORDS --help` prints, on 80 columns."""
    os.environ["COLUMNS"] = "80"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        main([*words, "--help"])
    return printed.getvalue().rstrip()


def command_line() -> str:
    """The page of all verbs."""
    parts = ["# Command line", "What `--help` of each command says.", f"```text\n{help_of()}\n```"]
    for verb in VERBS:
        parts += [f"## diffattn {verb}", f"```text\n{help_of(*verb.split())}\n```"]
    return "\n\n".join(parts) + "\n"


def python() -> str:
    """The page of the public names, by room."""
    parts = ["# Python", "Everything here is imported from `diffattn` itself: `from diffattn import diff_attention`."]
    for room, title in ROOMS.items():
        names = {name: home for name, home in diffattn._HOME.items() if home.partition(".")[0] == room}
        parts += [f"## {title}"] if names else []
        for name, home in names.items():
            path = f"diffattn.{home.replace(':', '.')}"
            parts.append(f"::: {path}\n    options:\n      heading: {name}\n      toc_label: {name}")
    missing = {home.partition(".")[0] for home in diffattn._HOME.values()} - set(ROOMS)
    if missing:
        raise SystemExit(f"tools/docs_pages.py: ROOMS lacks {', '.join(sorted(missing))}, of which a name is public")
    return "\n\n".join(parts) + "\n"


def linked(text: str, source: Path, page: str) -> str:
    """The text of the file `source` as the page `page`: links lead to where things lie in the site."""

    def moved(match: re.Match[str]) -> str:
        target = (source.parent / match[2]).resolve().relative_to(ROOT).as_posix()
        there = PAGES.get(target, target.removeprefix("docs/"))
        if target.startswith("benchmarks/results/"):
            with mkdocs_gen_files.open(there, "wb") as file:
                file.write((ROOT / target).read_bytes())
        elif target not in PAGES and not target.startswith("docs/"):
            # Other files are no part of the site: their name stays, without a link.
            return match[1]
        return f"[{match[1]}]({os.path.relpath(there, Path(page).parent)}{match[3] or ''})"

    return LINK.sub(moved, text)


for name, text in {"reference/cli.md": command_line(), "reference/api.md": python()}.items():
    with mkdocs_gen_files.open(name, "w") as file:
        file.write(text)
for source, page in PAGES.items():
    with mkdocs_gen_files.open(page, "w") as file:
        file.write(linked((ROOT / source).read_text(encoding="utf-8"), ROOT / source, page))
for path in sorted((ROOT / "docs").rglob("*.md")):
    page = path.relative_to(ROOT / "docs").as_posix()
    text = path.read_text(encoding="utf-8")
    if (made := linked(text, path, page)) != text:
        with mkdocs_gen_files.open(page, "w") as file:
            file.write(made)
