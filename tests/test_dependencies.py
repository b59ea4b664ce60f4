"""Every package that ours imports is one that pyproject.toml asks pip for, in the core or in an extra."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "diffattn"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Rooms and files that run only where an extra is installed.
EXTRA = {"convert/inputs/gguf.py": "gguf", "export": "onnx", "demo": "demo",
         "serve": "serve", "probes/lm_eval_private.py": "eval", "train/trackers": "track",
         "train/spread/ray_cluster.py": "ray", "train/spread/ray_launch.py": "ray"}  # fmt: skip
# Not asked for by the core: vLLM is installed in an environment apart, Triton comes with torch for a GPU, and with the
# extra dev for the tests that compile and interpret its kernels.
APART = {"triton", "vllm"}


def imports(source: str) -> Iterator[str]:
    """The packages outside of Python and ours that a file imports, also inside its functions."""
    for node in ast.walk(ast.parse(source)):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules = [node.module]
        roots = {module.partition(".")[0] for module in modules}
        yield from roots - sys.stdlib_module_names - {"diffattn"} - APART


def declared(place: str) -> set[str]:
    """The packages that pip installs for a file of ours."""
    asked = list(PROJECT["dependencies"])
    extras = {extra for room, extra in EXTRA.items() if place == room or place.startswith(f"{room}/")}
    for extra in extras:
        asked += PROJECT["optional-dependencies"][extra]
    return {canonicalize_name(Requirement(each).name) for each in asked}


def undeclared(place: str, source: str, homes: dict[str, set[str]]) -> set[str]:
    return {name for name in imports(source) if not homes.get(name, {canonicalize_name(name)}) & declared(place)}


@pytest.fixture(scope="module")
def homes() -> dict[str, set[str]]:
    """The packages of pip that bring each importable name."""
    return {name: {canonicalize_name(each) for each in found} for name, found in packages_distributions().items()}


def test_what_is_imported_is_declared(homes: dict[str, set[str]]) -> None:
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        place = path.relative_to(SOURCE).as_posix()
        if missing := undeclared(place, path.read_text(encoding="utf-8"), homes):
            found[place] = sorted(missing)
    assert found == {}


def test_what_is_not_declared_is_seen(homes: dict[str, set[str]]) -> None:
    source = "import numpy as np\n\ndef f():\n    from requests.adapters import HTTPAdapter\n    import fastapi\n"
    assert undeclared("plan/shape.py", source, homes) == {"requests", "fastapi"}
    assert undeclared("serve/answers.py", source, homes) == {"requests"}


def test_development_has_every_extra_and_constraints_pin_every_package() -> None:
    (whole,) = (each for each in map(Requirement, PROJECT["optional-dependencies"]["dev"]) if each.name == "diffattn")
    assert whole.extras == PROJECT["optional-dependencies"].keys() - {"dev"}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in lines if "==" in line}
    for asked in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        for requirement in map(Requirement, asked):
            if requirement.name != "diffattn":
                assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


def test_only_development_asks_for_triton() -> None:
    asked = {"core": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
    wanting = {name for name, lines in asked.items() if "triton" in {Requirement(line).name for line in lines}}
    assert wanting == {"dev"}


def test_the_lowest_releases_are_the_first_that_the_core_allows() -> None:
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    lowest = {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in lines if "==" in line}
    for requirement in map(Requirement, PROJECT["dependencies"]):
        name = canonicalize_name(requirement.name)
        assert name in lowest, f"constraints-lowest.txt has no {name}"
        assert requirement.specifier.contains(lowest[name]), requirement


def test_every_package_of_an_environment_apart_is_pinned_and_the_tools_bring_no_torch() -> None:
    for name in ("vllm", "tools"):
        lines = (ROOT / f"benchmarks/{name}_requirements.txt").read_text(encoding="utf-8").splitlines()
        asked = [Requirement(line) for line in lines if not line.startswith("#")]
        assert [each for each in asked if [one.operator for one in each.specifier] != ["=="]] == []
    assert "torch" not in {canonicalize_name(each.name) for each in asked}
