"""Compiles the C++ sources of `csrc/` and keeps the library in the cache folder, whole or not at all.

    <cache>/kernels/<sources, flags, torch>-<compiler>/    fused_cpu.so and build.json, which holds its checksum
                                              ….tmp-PID-*/ a build in progress, renamed to the above once it is whole
                                              ….lock       held by the process that builds, let go of by the system
                                              ….log        what the compiler said when it last failed

A wheel may carry libraries too (`shipped.py`). Where the cache folder (see `diffattn.machine`) cannot be written, a
temporary folder of this user's serves, or one of this process alone; what a cache folder holds is used all the same.
Compilers end with the process that started them (`guard.py`). ``CXX`` names the compiler (default: the first of g++,
c++, clang++), ``MAX_JOBS`` limits the files compiled at once, and ``DIFFATTN_VERBOSE=1`` shows what the compiler says.
"""

from __future__ import annotations

import atexit
import errno
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffattn.errors import UnsupportedError
from diffattn.files import parse_json
from diffattn.machine import cache_folder, cores, is_private, temporary_folder
from diffattn.rank import rank_here

SOURCES = Path(__file__).parent / "csrc"
_GUARD = Path(__file__).parent / "guard.py"
LIBRARY = "fused_cpu.so"
COMPILE_SECONDS = 600.0

# The compiler's flags for each instruction set of a machine, by the names of `torch.backends.cpu.get_cpu_capability`.
# This table is all there is: compiling on first use takes the set of its processor, a wheel carries those of its
# machine, and what has no line here is compiled as DEFAULT.
INSTRUCTION_SETS = {
    "x86_64": {
        "DEFAULT": "",
        "AVX2": "-march=x86-64-v3",
        "AVX512": "-march=x86-64-v4 -mprefer-vector-width=512",
    },
    # NEON is in all of them.
    "aarch64": {"DEFAULT": ""},
}
_FLAGS = "-O3 -std=c++20 -fPIC -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wno-psabi"
_COMPILERS = ("g++", "c++", "clang++")
# The options of the linker on each system that is served.
_LINKING = {"linux": "-Wl,--no-as-needed", "darwin": "-undefined dynamic_lookup"}


@dataclass(frozen=True)
class Built:
    """A finished library."""

    path: str
    """The file."""
    seconds: float
    """The seconds that compiling it took."""
    digest: str = ""
    """The digest of its sources and flags."""
    shipped: bool = False
    """True where a wheel brought it."""


@dataclass(frozen=True)
class BuildKey:
    """The sources, flags and compiler of a kernel: everything that the name of its folder depends on."""

    sources: dict[str, bytes]
    instructions: str
    flags: str
    digest: str  # of the sources and the flags, whatever the torch and the compiler
    compiler: list[str]
    version: str | None
    key: str
    folder: str

    @classmethod
    def of_this_machine(cls) -> BuildKey:
        capability = torch.backends.cpu.get_cpu_capability()
        return cls.of(capability if capability in INSTRUCTION_SETS.get(machine(), {}) else "DEFAULT")

    @classmethod
    def of(cls, instructions: str) -> BuildKey:
        """Returns the key for an instruction set of this machine, which its processor need not have."""
        files = sorted(path for path in SOURCES.glob("*") if path.suffix in (".cpp", ".h"))
        sources = {path.name: path.read_bytes() for path in files}
        flags = f"{_FLAGS} {INSTRUCTION_SETS.get(machine(), {}).get(instructions, '')}".strip()
        digest = _digest([[name, content.hex()] for name, content in sources.items()], flags)
        key = _digest(digest, torch.__version__)
        compiler = shlex.split(os.environ.get("CXX", "")) or [name for name in _COMPILERS if shutil.which(name)][:1]
        path = shutil.which(compiler[0]) if compiler else None
        if path is None:
            return cls(sources, instructions, flags, digest, [], None, key, key)
        version = shlex.join(compiler)
        # One that cannot even tell its version is left to fail at compiling, where its words go into the log.
        with suppress(OSError, subprocess.TimeoutExpired):
            said = subprocess.run(
                [*compiler, "--version"], capture_output=True, text=True, errors="replace", timeout=30
            )
            version = next(iter(said.stdout.splitlines()), version)
        folder = f"{key}-{_digest(os.path.realpath(path), compiler[1:], version)}"
        return cls(sources, instructions, flags, digest, compiler, version, key, folder)


