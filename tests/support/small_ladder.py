"""A ladder that takes seconds: two sizes of a few thousand parameters on the text of ``small_comparison``."""

from pathlib import Path

from diffattn.scaling.options import LadderOptions


def small(folder: Path, **changes: object) -> LadderOptions:
    options = {
        "sizes": ("38k", "7k"), "tokens": "100", "seeds": 2, "text": str(folder / "text"), "vocab_size": 300,
        "context": 16, "batch_size": 2, "dtype": "float32", "device": "cpu",
    }  # fmt: skip
    return LadderOptions(**options | changes)  # type: ignore[arg-type]
