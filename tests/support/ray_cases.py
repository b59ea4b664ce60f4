"""Shared by the tests on Ray: what is left of a Ray that this machine started."""

from pathlib import Path


def left_of_ray() -> set[str]:
    """Folders of Ray in ``/tmp``, and processes of Ray that live, by their numbers."""
    found = {str(path) for path in Path("/tmp").glob("ray-*")}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"raylet" in Path(words[0].decode(errors="replace")).name.encode() or words[0].startswith(b"ray::"):
            found.add(process.name)
    return found
