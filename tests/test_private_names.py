"""Each name that another library does not promise to keep is in one table, exists today, and is used nowhere else."""

import ast
import importlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet

import diffattn
from diffattn.private_names import PrivateName

SOURCE = Path(diffattn.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
PRIVATE = [path for path in FILES if path.name.endswith("_private.py")]
# Underscores of Python itself: a named tuple's methods, a process that ends at once, a module that is being imported.
OF_PYTHON = {"_asdict", "_exit", "_fields", "_initializing", "_make", "_replace"}


def module_of(path: Path) -> str:
    return ".".join(("diffattn", *path.relative_to(SOURCE).with_suffix("").parts))


@cache
def tables() -> dict[str, tuple[PrivateName, ...]]:
    return {module_of(path): importlib.import_module(module_of(path)).NAMES for path in PRIVATE}


CASES = [pytest.param(entry, id=f"{module}: {entry.name}") for module, names in tables().items() for entry in names]


def library(entry: PrivateName) -> str:
    return "torch" if entry.name.startswith("ATen/") else entry.name.partition(":")[0].partition(".")[0]


def exists(name: str) -> bool:
    """Whether a name can be had from its module; what only an instance has is looked for in the source of its class."""
    where, _, attributes = name.partition(":")
    if where.endswith(".h"):
        import torch

        header = Path(torch.__file__).parent / "include" / where
        return f"void {attributes}(" in header.read_text(encoding="utf-8")
    found: Any = importlib.import_module(where)
    for attribute in attributes.split("."):
        if hasattr(found, attribute):
            found = getattr(found, attribute)
        elif attribute in getattr(found, "__annotations__", {}):
            return True
        else:
            return not inspect.ismodule(found) and sets(found, attribute)
    return True


def sets(owner: Any, attribute: str) -> bool:
    # A class may leave it to its base.
    owners = [each for each in owner.__mro__ if each is not object] if inspect.isclass(owner) else [owner]
    return any(f".{attribute}{sign} " in inspect.getsource(each) for each in owners for sign in (" =", ":"))


@pytest.mark.parametrize("entry", CASES)
def test_a_private_name_exists_in_the_installed_release(entry: PrivateName) -> None:
    if importlib.util.find_spec(library(entry)) is None:
        pytest.skip(f"{library(entry)} is not installed")
    assert exists(entry.name), f"{entry.name} is gone. It breaks: {entry.breaks}. It can go when: {entry.remove_when}"


@pytest.mark.parametrize("name", ["torch._C:_no_such_name", "ATen/native/CPUBlas.h:no_such_function"])
def test_a_name_that_is_gone_is_seen(name: str) -> None:
    assert not exists(name)


def test_each_entry_says_which_releases_were_tested_what_breaks_and_when_it_can_go() -> None:
    for names in tables().values():
        assert len({entry.name for entry in names}) == len(names)
        for entry in names:
            assert SpecifierSet(entry.tested), entry
            assert len(entry.breaks) > 10, entry
            assert len(entry.remove_when) > 10, entry


def imported(tree: ast.Module) -> Iterator[tuple[str, str, str]]:
    """The imports of other packages: the name that is bound, the module, the name in it (empty for a module)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.asname or alias.name, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith(("diffattn", "__")):
            yield from ((alias.asname or alias.name, node.module, alias.name) for alias in node.names)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names(tree: ast.Module) -> set[str]:
    """Underscored names that a file itself defines: functions, classes, fields, attributes of ``self`` and ``cls``."""
    own = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and of_self(node):
            own.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
    return own


def used(tree: ast.Module) -> Iterator[str]:
    """Underscored names of other packages that a file imports or reads from an object that is not its own."""
    for _, module, name in imported(tree):
        yield from (part for part in (*module.split("."), name) if is_private(part))
    yield from (node.attr for node in foreign(tree) if not of_self(node))


def foreign(tree: ast.Module) -> Iterator[ast.Attribute]:
    own = own_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            yield node


def of_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def inherited(tree: ast.Module) -> Iterator[str]:
    """Underscored names of a class that it has from a base of another package: overridden, or called on ``self``."""
    yield from (node.attr for node in foreign(tree) if of_self(node))
    homes = {bound: (module, name) for bound, module, name in imported(tree)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef):
            continue
        names = [each.name for each in node.body if isinstance(each, ast.FunctionDef)]
        targets = [each.targets if isinstance(each, ast.Assign) else [each.target] for each in node.body
                   if isinstance(each, ast.Assign | ast.AnnAssign)]  # fmt: skip
        names += [target.id for each in targets for target in each if isinstance(target, ast.Name)]
        for base in node.bases:
            # The longest part of a.b.C that an import binds.
            parts = ast.unparse(base).partition("[")[0].split(".")
            bound = next((at for at in range(len(parts), 0, -1) if ".".join(parts[:at]) in homes), None)
            if bound is not None and any(map(is_private, names)):
                module, name = homes[".".join(parts[:bound])]
                found: Any = importlib.import_module(module)
                for attribute in (*filter(None, [name]), *parts[bound:]):
                    found = getattr(found, attribute)
                yield from (each for each in names if is_private(each) and hasattr(found, each))


def allowed() -> set[str]:
    """What every model of transformers has, and what Python has."""
    from diffattn.model.transformers_private import CONTRACT

    return OF_PYTHON | set(CONTRACT)


def in_tables() -> set[str]:
    return {part for names in tables().values() for entry in names for part in entry.name.split(":")[1].split(".")}


def test_no_other_file_uses_a_private_name_of_another_library() -> None:
    found = {}
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path not in PRIVATE:
            names = {name for name in used(tree) if name not in allowed()}
            # What a class overrides has to stand in the class; the table says what breaks.
            names |= {name for name in inherited(tree) if name not in allowed() | in_tables()}
            if names:
                found[str(path.relative_to(SOURCE))] = sorted(names)
    assert found == {}


def test_a_private_name_outside_of_its_file_is_seen() -> None:
    for source, name in (
        ("import torch\nx = torch._C.f()\n", "_C"),
        ("from torch._inductor import config\n", "_inductor"),
        ("from transformers.trainer import _private\n", "_private"),
        ("def f(trainer):\n    trainer._saved = 3\n", "_saved"),
    ):
        assert name in set(used(ast.parse(source)))
    source = "from torch import nn\nclass Mine(nn.Module):\n    def _apply(self, fn): ...\n    def _own(self): ...\n"
    assert list(inherited(ast.parse(source))) == ["_apply"]


def test_the_contract_of_a_model_is_what_the_library_has_today() -> None:
    from transformers import PreTrainedConfig, PreTrainedModel

    from diffattn.model.transformers_private import CONTRACT

    for name in CONTRACT:
        assert hasattr(PreTrainedModel, name) or hasattr(PreTrainedConfig, name), name


@pytest.mark.parametrize("module", [module for module in tables() if "vllm" not in module])
def test_the_installed_release_is_one_that_was_tested(module: str) -> None:
    for entry in tables()[module]:
        if importlib.util.find_spec(library(entry)) is None:
            pytest.skip(f"{library(entry)} is not installed")
        # A build number such as +cpu is none of the range's.
        installed = importlib.metadata.version(library(entry)).partition("+")[0]
        assert SpecifierSet(entry.tested).contains(installed), entry
