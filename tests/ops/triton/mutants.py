"""Mistakes in the Triton kernels that a comparison must find: copies of their source with one replacement each."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from support.triton_cases import Kernels, package_kernels

PACKAGE = "diffattn.ops.triton"


class Mutation(NamedTuple):
    """The text that is replaced, which stands once in the file, and the call that shows it."""

    file: str
    right: str
    wrong: str
    call: dict[str, Any]


SQUARE, LONGER = {"T": 19}, {"T": 19, "S": 27}
SHARED = {"T": 9, "H": 4, "noise_heads": 2}
MUTATIONS = {
    "swapped maps": Mutation(
        "forward.py", "signal - weight[:, None] * noise", "noise - weight[:, None] * signal", SQUARE
    ),
    "no λ in d_k2": Mutation(
        "backward.py",
        "ds2 = (p2 * (",
        "ds2 = (p2 / tl.maximum(tl.load(at + 4 * step), 0.1)[None, :] * (",
        {**SQUARE, "change": lambda x: x._replace(lam=0.2 + 0.0 * x.lam)},
    ),
    "top-left causal": Mutation(
        "tiles.py", "key[None, :] <= (S - T + t)[:, None]", "key[None, :] <= t[:, None]", LONGER
    ),
    "last block dropped": Mutation(
        "tiles.py",
        "low, high, full = 0, S, S // KEYS * KEYS",
        "low, high, full = 0, S // KEYS * KEYS, S // KEYS * KEYS",
        {**LONGER, "causal": False},
    ),
    "last block dropped, causal": Mutation(
        "tiles.py",
        "high = tl.minimum(S, S - T + start + ROWS)",
        "high = tl.minimum(S // KEYS * KEYS, S - T + start + ROWS)",
        SQUARE,
    ),
    "log-sum-exp in natural logarithms": Mutation(
        "forward.py", "m * c + tl.math.log2(total)", "(m * c + tl.math.log2(total)) * 0.6931472", SQUARE
    ),
    "D1 without λ D2": Mutation("backward.py", "tl.sum(grad * o, 1) + weight * sum2", "tl.sum(grad * o, 1)", SQUARE),
    "last row not written": Mutation(
        "tiles.py", "inside = row[:, None] < limit - start", "inside = row[:, None] < limit - start - 1", SQUARE
    ),
    "gradient of λ not written": Mutation(
        "backward.py", "-sum2, mask=inside)", "-sum2, mask=inside & (t < 0))", SQUARE
    ),
    "noise of another head": Mutation(
        "shared_forward.py", "rows_of(matrix_of(o2, b, n,", "rows_of(matrix_of(o2, b, g,", SHARED
    ),
    "noise's gradient of one signal": Mutation("shared_backward.py", "whole -= weight", "whole = -weight", SHARED),
    "D of a signal without its noise": Mutation(
        "shared_backward.py", "tl.sum(grad * o, 1) + weight * of_noise", "tl.sum(grad * o, 1)", SHARED
    ),
    "ranges without their ends": Mutation(
        "tiles.py",
        "seen = (first[None, :] <= t[:, None]) & (t[:, None] < end[None, :])",
        "seen = first[None, :] <= t[:, None]",
        {"sequences": (7, 12)},
    ),
}


@contextlib.contextmanager
def mutant(mutation: Mutation) -> Iterator[Kernels]:
    """The kernels with one mistake, imported in the place of the package's."""
    real = {name: module for name, module in sys.modules.items() if name.startswith(PACKAGE)}
    for name in real:
        del sys.modules[name]
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(Path(*real[PACKAGE].__path__), folder, dirs_exist_ok=True)
        file = Path(folder, mutation.file)
        text = file.read_text(encoding="utf-8")
        assert text.count(mutation.right) == 1, f"{mutation.right!r} stands {text.count(mutation.right)} times"
        file.write_text(text.replace(mutation.right, mutation.wrong), encoding="utf-8")
        package = ModuleType(PACKAGE)
        package.__path__ = [folder]
        sys.modules[PACKAGE] = package
        try:
            yield package_kernels()
        finally:
            for name in [name for name in sys.modules if name.startswith(PACKAGE)]:
                del sys.modules[name]
            sys.modules.update(real)
