"""Tasks of EleutherAI's lm-eval on a model: the library's own by name, and two that need no network.

``text_continuation`` and ``text_likelihood`` are made from held-out text, as tasks of lm-eval: which of four pieces of
text goes on where another ends, and how many bits each byte costs.

Source: arXiv 2410.05258v2, Table 1, for the names in ``PAPER``.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from diffattn.errors import ConfigError, DataError, UnsupportedError, one_line
from diffattn.probes.lm_eval_private import evaluator, task_manager
from diffattn.probes.options import MOST_TOGETHER, StudyOptions
from diffattn.probes.study import Point, StudiedModel, Study
from diffattn.results.study import Axes

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from diffattn.data.documents import Document

PAPER = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "piqa", "winogrande")
# Words that are shown, and words of each piece to choose from.
_SHOWN, _CHOICE, _CHOICES = 60, 12, 4
# Words of a text whose likelihood is asked for.
_WORDS = 150
_EXAMPLES = 200


@dataclass(frozen=True, kw_only=True)
class StandardOptions(StudyOptions):
    """The options of ``diffattn eval standard``."""

    tasks: tuple[str, ...] = ("text_continuation", "text_likelihood")
    """Names of tasks of lm-eval; paper means the seven of the paper's Table 1, which need a network."""
    shots: int | None = None
    """Solved examples in each prompt. Default: the task's own number."""
    limit: int | None = None
    """Questions of each task. Default: all."""
    batch_size: int = 8
    """Texts that are read together."""
    seed: int = 0
    """Random seed for the examples that are drawn."""

    def __post_init__(self) -> None:
        self.check_bounds(shots=(0, 1000), limit=(1, 10**9), batch_size=(1, MOST_TOGETHER))
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            given = f"tasks is {' '.join(self.tasks) or 'empty'}"
            raise ConfigError(given, "at least one, each once", "change --tasks")


class TaskValues(NamedTuple):
    """The results of a model in one task."""

    values: dict[str, list[float]]
    """The value of every example, by metric: accuracy, accuracy with the answers' likelihoods divided by their length,
    or bits per byte."""
    shots: int
    """Solved examples in each prompt."""


def measure_standard(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    options: StandardOptions | None = None,
) -> dict[str, TaskValues]:
    """Runs tasks of lm-eval.

    Args:
        model, tokenizer: any causal model of ``transformers``.
        documents: held-out text, of which the offline tasks are made.
        options: the tasks, the number of examples of each, and the shots.

    Returns:
        The values by task; a group of tasks counts as its tasks.

    Raises:
        ConfigError: a task that lm-eval does not know.
        DataError: too little text for an offline task.
        UnsupportedError: lm-eval is not installed, a task's data are neither here nor within reach, or one of its
            answers is longer than what the model reads.

    Source: ``lm_eval.evaluator.evaluate``.
    """
    import numpy as np

    options = options or StandardOptions()
    try:
        evaluate, HFLM = evaluator()
    except ImportError as error:
        given = f"lm-eval cannot be imported ({error})"
        raise UnsupportedError(given, "lm-eval for the standard tasks", "pip install 'diffattn[eval]'") from None
    from diffattn.model.loading import positions_of

    names = [name for given in options.tasks for name in (PAPER if given == "paper" else (given,))]
    made = {name: _MADE[name](documents, np.random.default_rng(options.seed)) for name in names if name in OFFLINE}
    with _quiet():
        known = _known_tasks(any(name not in OFFLINE for name in names))
        for name in names:
            if name not in OFFLINE and name not in known.all_tasks:
                raise ConfigError(
                    f"task {name!r} is not known to lm-eval",
                    f"{', '.join(OFFLINE)}, paper or a name of its list of tasks",
                    "correct the name",
                )
        loaded = _loaded(known, [made.get(name, name) for name in names])
        for task in loaded["tasks"].values():
            if options.shots is not None or task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=options.shots or 0)
            task.set_fewshot_seed(seed=options.seed)
        reader = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=options.batch_size,
            max_length=positions_of(model.config),
        )
        try:
            found = evaluate(reader, loaded, limit=options.limit, bootstrap_iters=0, log_samples=True)
        except AssertionError:
            # lm-eval asserts that an answer alone is not longer than what the model reads.
            raise UnsupportedError(
                f"an answer of {' or '.join(names)} has more tokens than the {positions_of(model.config)} that the "
                "model reads",
                "a model with more positions",
                "or choose other --tasks",
            ) from None
    assert found is not None
    return {name: _metrics(task, found["samples"][name]) for name, task in loaded["tasks"].items()}


@functools.cache
def _known_tasks(library: bool) -> Any:
    """Returns the tasks that lm-eval can load; those of the library are thousands of files, read once."""
    return task_manager(library=library)


