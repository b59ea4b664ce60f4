"""The tree of CONTRIBUTING.md is the tree."""

from tools import tree


def test_the_tree_is_as_the_files_say() -> None:
    shown = tree.PAGE.read_text(encoding="utf-8").split(tree.BEGIN)[1].split(tree.END)[0]
    assert shown.strip() == tree.tree().strip(), "renew it: python -m tools.tree"


def test_every_file_says_what_it_is() -> None:
    files = [path for folder in tree.FOLDERS for path in (tree.ROOT / folder).rglob("*.py")]
    assert [path for path in files if path.name != "__init__.py" and not tree.first_line(path)] == []
