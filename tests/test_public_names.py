"""The names of ``diffattn`` itself: each loads on first use, and is the one that a type checker sees."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import diffattn

SOURCE = Path(diffattn.__file__).read_text(encoding="utf-8")


def seen_by_a_type_checker() -> dict[str, str]:
    """The public names of the block under ``TYPE_CHECKING``, with their homes."""
    (block,) = (node for node in ast.parse(SOURCE).body if isinstance(node, ast.If))
    imported = {
        alias.asname: f"{node.module.removeprefix('diffattn.')}:{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    (renamed,) = (node for node in block.body if isinstance(node, ast.Assign))
    names, values = (ast.unparse(part).strip("()").split(", ") for part in (renamed.targets[0], renamed.value))
    return {name: home for name, home in imported.items() if name and not name.startswith("_")} | {
        name: imported[value] for name, value in zip(names, values, strict=True)
    }


def test_a_type_checker_sees_the_names_that_load() -> None:
    assert seen_by_a_type_checker() == diffattn._HOME


def test_every_name_loads() -> None:
    for name in diffattn.__all__:
        found = getattr(diffattn, name)
        assert callable(found), name
        assert found.__doc__, name


def test_no_name_is_that_of_a_room() -> None:
    rooms = {module.name for module in pkgutil.iter_modules(diffattn.__path__)}
    assert not rooms & set(diffattn.__all__)
    # What a room is after it was imported.
    importlib.import_module("diffattn.train.run")
    assert diffattn.train.__name__ == "diffattn.train"
    assert diffattn.train_model is diffattn.train.run.train


def test_importing_the_package_loads_no_library() -> None:
    program = "import sys, diffattn; sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
