"""``diffattn compare``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal


def compare(
    *,
    shape: str = "3M",
    variants: tuple[str, ...] = ("softmax", "diff_v1", "diff_v2"),
    seeds: int = 2,
    steps: int | None = None,
    minutes: float | None = None,
    text: str = "sotu",
    context: int | None = None,
    match: Literal["parameters", "shape"] = "parameters",
    batch_size: int = 4,
    learning_rate: float = 2e-3,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    out: Path | None = None,
    resume: bool = False,
    json: bool = False,
) -> Callable[[], int]:
    """Train softmax, V1 and V2 models of one shape on real text; say what was gained and what it cost.

    Args:
        shape: Preset (300K, 3M, 30M, 830M, 1.4B, ...) or TOML file of the softmax Transformer to be replaced.
        variants: What to train; softmax is the baseline.
        seeds: Pairs to train; initial values and order of the data differ between them.
        steps: Optimizer steps of each run. Default: 250, fewer where they would take longer than 6 minutes.
        minutes: Instead of steps: as many as fit into this time for everything together.
        text: A file, a folder, or a data set's id; sotu is 12 MB of public speeches that are installed with diffattn.
        context: Tokens per block. Default: the shape's.
        match: parameters: V2's feed-forward width is narrowed until the totals match. shape: it has more parameters.
        batch_size: Blocks per step.
        learning_rate: Peak of the schedule.
        device: Where to train.
        dtype: Of the products; bfloat16 is autocast over float32 weights.
        out: Run folder. Default: a new one in runs/.
        resume: Continue the run in --out (default: the newest in runs/).
        json: Print result.json on stdout.
    """

    def call() -> int:
        from diffattn.cli.console import Console, print_json
        from diffattn.study.compare import Comparison
        from diffattn.study.compare import compare as run

        options = Comparison(
            shape=shape, variants=variants, seeds=seeds, steps=steps, minutes=minutes, text=text, context=context,
            match=match, batch_size=batch_size, learning_rate=learning_rate, device=device, dtype=dtype,
        )  # fmt: skip
        with Console("compare", out, resume=resume) as console:
            result = run(
                options,
                out=console.folder,
                resume=resume,
                command=console.command,
                on_note=console.note,
                on_progress=lambda attention, seed, step: console.progress(f"{attention} seed {seed}", step),
            )
        console.table(result)
        console.note(f"report: {console.folder / 'report.html'}")
        if json:
            print_json(result)
        return 0

    return call
