import ctypes
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.mounted import file_system

from diffattn.errors import UnsupportedError
from diffattn.machine import cache_folder
from diffattn.ops.cpu import build, compiling

# No header of torch, which takes seconds: what the kernel holds is not the matter here, and `_load_and_ask` is ours.
SOURCES = {
    "one.cpp": '#include "one.h"\nextern "C" int sum(int n) {\n  int s = 0;\n'
    "  for (int i = 0; i < n; ++i) s += one();\n  return s;\n}\n",
    "two.cpp": '#include "one.h"\nint one() { return 1; }\n',
    "one.h": "int one();\n",
}
PROCESS = """
import sys
from pathlib import Path
from diffattn.ops.cpu import build, compiling
compiling.SOURCES = Path(sys.argv[1])
print(build.compile_kernel().path)
"""


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has asked for no kernel yet, an empty cache, sources of our own."""
    for name in ("CXX", "DIFFATTN_FUSED", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DIFFATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_outcome", None)
    monkeypatch.setattr(build, "_load_and_ask", load_and_ask)
    monkeypatch.setattr(compiling, "SOURCES", tmp_path / "csrc")
    (tmp_path / "csrc").mkdir()
    for name, text in SOURCES.items():
        (tmp_path / "csrc" / name).write_text(text)


def load_and_ask(path: str) -> bool:
    torch.ops.load_library(path)
    return False


def compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> Path:
    """A compiler that first notes each link in the file that is returned, and then does `body`."""
    script, links = folder / "cxx", folder / "links"
    script.write_text(f'#!/bin/sh\ncase " $* " in *" -shared "*) echo link >> {links};; esac\n{body}\n')
    script.chmod(0o755)
    links.touch()
    monkeypatch.setenv("CXX", str(script))
    return links


def folders(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache/kernels").glob("*") if path.is_dir()]


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Both dtypes are refused in one sentence that holds the words and is said on stderr once; gives the sentence."""
    reason = build.unavailable(torch.float32)
    assert reason is not None
    assert build.unavailable(torch.bfloat16) == reason
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1] == f"diffattn: {reason}"
    assert printed.err.count(reason) == 1
    assert printed.out == ""
    assert reason.startswith("fused_cpu: ")
    assert "diffattn doctor --build" in reason
    assert "\n" not in reason
    for word in words:
        assert word in reason
    return reason


def test_it_compiles_once_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    links = compiler(tmp_path, monkeypatch, 'exec g++ "$@"')
    assert build.status().pending
    assert build.unavailable(torch.float32) is None
    assert build.unavailable(torch.bfloat16) is None
    assert build.unavailable(torch.float16) is None
    assert "float64 inputs are not supported" in str(build.unavailable(torch.float64))
    first, second = capfd.readouterr().err.splitlines()
    assert first == "diffattn: compiling the fused CPU kernel, once (about 30 s) …"
    (library,) = (tmp_path / "cache/kernels").glob("*/fused_cpu.so")
    assert second.startswith("diffattn: compiled in ")
    assert second.endswith(f"s → {library}")
    assert library.parent.name.count("-") == 1
    # As the next process would: nothing is asked of the compiler but its version, and nothing is said.
    monkeypatch.setattr(build, "_outcome", None)
    assert build.unavailable(torch.float32) is None
    assert links.read_text() == "link\n"
    assert capfd.readouterr().err == ""
    status = build.status()
    assert (status.active, status.path, status.pending) == (("float32", "bfloat16", "float16"), str(library), False)
    assert json.loads(json.dumps(status.__dict__))["bf16_products"] is False


def test_it_is_linked_to_torch_and_to_no_openmp() -> None:
    assert build.unavailable(torch.float32) is None
    path = build.status().path
    assert path is not None
    assert ctypes.CDLL(path).sum(1000) == 1000
    linked = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu.so" in linked
    assert "omp" not in linked