def _loaded(known: Any, names: list[Any]) -> Any:
    """Returns the tasks with their data.

    Raises:
        UnsupportedError: the data of a task cannot be loaded.
    """
    try:
        return known.load(names)
    # The hub, the network and the disk have errors of many types.
    except Exception as error:
        raise UnsupportedError(
            f"the data of {', '.join(name for name in names if isinstance(name, str))} cannot be "
            f"loaded ({one_line(error)})",
            "a network or a cache that holds them",
            f"or take the tasks that need none, {', '.join(OFFLINE)}",
        ) from None


def _metrics(task: Any, samples: list[Any]) -> TaskValues:
    """Returns the value of every example, where lm-eval measured one number, or a likelihood and its length."""
    first = samples[0]["filter"]
    rows = sorted((row for row in samples if row["filter"] == first), key=lambda row: row["doc_id"])
    found: dict[str, list[float]] = {}
    for metric in rows[0]["metrics"]:
        values = [row[metric] for row in rows]
        if metric == "bits_per_byte":
            found[metric] = [-likelihood / length / math.log(2) for likelihood, length in values]
        elif all(isinstance(value, int | float) for value in values):
            found[metric] = [float(value) for value in values]
    return TaskValues(found, task.get_config("num_fewshot"))


def _continuation(documents: Sequence[Document], random: np.random.Generator) -> dict[str, object]:
    """Returns a task in which a passage goes on: with its own next words, or with those of three other passages."""
    words = [document.text.split() for document in documents]
    long = [each for each in words if len(each) >= _SHOWN + _CHOICE]
    if not long:
        given = f"no held-out document has {_SHOWN + _CHOICE} words"
        raise DataError(given, "one for text_continuation", "give more text")
    import numpy as np

    share = np.array([len(each) - _SHOWN - _CHOICE + 1 for each in long], dtype=float)

    def passage() -> tuple[str, str]:
        each = long[int(random.choice(len(long), p=share / share.sum()))]
        start = int(random.integers(0, len(each) - _SHOWN - _CHOICE + 1))
        middle = start + _SHOWN
        return " ".join(each[start:middle]), " ".join(each[middle : middle + _CHOICE])

    rows = []
    for _ in range(_EXAMPLES):
        query, right = passage()
        choices = [right, *(passage()[1] for _ in range(_CHOICES - 1))]
        order = [int(index) for index in random.permutation(_CHOICES)]
        rows.append({"query": query, "choices": [choices[index] for index in order], "gold": order.index(0)})
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    return _task(
        "text_continuation", rows, output_type="multiple_choice", doc_to_text="{{query}}", doc_to_target="gold",
        doc_to_choice="choices", metric_list=metrics,
    )  # fmt: skip


def _likelihood(documents: Sequence[Document], random: np.random.Generator) -> dict[str, object]:
    """Returns a task of pieces of text whose likelihood is asked for."""
    words = [word for document in documents for word in document.text.split()]
    pieces = [" ".join(words[start : start + _WORDS]) for start in range(0, len(words) - _WORDS + 1, _WORDS)]
    if not pieces:
        given = f"the held-out text has {len(words)} words"
        raise DataError(given, f"{_WORDS} for text_likelihood", "give more text")
    rows: list[dict[str, object]] = [{"text": piece} for piece in pieces[:_EXAMPLES]]
    metrics = [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}]
    return _task(
        "text_likelihood", rows, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}",
        metric_list=metrics,
    )  # fmt: skip


_MADE = {"text_continuation": _continuation, "text_likelihood": _likelihood}
OFFLINE = tuple(_MADE)


def _task(name: str, rows: Sequence[dict[str, object]], **fields: object) -> dict[str, object]:
    """Returns a task of lm-eval whose examples are given."""
    from datasets import Dataset

    def examples(**_: object) -> dict[str, Dataset]:
        return {"test": Dataset.from_list(list(rows))}

    # Demonstrations are other examples of the same split.
    return {"task": name, "custom_dataset": examples, "test_split": "test", "fewshot_split": "test", **fields}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the library's log, and its bars of progress unless a person looks."""
    log = logging.getLogger("lm_eval")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(before)


def _measure(subject: StudiedModel, options: StandardOptions) -> Iterator[Point]:
    """Yields the values of every task and metric."""
    measured = measure_standard(subject.model, subject.tokenizer, subject.documents, options)
    # lm-eval itself shows how far it is within the tasks.
    subject.on_progress(len(options.tasks), len(options.tasks))
    for task, found in measured.items():
        for metric, values in found.values.items():
            yield Point(f"{task}, {metric.replace('_', ' ')}", found.shots, values)


STUDY = Study(
    name="standard",
    title="Tasks of lm-eval",
    sentence="Run tasks of the program lm-eval; two of them need no network.",
    source="arXiv 2410.05258v2, Table 1",
    options=StandardOptions,
    measure=_measure,
    axes=Axes(x="demonstrations", y="", by="", logarithmic=False),
)
