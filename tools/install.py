"""Runs pip and says what it is at, a line at a time: large files, every twentieth package, the writing.

    python3 tools/install.py .venv/bin/python --constraint constraints.txt --editable .

pip itself says either nothing or several hundred lines. Its errors stand as they are; its exit status is this one's.
Runs before anything is installed, so it needs the standard library alone.
"""

import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import IO

# Without a word from pip.
PATIENCE = 10.0
_FILE = re.compile(r"(?:Downloading|Using cached) (\S+) \(([\d.]+) ([MG]B)\)")


def main(arguments: Sequence[str]) -> int:
    """Install with the interpreter that is the first argument; the others are pip's."""
    command = [arguments[0], "-m", "pip", "install", "--disable-pip-version-check", *arguments[1:]]
    pip = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace")
    assert pip.stdout is not None
    found, doing, began = 0, "looking for packages", time.monotonic()
    for line in _lines(pip.stdout):
        said = None
        if line is None:
            said = f"still {doing}, {time.monotonic() - began:.0f} s"
        elif line.startswith(("Collecting ", "Processing ")):
            found += 1
            doing, began = f"looking for {line.split()[1]}", time.monotonic()
            said = f"{found} packages found" if found % 20 == 0 else None
        elif file := _FILE.search(line):
            doing, began = f"getting {file[1]} ({file[2]} {file[3]})", time.monotonic()
            said = doing if file[3] == "GB" or float(file[2]) >= 10 else None
        elif line.startswith("Installing collected packages"):
            doing, began = f"writing {line.count(',') + 1} packages", time.monotonic()
            said = doing
        if said is not None:
            print(f"  {said}", flush=True)
    return pip.wait()


def _lines(stream: IO[str]) -> Iterator[str | None]:
    """The lines as they come, and None where none came for a while."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=PATIENCE)
        except queue.Empty:
            yield None
            continue
        if line is None:
            return
        yield line


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