def test_a_compiled_function_takes_the_answer_as_a_constant() -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def add(x: torch.Tensor) -> torch.Tensor:
        return x + (1 if build.unavailable(x.dtype) is None else -1)

    assert add(torch.zeros(1)).item() == 1
    assert add(torch.zeros(1, dtype=torch.float64)).item() == -1


def test_several_threads_compile_and_load_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    links = compiler(tmp_path, monkeypatch, 'exec g++ "$@"')
    loads, answers = [], []

    def ask(path: str) -> bool:
        loads.append(path)
        return True

    monkeypatch.setattr(build, "_load_and_ask", ask)
    threads = [threading.Thread(target=lambda: answers.append(build.unavailable(torch.float32))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [None] * 8
    assert len(loads) == 1
    assert links.read_text() == "link\n"


def test_two_processes_at_once_compile_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    links = compiler(tmp_path, monkeypatch, 'sleep 1; exec g++ "$@"')
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(compiling.SOURCES)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    said = [run.communicate(timeout=60) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert said[0][0] == said[1][0]
    assert links.read_text() == "link\n"
    assert Path(said[0][0].decode().strip()).is_file()


def lives(pid: str) -> bool:
    try:
        # "Z": ended, and waiting for its parent to notice.
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[subprocess.Popen[str], Path]:
    """A process whose compilers work until `tmp_path / "go"` is there, once they do; and the file of their numbers."""
    pids = tmp_path / "pids"
    wait = f"echo $$ >> {pids}; while [ ! -e {tmp_path / 'go'} ]; do sleep 0.05; done"
    compiler(tmp_path, monkeypatch, f'case " $* " in *" -c "*) {wait};; esac; exec g++ "$@"')
    run = subprocess.Popen(
        [sys.executable, "-c", PROCESS, str(compiling.SOURCES)], stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    until(lambda: pids.exists() and bool(pids.read_text()), 60)
    return run, pids


def until(holds: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("killed", ["the process", "its group", "it and the guard of its compilers"])
def test_a_killed_build_leaves_no_compilers_and_nothing_that_is_loaded(
    killed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if killed.endswith("compilers") and sys.platform != "linux":
        pytest.skip("only Linux tells a process that its parent has ended")
    run, pids = started(tmp_path, monkeypatch)
    guards = children(run.pid) if killed.endswith("compilers") else []
    (os.killpg if killed == "its group" else os.kill)(run.pid, signal.SIGKILL)
    for guard in guards:
        os.kill(guard, signal.SIGKILL)
    run.communicate()
    until(lambda: not any(lives(line) for line in pids.read_text().split()), 5)
    (left,) = folders(tmp_path)
    assert f".tmp-{run.pid}-" in left.name
    assert compiling.find(compiling.BuildKey.of_this_machine()) is None
    # The lock of the dead process blocks no one, and what it left is cleared away.
    (tmp_path / "go").touch()
    capfd.readouterr()
    began = time.monotonic()
    built = build.compile_kernel()
    assert time.monotonic() - began < 20
    removed, compiles, _ = capfd.readouterr().err.splitlines()
    assert removed.endswith("was ended before it was done; its files are removed")
    assert "compiling the fused CPU kernel, once (about 30 s)" in compiles
    assert folders(tmp_path) == [Path(built.path).parent]
    assert build.unavailable(torch.float32) is None


def test_who_waits_says_for_whom_and_compiles_itself_when_that_one_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, pids = started(tmp_path, monkeypatch)
    second = subprocess.Popen(
        [sys.executable, "-c", PROCESS, str(compiling.SOURCES)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert second.stderr is not None
    line = second.stderr.readline()
    assert line == f"diffattn: waiting for process {first.pid}, which compiles the fused CPU kernel (about 30 s) …\n"
    first.kill()
    first.communicate()
    (tmp_path / "go").touch()
    out, said = second.communicate(timeout=60)
    assert second.returncode == 0, said
    assert "its files are removed" in said
    assert Path(out.strip()).is_file()
    assert not any(lives(line) for line in pids.read_text().split())


def test_ctrl_c_ends_the_compiler_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = tmp_path / "pid"
    compiler(tmp_path, monkeypatch, f'case " $* " in *" -c "*) echo $$ >> {pid}; exec sleep 60;; esac; exec g++ "$@"')
    run = subprocess.Popen([sys.executable, "-c", PROCESS, str(compiling.SOURCES)], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (pid.exists() and pid.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=10)
    deadline = time.monotonic() + 5
    assert b"KeyboardInterrupt" in said
    while any(lives(line) for line in pid.read_text().split()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert folders(tmp_path) == []


@pytest.mark.parametrize("damage", ["cut", "changed", "no record"])
def test_a_damaged_library_is_made_anew(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    links = compiler(tmp_path, monkeypatch, 'exec g++ "$@"')
    library = Path(build.compile_kernel().path)
    sound = library.read_bytes()
    if damage == "no record":
        (library.parent / "build.json").unlink()
    else:
        library.write_bytes(sound[:5000] if damage == "cut" else sound[:5000] + b"?" + sound[5001:])
    assert build.status().pending
    assert build.unavailable(torch.float32) is None
    assert library.read_bytes() == sound
    assert links.read_text() == "link\nlink\n"


def test_a_library_that_the_loader_refuses_is_made_anew_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    links = compiler(tmp_path, monkeypatch, 'exec g++ "$@"')
    built = build.compile_kernel()
    answers = iter([OSError("wrong C library"), None])

    def ask(path: str) -> bool:
        if error := next(answers):
            raise error
        return True

    monkeypatch.setattr(build, "_load_and_ask", ask)
    assert build.unavailable(torch.float32) is None
    assert links.read_text() == "link\nlink\n"
    assert build.status().path == built.path


@pytest.mark.parametrize("change", ["source", "header", "capability", "torch", "compiler"])
def test_what_is_compiled_anew(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = compiling.BuildKey.of_this_machine()
    if change == "compiler":
        compiler(tmp_path, monkeypatch, 'exec g++ "$@"')
    elif change == "capability":
        capability = "AVX2" if torch.backends.cpu.get_cpu_capability() != "AVX2" else "DEFAULT"
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    elif change == "torch":
        monkeypatch.setattr(torch, "__version__", "2.99.0")
    else:
        path = compiling.SOURCES / ("two.cpp" if change == "source" else "one.h")
        path.write_text(path.read_text() + "\n")
    assert compiling.BuildKey.of_this_machine().folder != before.folder


def test_a_changed_source_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    links = compiler(tmp_path, monkeypatch, 'exec g++ "$@"')
    first = build.compile_kernel()
    assert build.compile_kernel() == first
    assert links.read_text() == "link\n"
    (compiling.SOURCES / "two.cpp").write_text('#include "one.h"\nint one() { return 2; }\n')
    assert build.compile_kernel().path != first.path
    assert links.read_text() == "link\nlink\n"
    build.compile_kernel(force=True)
    assert links.read_text() == "link\nlink\nlink\n"


def test_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "absent"))
    assert "absent not found" in build.status().reasons["float32"]
    assert capsys.readouterr().err == ""
    refused(capsys, "absent not found", "install a C++20 compiler")
    with pytest.raises(UnsupportedError, match="absent not found"):
        build.compile_kernel(force=True)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "g++ not found" in str(compiling.no_compiler())
    assert compiling.BuildKey.of_this_machine().compiler == []


def test_without_a_compiler_what_another_machine_compiled_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build.compile_kernel()
    monkeypatch.setenv("CXX", str(tmp_path / "absent"))
    assert build.unavailable(torch.float32) is None
    assert build.status().path == built.path


def test_once_a_compiler_is_there_the_same_process_uses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "absent"))
    refused(capsys, "not found")
    monkeypatch.delenv("CXX")
    assert build.unavailable(torch.float32) is not None
    build.compile_kernel()
    assert build.unavailable(torch.float32) is None


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("exit 1", ["no error was named"]),
        ("echo 'one.cpp:3:1: error: no such instruction'; exit 1", ["(one.cpp:3:1: error: no such instruction, see"]),
        ("exit 0", ["no error was named"]),
        ('while [ "$1" != -o ]; do shift || exit 1; done; echo garbage > "$2"', ["could not be loaded", "CXX"]),
    ],
)
def test_a_broken_compiler(
    body: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiler(tmp_path, monkeypatch, body)
    reason = refused(capsys, *words)
    assert folders(tmp_path) == []
    if ", see " in reason:
        log = Path(reason.split(", see ")[1].split(");")[0])
        assert "-fno-trapping-math" in log.read_text()
    # It is not tried again in this process.
    monkeypatch.delenv("CXX")
    assert build.unavailable(torch.float32) == reason
    assert capsys.readouterr().err == ""


def test_an_error_in_the_source_names_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    (compiling.SOURCES / "two.cpp").write_text("int one() { return x; }\n")
    refused(capsys, "two.cpp:1:", "error: 'x' was not declared")


def test_a_compiler_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiling, "COMPILE_SECONDS", 0.5)
    compiler(tmp_path, monkeypatch, 'case " $* " in *" -c "*) exec sleep 60;; esac; exec g++ "$@"')
    began = time.monotonic()
    refused(capsys, "took over", "CXX")
    assert time.monotonic() - began < 10
    assert folders(tmp_path) == []


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder that cannot be written; gives the temporary folder of this user that serves then."""
    (tmp_path / "file").touch()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("DIFFATTN_CACHE", str(tmp_path / "file/cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path / f"tmp/diffattn-{os.getuid()}"


def test_a_cache_that_cannot_be_written(
    no_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UnsupportedError, match="DIFFATTN_CACHE"):
        build.compile_kernel()
    assert capsys.readouterr().err == ""
    assert build.unavailable(torch.float32) is None
    warning = capsys.readouterr().err.splitlines()[0]
    assert f"{tmp_path}/file/cache/kernels cannot be written (Not a directory)" in warning
    assert f"is kept in {no_cache}; " in warning
    assert "DIFFATTN_CACHE=" in warning
    assert "DIFFATTN_FUSED=0" in warning
    path = build.status().path
    assert path is not None
    assert Path(path).is_relative_to(no_cache / "kernels")
    assert no_cache.stat().st_mode & 0o777 == 0o700
    # As the next process would, which compiles nothing and so says nothing.
    monkeypatch.setattr(build, "_outcome", None)
    assert build.unavailable(torch.float32) is None
    assert build.status().path == path
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("what", ["a link", "open to all", "another user's", "a file", "in a folder open to all"])
def test_a_temporary_folder_that_others_may_write_is_not_used(
    what: str, no_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # What lies there would be loaded if it were trusted.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFATTN_CACHE", str(tmp_path / "planted"))
        planted = build.compile_kernel()
    if what == "a link":
        no_cache.symlink_to(tmp_path / "planted")
    elif what == "a file":
        no_cache.touch()
    else:
        os.rename(tmp_path / "planted", no_cache)
        no_cache.chmod(0o777 if what == "open to all" else 0o700)
    if what == "another user's":
        if os.getuid() != 0:
            pytest.skip("only root gives a folder away")
        os.chown(no_cache, 12345, -1)
    if what == "in a folder open to all":
        no_cache.parent.chmod(0o777)
    assert compiling.find(compiling.BuildKey.of_this_machine()) is None
    assert build.unavailable(torch.float32) is None
    assert "so each process compiles the fused CPU kernel for itself alone; name a folder" in capsys.readouterr().err
    path = build.status().path
    assert path is not None
    assert not Path(path).is_relative_to(no_cache)
    assert Path(path).is_relative_to(tmp_path / "tmp") or what == "a link"
    assert Path(path).name == Path(planted.path).name


def test_a_kernel_in_a_cache_that_cannot_be_written_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built = build.compile_kernel()
    capsys.readouterr()

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("os.mkdir", "os.rename", "os.replace", "tempfile.TemporaryFile", "tempfile.mkdtemp"):
        monkeypatch.setattr(name, read_only)
    monkeypatch.setattr(compiling, "build", read_only)
    assert build.unavailable(torch.float32) is None
    assert build.status().path == built.path
    assert capsys.readouterr().err == ""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """A file system of 16 MB, and a function that mounts it again with other options."""
    with file_system(tmp_path / "disk", "16m") as mounted:
        yield mounted


def test_a_file_system_that_is_read_only_or_full(
    disk: tuple[Path, Callable[[str], None]], no_cache: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder, mount_again = disk
    monkeypatch.setenv("DIFFATTN_CACHE", str(folder))
    built = build.compile_kernel()
    capsys.readouterr()
    mount_again("ro")
    assert build.unavailable(torch.float32) is None
    assert build.status().path == built.path
    assert capsys.readouterr().err == ""
    # Another source, whose kernel is not there: kept elsewhere, and compiled once.
    (compiling.SOURCES / "two.cpp").write_text('#include "one.h"\nint one() { return 2; }\n')
    for options, reason in (("ro", errno.EROFS), ("rw,size=64k", errno.ENOSPC)):
        mount_again(options)
        monkeypatch.setattr(build, "_outcome", None)
        assert build.unavailable(torch.float32) is None
        warning = capsys.readouterr().err.splitlines()[0]
        assert f"{folder}/kernels cannot be written ({os.strerror(reason)})" in warning
        assert Path(str(build.status().path)).is_relative_to(no_cache)
        shutil.rmtree(no_cache)


def test_a_user_without_a_home_has_a_temporary_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("DIFFATTN_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cache_folder() == tmp_path / f"diffattn-{os.getuid()}"
    assert list(tmp_path.glob("~*")) == []
    path = Path(build.compile_kernel().path)
    assert path.is_relative_to(cache_folder())


def test_a_disk_that_is_full_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiler(tmp_path, monkeypatch, "echo 'fatal error: error writing to /x.s: No space left on device'; exit 1")
    refused(capsys, "No space left on device", "free some space, or name another folder with DIFFATTN_CACHE")


def test_a_folder_of_its_own_is_deleted_at_the_end(no_cache: Path, tmp_path: Path) -> None:
    no_cache.touch()
    program = PROCESS.replace(
        "build.compile_kernel()", "compiling.build(compiling.BuildKey.of_this_machine(), force=False)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(compiling.SOURCES)], capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith(f"{tmp_path}/tmp/diffattn-")
    assert list((tmp_path / "tmp").glob("diffattn-*")) == [no_cache]


def test_switched_off(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setenv("DIFFATTN_FUSED", "0")
    assert build.unavailable(torch.float32) == "fused_cpu: switched off by DIFFATTN_FUSED=0"
    assert set(build.status().reasons.values()) == {"fused_cpu: switched off by DIFFATTN_FUSED=0"}
    assert not build.status().pending
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "cache").exists()


def test_a_system_that_is_not_served(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    reason = "fused_cpu: the kernel serves Linux and macOS, not win32, where the standard path serves"
    assert build.unavailable(torch.float32) == reason
    assert set(build.status().reasons.values()) == {reason}
    assert not build.status().pending
    assert capsys.readouterr().err == ""
    with pytest.raises(UnsupportedError, match="not win32"):
        build.compile_kernel()
    assert not (tmp_path / "cache").exists()


def test_what_apples_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    recipe = compiling.BuildKey.of_this_machine()
    assert recipe.instructions == "DEFAULT"
    compiled, linked = [line for line in compiling._ninja_file(recipe).splitlines() if "command = " in line]
    assert "-march" not in compiled
    assert "-undefined dynamic_lookup -lc10 -ltorch_cpu" in linked
    assert "no-as-needed" not in linked
