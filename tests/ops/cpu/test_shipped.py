"""The kernels that a wheel carries: which is chosen, which is refused, and that one serves where no compiler is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffattn.cli.main import main
from diffattn.ops.cpu import build, compiling, shipped

COMMIT = "0123456789ab"


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has asked for no kernel yet, an empty cache, sources of our own, no compiler."""
    for name in ("DIFFATTN_FUSED", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DIFFATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(tmp_path / "absent"))
    monkeypatch.setattr(build, "_outcome", None)
    monkeypatch.setattr(build, "_load_and_ask", lambda path: True)
    monkeypatch.setattr(compiling, "SOURCES", tmp_path / "csrc")
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "shipped")
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    monkeypatch.setattr(torch.version, "git_version", f"{COMMIT}ffff")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc/one.cpp").write_text("int one() { return 1; }\n")


def ship(*sets: str, torch_build: str = f"2.13.0-{COMMIT}") -> None:
    """Lay libraries where a wheel has them; no loader looks at what they hold."""
    for instructions in sets or compiling.INSTRUCTION_SETS["x86_64"]:
        folder = shipped.FOLDER / torch_build / instructions
        folder.mkdir(parents=True)
        (folder / compiling.LIBRARY).write_bytes(instructions.encode())
        facts = compiling.facts(compiling.BuildKey.of(instructions), folder / compiling.LIBRARY, 15.0)
        (folder / "build.json").write_text(json.dumps(facts))


def served() -> str | None:
    """The instruction set of the library that this process loads; None where it loads none."""
    path = build.status().path if build.unavailable(torch.float32) is None else None
    return Path(path).read_text() if path else None


@pytest.mark.parametrize(
    ("capability", "chosen"), [("AVX512", "AVX512"), ("AVX2", "AVX2"), ("DEFAULT", "DEFAULT"), ("AVX10", "DEFAULT")]
)
def test_the_processor_chooses(capability: str, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ship()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert served() == chosen
    status = build.status()
    assert (status.shipped, status.shipped_refused, status.pending) == (True, None, False)


@pytest.mark.parametrize("version", ["2.13.0+cpu", "2.13.0+cu130"])
def test_the_projects_builds_of_one_commit_are_one(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ship()
    monkeypatch.setattr(torch, "__version__", version)
    assert served() == "AVX2"


def other_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.14.1+cpu")


def other_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "git_version", "fedcba9876543210")


def someone_elses_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.13.0")


def other_rocm_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.13.0+rocm7.0")


def changed_source(monkeypatch: pytest.MonkeyPatch) -> None:
    (compiling.SOURCES / "one.cpp").write_text("int one() { return 2; }\n")


def changed_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compiling.INSTRUCTION_SETS["x86_64"], "AVX2", "-march=x86-64-v3 -mtune=znver3")


def cut_library(monkeypatch: pytest.MonkeyPatch) -> None:
    next(shipped.FOLDER.glob("*/AVX2/*.so")).write_bytes(b"AVX")


def no_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    next(shipped.FOLDER.glob("*/AVX2/*.json")).unlink()


def set_not_carried(monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(next(shipped.FOLDER.glob("*/AVX2")))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_release, f"it is for torch 2.13.0-{COMMIT}, not for 2.14.1+cpu of commit {COMMIT}"),
        (other_commit, f"it is for torch 2.13.0-{COMMIT}, not for 2.13.0+cpu of commit fedcba987654"),
        (someone_elses_build, f"it is for torch 2.13.0-{COMMIT}, not for 2.13.0 of commit {COMMIT}"),
        (other_rocm_build, f"it is for torch 2.13.0-{COMMIT}, not for 2.13.0+rocm7.0 of commit {COMMIT}"),
        (changed_source, "the sources or flags have changed since"),
        (changed_flags, "the sources or flags have changed since"),
        (cut_library, "it is damaged; install diffattn again"),
        (no_facts, "it is damaged; install diffattn again"),
        (set_not_carried, "none is for AVX2"),
    ],
    ids=lambda given: getattr(given, "__name__", ""),
)
def test_what_is_refused_is_compiled(
    change: Callable[[pytest.MonkeyPatch], None],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ship()
    change(monkeypatch)
    assert "absent not found" in str(build.unavailable(torch.float32))
    assert build.status().shipped_refused == reason
    assert not build.status().shipped
    # With a compiler: the first use compiles, and `doctor` still says why.
    monkeypatch.setattr(build, "_outcome", None)
    monkeypatch.delenv("CXX")
    assert build.status().pending
    capsys.readouterr()
    assert main(["doctor"]) == 0
    assert f"shipped kernel, not used: {reason}\n" in capsys.readouterr().err


def test_a_wheel_for_several_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    ship()
    ship(torch_build="2.14.1-fedcba987654")
    assert served() == "AVX2"
    monkeypatch.setattr(build, "_outcome", None)
    monkeypatch.setattr(torch, "__version__", "2.14.1+cu130")
    monkeypatch.setattr(torch.version, "git_version", "fedcba9876543210")
    assert str(build.status().path).startswith(str(shipped.FOLDER / "2.14.1-fedcba987654"))


def test_a_checkout_ships_nothing() -> None:
    assert "absent not found" in str(build.unavailable(torch.float32))
    assert (build.status().shipped, build.status().shipped_refused) == (False, None)


def test_nothing_is_compiled_or_said_where_one_serves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv("CXX")
    ship()
    assert served() == "AVX2"
    assert build.compile_kernel().shipped
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "cache").exists()
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().err
    assert "fused kernel, float32: active\n" in printed
    assert f"fused kernel's file: {build.status().path}, shipped with diffattn\n" in printed
    assert "not used" not in printed


def test_what_was_compiled_here_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    ship()
    monkeypatch.setattr(compiling, "find", lambda recipe: compiling.Built(__file__, 1.0))
    assert build.unavailable(torch.float32) is None
    assert build.status().path == __file__
    assert not build.status().shipped


def test_one_that_does_not_load_is_compiled_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ship()

    def load(path: str) -> bool:
        if path.startswith(str(shipped.FOLDER)):
            raise OSError("undefined symbol")
        return True

    monkeypatch.setattr(build, "_load_and_ask", load)
    monkeypatch.setattr(compiling, "build", lambda recipe, *, force: compiling.Built(str(tmp_path / "made"), 1.0))
    assert build.unavailable(torch.float32) is None
    assert build.status().path == str(tmp_path / "made")
