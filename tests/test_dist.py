"""`make dist`: the files of a release, installed where nothing of diffattn is, and run there."""

import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import diffattn
from tools import dist

ROOT = Path(__file__).parents[1]


def test_a_release_is_whole_and_runs(tmp_path: Path) -> None:
    for tool in ("build", "twine"):
        pytest.importorskip(tool)
    archive, wheel = dist.build(tmp_path / "dist")
    assert {archive.name, wheel.name} == {
        f"diffattn-{diffattn.__version__}.tar.gz",
        f"diffattn-{diffattn.__version__}-py3-none-any.whl",
    }
    shipped = {
        path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src/diffattn").rglob("*") if is_ours(path)
    }
    assert shipped - set(zipfile.ZipFile(wheel).namelist()) == set()
    with tarfile.open(archive) as files:
        assert any(name.endswith("/LICENSE") for name in files.getnames())
    said, file = dist.try_out(wheel, tmp_path / "environment")
    assert said.startswith(f"diffattn {diffattn.__version__} (torch ")
    assert Path(file).is_relative_to(tmp_path)


def is_ours(path: Path) -> bool:
    """Whether a file belongs into a wheel: Python's own leavings do not, nor does a library that was compiled here."""
    return path.is_file() and "__pycache__" not in path.parts and "shipped" not in path.parts


def test_the_version_is_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == diffattn.__version__