def _digest(*facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def machine() -> str:
    """The processor's family, by the names of `INSTRUCTION_SETS`."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def unserved_system() -> str | None:
    """Returns one sentence where there is no kernel for this system, whatever its compiler."""
    if sys.platform in _LINKING:
        return None
    return f"fused_cpu: the kernel serves Linux and macOS, not {sys.platform}, where the standard path serves"


def say(line: str) -> None:
    if rank_here().is_first:
        print(f"diffattn: {line}", file=sys.stderr, flush=True)


def find(build_key: BuildKey) -> Built | None:
    """Returns a finished and undamaged library of this key; of any compiler where this machine has none."""
    folders: list[Path] = []
    for kernels in _places():
        folders += [kernels / build_key.folder] if build_key.compiler else sorted(kernels.glob(f"{build_key.key}-*/"))
    return next((built for folder in folders if ".tmp-" not in folder.name and (built := read(folder))), None)


def _places() -> list[Path]:
    """Returns the folders of kernels. What another user may have put into a temporary folder is never loaded."""
    roots = dict.fromkeys([cache_folder(), temporary_folder()])
    return [root / "kernels" for root in roots if root != temporary_folder() or is_private(root)]


def read(folder: Path) -> Built | None:
    """The library of a folder as `_build_in` leaves it; None where anything of it is missing or damaged."""
    try:
        said = parse_json((folder / "build.json").read_bytes())
        # The loader would touch pages that a truncated file does not have, and the process would end.
        if hashlib.sha256((folder / LIBRARY).read_bytes()).hexdigest() != said["sha256"]:
            return None
        return Built(str(folder / LIBRARY), float(said["seconds"]), str(said.get("digest")))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def facts(build_key: BuildKey, library: Path, seconds: float) -> dict[str, str | float | None]:
    """Returns what build.json says of a library."""
    return {
        "sha256": hashlib.sha256(library.read_bytes()).hexdigest(),
        "seconds": seconds, "compiler": build_key.version, "flags": build_key.flags, "torch": torch.__version__,
        "digest": build_key.digest,
    }  # fmt: skip


def build(build_key: BuildKey, *, force: bool, keep: bool = False) -> Built:
    """Compile, unless another process does so first and `force` is off; with `keep` in the cache or not at all."""
    if unserved := unserved_system():
        raise UnsupportedError(unserved, "Linux or macOS", "do without the kernel, or use it there")
    if not build_key.compiler:
        raise no_compiler()
    asked = time.time()
    try:
        kernels = _writable_folder(keep)
        log = kernels / f"{build_key.folder}.log"
        with _held(kernels, build_key):
            if not force and (built := read(kernels / build_key.folder)):
                return built
            if log.exists() and log.stat().st_mtime > asked:
                # The process that this one waited for has just failed at the same.
                raise _compile_error(log)
            for left in kernels.glob(f"{build_key.folder}.tmp-*"):
                # Under the lock, so whoever made it was killed.
                say("a process that compiled the fused CPU kernel was ended before it was done; its files are removed")
                shutil.rmtree(left, ignore_errors=True)
            return _build_in(kernels, build_key, log)
    # filelock raises NotImplementedError where the file system has no locks.
    except (OSError, NotImplementedError) as error:
        raise _not_compiled(str(error), "name a folder that can be written with DIFFATTN_CACHE") from error


def _build_in(kernels: Path, build_key: BuildKey, log: Path) -> Built:
    """Compile under a temporary name and rename, so that no one ever sees half a library."""
    folder = kernels / build_key.folder
    prefix = f"{build_key.folder}.tmp-{os.getpid()}-"
    with tempfile.TemporaryDirectory(dir=kernels, prefix=prefix, ignore_cleanup_errors=True) as scratch:
        say("compiling the fused CPU kernel, once (about 30 s) …")
        began = time.monotonic()
        library = _compile(build_key, Path(scratch) / "work", log)
        seconds = round(time.monotonic() - began, 1)
        new = Path(scratch) / "new"
        new.mkdir()
        (new / "build.json").write_text(json.dumps(facts(build_key, library, seconds), indent=1))
        os.rename(library, new / LIBRARY)
        if folder.exists():
            os.rename(folder, Path(scratch) / "old")
        os.rename(new, folder)
    log.unlink(missing_ok=True)
    say(f"compiled in {seconds:.0f} s → {folder / LIBRARY}")
    return Built(str(folder / LIBRARY), seconds, build_key.digest)


def _writable_folder(keep: bool) -> Path:
    """The folder to build in: the cache's, else a temporary one of this user's, else one of this process alone."""
    try:
        return _made(cache_folder())
    except OSError as error:
        if keep:
            raise
        unwritable = f"cache folder {cache_folder() / 'kernels'} cannot be written ({error.strerror or error})"
    way_out = "name a folder that can be written: DIFFATTN_CACHE=/path/to/folder, or do without: DIFFATTN_FUSED=0"
    try:
        kernels = _made(temporary_folder())
    except OSError:
        kernels = Path(tempfile.mkdtemp(prefix="diffattn-"))
        atexit.register(shutil.rmtree, kernels, ignore_errors=True)
        say(f"{unwritable}, so each process compiles the fused CPU kernel for itself alone; {way_out}")
        return kernels
    say(f"{unwritable}, so the fused CPU kernel is kept in {temporary_folder()}; {way_out}")
    return kernels


def _made(root: Path) -> Path:
    """The folder of the kernels in a cache folder, once it is known that a library can be written there."""
    if root == temporary_folder():
        with suppress(FileExistsError):
            root.mkdir(mode=0o700)
        if not is_private(root):
            raise PermissionError(errno.EPERM, "others can write there")
    kernels = root / "kernels"
    kernels.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=kernels) as file:
        # A full disk has room for a name.
        file.write(bytes(1 << 20))
    return kernels


@contextmanager
def _held(kernels: Path, build_key: BuildKey) -> Iterator[None]:
    """Waits for the process that builds the same; the system lets go of the lock of one that died."""
    import filelock

    lock = kernels / f"{build_key.folder}.lock"
    held = filelock.FileLock(lock)
    try:
        held.acquire(timeout=0)
    except filelock.Timeout:
        # Its number is in the name of what it builds.
        builds = "".join(path.name for path in kernels.glob(f"{build_key.folder}.tmp-*"))
        number = re.search(r"\.tmp-(\d+)-", builds)
        who = f"process {number[1]}" if number else "another process"
        say(f"waiting for {who}, which compiles the fused CPU kernel (about 30 s) …")
        try:
            held.acquire(timeout=COMPILE_SECONDS + 60)
        except filelock.Timeout:
            raise _not_compiled(f"{who} still holds {lock}", "end that one") from None
    try:
        yield
    finally:
        held.release()


def _compile(build_key: BuildKey, work: Path, log: Path) -> Path:
    """Run ninja in the new folder `work` on a copy of the sources; what it said goes to `log` where it failed."""
    work.mkdir()
    for name, content in build_key.sources.items():
        (work / name).write_bytes(content)
    (work / "build.ninja").write_text(_ninja_file(build_key))
    # The wheel's program lies beside the interpreter, which is on PATH only where the environment was activated.
    ninja = shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if ninja is None:
        raise _not_compiled("ninja not found", "pip install ninja")
    jobs = os.environ.get("MAX_JOBS") or str(min(8, cores()))
    # The log is read for "error:", which compilers translate.
    environment = os.environ | {"LC_ALL": "C"}
    with (work / "log").open("wb") as output:
        run = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_GUARD), ninja, "-v", "-j", jobs],
            cwd=work, env=environment, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
        assert run.stdin is not None
        try:
            run.wait(COMPILE_SECONDS)
        except BaseException as end:
            # Whatever ended the waiting, Ctrl-C too: as if this process had ended.
            run.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                run.wait(10)
            run.kill()
            run.wait()
            if not isinstance(end, subprocess.TimeoutExpired):
                raise
            minutes = f"{COMPILE_SECONDS / 60:.0f} minutes"
            raise _not_compiled(f"{build_key.version} took over {minutes}", "name another compiler with CXX") from None
        finally:
            run.stdin.close()
    if os.environ.get("DIFFATTN_VERBOSE") == "1":
        sys.stderr.write((work / "log").read_text(errors="replace"))
    if run.returncode or not (work / LIBRARY).exists():
        os.replace(work / "log", log)
        raise _compile_error(log)
    return work / LIBRARY


def _ninja_file(build_key: BuildKey) -> str:
    from torch.utils.cpp_extension import include_paths, library_paths

    compiler = shlex.join(build_key.compiler)
    includes = " ".join(f"-isystem {shlex.quote(path)}" for path in include_paths("cpu"))
    folders = " ".join(f"-L{shlex.quote(path)}" for path in library_paths("cpu"))
    compiling = f"{compiler} {build_key.flags} -I. {includes} -c"
    linking = f"{compiler} -shared {folders} {_LINKING[sys.platform]} -lc10 -ltorch_cpu"
    objects = {name: f"{name}.o" for name in build_key.sources if name.endswith(".cpp")}
    lines = [
        f"rule compile\n  command = {compiling.replace('$', '$$')} $in -o $out",
        f"rule link\n  command = {linking.replace('$', '$$')} $in -o $out",
        *(f"build {built}: compile {name}" for name, built in objects.items()),
        f"build {LIBRARY}: link {' '.join(objects.values())}",
    ]
    return "\n".join(lines) + "\n"


def _compile_error(log: Path) -> UnsupportedError:
    lines = log.read_text(errors="replace").splitlines()
    first = next((line.strip() for line in lines if "error:" in line or "fatal:" in line), "no error was named")
    # A folder of this process alone is gone when a person looks.
    where = f", see {log}" if log.parent in _places() else ""
    full = any(os.strerror(errno.ENOSPC) in line for line in lines)
    way_out = "free some space, or name another folder with DIFFATTN_CACHE" if full else "install a C++20 compiler"
    return _not_compiled(f"{first[:300]}{where}", way_out)


def no_compiler() -> UnsupportedError:
    return _not_compiled(f"{os.environ.get('CXX') or 'g++'} not found", "install a C++20 compiler")


def _not_compiled(reason: str, way_out: str) -> UnsupportedError:
    return UnsupportedError(
        f"fused_cpu: the kernel could not be compiled ({reason})",
        "a kernel that compiles",
        f"{way_out}, then run: diffattn doctor --build",
    )
