"""Makes the files of a release and tries them: `make dist` (docs/release.md).

The source archive and the wheel are built, the wheel from the archive, so that the archive is known to be whole. twine
checks what PyPI would refuse. Then the wheel is installed into a new environment and run there.

    python -m tools.dist --out dist
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

from tools.wheels import copied_sources, run

# What the new environment runs: the operation, and where it was imported from.
PROGRAM = """
import torch, diffattn
q1, k1, q2, k2, v = (torch.randn(1, 5, 2, 8) for _ in range(5))
assert diffattn.diff_attention(q1, k1, q2, k2, v, lam=0.8).isfinite().all()
print(diffattn.__file__)
"""


def build(out: Path) -> tuple[Path, Path]:
    """The source archive and the wheel, in the folder `out`, as twine lets them pass."""
    with tempfile.TemporaryDirectory(prefix="diffattn-dist-") as scratch:
        source, made = copied_sources(Path(scratch)), Path(scratch) / "made"
        run("build", "--no-isolation", "--outdir", made, source)
        files = sorted(made.iterdir())
        run("twine", "check", "--strict", *files)
        out.mkdir(parents=True, exist_ok=True)
        wheel, archive = (Path(shutil.move(file, out / file.name)) for file in files)
    return archive, wheel


def try_out(wheel: Path, folder: Path) -> list[str]:
    """Installs the wheel into a new environment in `folder`; returns what its command and its operation print.

    The environment holds diffattn alone. Other packages are this interpreter's own, by a path, which brings no
    diffattn that is installed here for development.
    """
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    python = Path(sysconfig.get_path("scripts", "venv", {"base": str(folder), "platbase": str(folder)})) / "python"
    run("pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    said = []
    for command in ([python.with_name("diffattn"), "--version"], [python, "-c", PROGRAM]):
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"tools.dist: {command[0]} failed:\n{done.stderr}")
        said.append(done.stdout.strip())
    if not Path(said[1]).is_relative_to(site):
        sys.exit(f"tools.dist: {said[1]} was imported, and not the installed wheel")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("dist"))
    archive, wheel = build(parser.parse_args().out)
    print(archive, wheel, sep="\n")
    with tempfile.TemporaryDirectory(prefix="diffattn-try-") as scratch:
        print(try_out(wheel, Path(scratch) / "environment")[0])


if __name__ == "__main__":
    main()
