"""The room of the planner: few files, and none that needs a file which needs it."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import diffattn.plan

ROOM = Path(diffattn.plan.__file__).parent
PREFIX = "diffattn.plan."


def imports() -> dict[str, set[str]]:
    """Returns what each file of the room imports of it, also within a function, by the names of modules."""
    found = {}
    for file in ROOM.rglob("*.py"):
        module = ".".join(file.relative_to(ROOM).with_suffix("").parts)
        names = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
        found[module] = {name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)}
    return {module: names & set(found) for module, names in found.items()}


def test_no_file_needs_one_that_needs_it() -> None:
    found = imports()
    assert "shape" in found["cost"]
    assert "checkpoints.shape" in found["named_model"]
    # A circle is an error here.
    assert set(TopologicalSorter(found).static_order()) == set(found)


def test_a_room_has_at_most_fifteen_files() -> None:
    assert len(list(ROOM.glob("*.py"))) <= 15
