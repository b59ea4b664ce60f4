"""Finds the text files of a folder, in the order of their names, and counts the other files by the reason."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path, PurePath

from diffattn.data.formats import LINES, PARQUET, PLAIN, TABLES, ending
from diffattn.errors import DataError
from diffattn.files import shown

READ = (*PLAIN, *LINES, *TABLES, *PARQUET)


class Folder:
    """The files of a folder that are read, by their names in it, and the number of other files of each kind.

    Real folders come first, then the targets of links that are not read already. So a file has one name, the same as it
    would have without links.

    Args:
        path: an existing folder.

    Raises:
        DataError: a folder inside that cannot be listed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: list[str] = []
        self.left_out = Counter[str]()
        # Endings of files of other kinds.
        self._others = Counter[str]()
        self._seen = {_identity(os.stat(parent)) for parent in (path.resolve(), *path.resolve().parents)}
        self._links: list[str] = []
        self._walk("")
        while self._links:
            links, self._links = sorted(self._links), []
            for name in links:
                if _identity(os.stat(path / name)) in self._seen:
                    self.left_out["links to folders that are read anyway or lie above"] += 1
                else:
                    self._walk(name)
        self.names.sort()

    def _walk(self, name: str) -> None:
        """Adds the files of a folder and of those below it; keeps links to folders for later."""
        try:
            entries = sorted(os.scandir(self.path / name), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(
                f"{shown(self.path / name)}: cannot be read ({error.strerror})",
                "a folder that can be listed",
                "check the folder and its permissions",
            ) from None
        self._seen.add(_identity(os.stat(self.path / name)))
        for entry in entries:
            inner = PurePath(name, entry.name).as_posix()
            if entry.name.startswith("."):
                self.left_out["hidden"] += 1
            elif os.path.isdir(entry.path):
                if entry.is_symlink() or _identity(os.stat(entry.path)) in self._seen:
                    self._links.append(inner)
                else:
                    self._walk(inner)
            else:
                self._file(inner)

    def _file(self, inner: str) -> None:
        path, kind = self.path / inner, ending(inner)
        if path.is_symlink() and not os.path.exists(path):
            self.left_out["links that lead nowhere"] += 1
            return
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            self.left_out["pipes and the like"] += 1
        elif kind not in READ:
            self._others[kind or "no ending"] += 1
        elif not found.st_size:
            self.left_out["empty"] += 1
        else:
            self.names.append(inner)

    def say(self, on_note: Callable[[str], None]) -> None:
        """Reports in one line how many files were left out, and why; reports nothing if none was."""
        reasons = [f"{reason}: {count}" for reason, count in sorted(self.left_out.items())]
        if self._others:
            kinds = sorted(self._others, key=lambda kind: (-self._others[kind], kind))
            reasons.append(f"of other kinds ({', '.join(kinds[:5])}): {self._others.total()}")
        if reasons:
            files = "1 file" if len(self.names) == 1 else f"{len(self.names)} files"
            on_note(f"{shown(self.path)}: {files} read; left out: {'; '.join(reasons)}")


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino
