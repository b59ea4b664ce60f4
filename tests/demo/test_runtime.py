"""The packages that a page carries: checked by their SHA-512, kept, and a line that says what to do without npm."""

import base64
import dataclasses
import hashlib
import io
import os
import stat
import tarfile
from pathlib import Path

import pytest

from diffattn.demo import runtime as runtime_module
from diffattn.demo.runtime import PACKAGES, Package, runtime
from diffattn.errors import ConfigError, DataError, UnsupportedError

CONTENTS = {
    "package/dist/run.mjs": b"export const run = 1;",
    "package/LICENSE": b"Do as you like.",
    "package/more": b"",
}


def archive(contents: dict[str, bytes]) -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w:gz") as tar:
        for name, content in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return held.getvalue()


ARCHIVE = archive(CONTENTS)
PACKAGE = Package(
    "@somebody/run", "1.2.3", base64.b64encode(hashlib.sha512(ARCHIVE).digest()).decode(), "MIT",
    {"run": "package/dist/run.mjs"}, "package/LICENSE",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_module, "PACKAGES", (PACKAGE,))
    monkeypatch.setenv("DIFFATTN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def npm(tmp_path: Path, script: str) -> None:
    """An npm that does what the script says; ``$1`` to its end is what it was asked."""
    file = tmp_path / "bin" / "npm"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


def test_archives_of_a_folder_are_read(tmp_path: Path) -> None:
    (tmp_path / "somebody-run-1.2.3.tgz").write_bytes(ARCHIVE)
    found = runtime(tmp_path)
    assert found.files == {"run": CONTENTS["package/dist/run.mjs"]}
    assert found.licences == {"@somebody/run": "Do as you like."}


def test_npm_is_asked_once_and_for_one_release(tmp_path: Path) -> None:
    (tmp_path / "held.tgz").write_bytes(ARCHIVE)
    npm(tmp_path, f'echo "$@" >> {tmp_path}/asked; /bin/cp {tmp_path}/held.tgz somebody-run-1.2.3.tgz')
    stages: list[str] = []
    first = runtime(on_stage=lambda stage: stages.append(stage.name))
    assert runtime() == first
    assert (tmp_path / "asked").read_text() == "pack @somebody/run@1.2.3 --ignore-scripts --silent\n"
    assert stages == ["fetching @somebody/run 1.2.3 with npm"]
    # What lies in the cache is not believed.
    (kept,) = (tmp_path / "cache" / "npm").iterdir()
    kept.write_bytes(archive({"package/dist/run.mjs": b"steal()"}))
    assert runtime() == first
    assert len((tmp_path / "asked").read_text().splitlines()) == 2


@pytest.mark.parametrize("from_npm", [False, True])
def test_another_archive_is_refused(from_npm: bool, tmp_path: Path) -> None:
    other = archive(CONTENTS | {"package/more": b"x"})
    (tmp_path / "somebody-run-1.2.3.tgz").write_bytes(other)
    npm(tmp_path, f"/bin/cp {tmp_path}/somebody-run-1.2.3.tgz .")
    with pytest.raises(DataError, match=r"another SHA-512 than @somebody/run 1\.2\.3"):
        runtime(None if from_npm else tmp_path)
    assert not (tmp_path / "cache" / "npm").exists()


def test_an_archive_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"holds no somebody-run-1\.2\.3\.tgz; wanted .* npm pack @somebody/run@1\.2\.3"
    ):
        runtime(tmp_path)


def test_without_npm_a_line_says_what_to_do() -> None:
    with pytest.raises(UnsupportedError) as error:
        runtime()
    assert str(error.value) == (
        "npm is not installed; wanted npm, which fetches the programs that the page carries, once: install Node.js, or "
        "give --packages FOLDER with somebody-run-1.2.3.tgz from a machine that has npm"
    )


def test_npm_that_fails_is_quoted_in_one_line(tmp_path: Path) -> None:
    npm(tmp_path, 'echo "npm error network\nnpm error no route" >&2; exit 1')
    with pytest.raises(
        UnsupportedError, match=r"cannot fetch @somebody/run 1\.2\.3 \(npm error network npm error no route"
    ):
        runtime()


def test_npm_that_never_answers_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_module, "SECONDS", 0.2)
    npm(tmp_path, "exec /bin/sleep 60")
    with pytest.raises(UnsupportedError, match=r"no answer in 0\.2 seconds"):
        runtime()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "held.tgz").write_bytes(ARCHIVE)
    npm(tmp_path, f"/bin/cp {tmp_path}/held.tgz somebody-run-1.2.3.tgz")
    (tmp_path / "file").touch()
    monkeypatch.setenv("DIFFATTN_CACHE", os.fspath(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match=r"cache folder .* cannot be written"):
        runtime()


def test_the_licence_of_onnxruntime_is_that_of_its_package_for_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime_module, "PACKAGES", (dataclasses.replace(PACKAGE, licence_file=None),))
    (tmp_path / "somebody-run-1.2.3.tgz").write_bytes(ARCHIVE)
    (text,) = runtime(tmp_path).licences.values()
    assert "MIT License" in text
    assert "Copyright (c) Microsoft Corporation" in text
    assert "protobuf" in text


def test_releases_are_pinned() -> None:
    for package in PACKAGES:
        assert len(base64.b64decode(package.sha512)) == 64
        assert package.version.count(".") == 2
