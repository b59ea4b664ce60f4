"""Tasks of EleutherAI's lm-eval on a model that is loaded: its own by name, and two that need no network.

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
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diffattn.data.text import Document
from diffattn.errors import ConfigError, DataError, UnsupportedError
from diffattn.model.loading import positions_of
from diffattn.probes.options import StandardOptions

PAPER = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "piqa", "winogrande")
# Words that are shown, and words of each piece to choose from.
_SHOWN, _CHOICE, _CHOICES = 60, 12, 4
# Words of a text whose likelihood is asked for.
_WORDS = 150
_EXAMPLES = 200


def measure_standard(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    options: StandardOptions | None = None,
) -> dict[str, dict[str, Any]]:
    """Run tasks of lm-eval.

    Args:
        model, tokenizer: any causal model of ``transformers``.
        documents: held-out text, of which the offline tasks are made.
        options: which tasks, how many examples of each, how many shots.

    Returns:
        By task, a dict by metric: ``values`` of every example (accuracy, accuracy with the answers' likelihoods divided
        by their length, or bits per byte), and ``shots``. A group of tasks counts as its tasks.

    Raises:
        ConfigError: a task that lm-eval does not know.
        DataError: too little text for an offline task.
        UnsupportedError: lm-eval is not installed, a task's data are neither here nor within reach, or one of its
            answers is longer than what the model reads.

    Source: ``lm_eval.evaluator.evaluate``.
    """
    options = options or StandardOptions()
    try:
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UnsupportedError(
            f"lm-eval cannot be imported ({error}); wanted for the standard tasks: pip install 'diffattn[eval]'"
        ) from None
    names = [name for given in options.tasks for name in (PAPER if given == "paper" else (given,))]
    made = {name: _MADE[name](documents, np.random.default_rng(options.seed)) for name in names if name in OFFLINE}
    with _quiet():
        known = _known_tasks(any(name not in OFFLINE for name in names))
        for name in names:
            if name not in OFFLINE and name not in known.all_tasks:
                raise ConfigError(
                    f"task {name!r} is not known to lm-eval; wanted {', '.join(OFFLINE)}, paper or a name of its list "
                    "of tasks: correct the name"
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
            # What lm-eval makes of an answer that alone is longer than the model reads.
            raise UnsupportedError(
                f"an answer of {' or '.join(names)} has more tokens than the {positions_of(model.config)} that the "
                "model reads; wanted a model with more positions: or choose other --tasks"
            ) from None
    assert found is not None
    return {name: _metrics(task, found["samples"][name]) for name, task in loaded["tasks"].items()}


@functools.cache
def _known_tasks(library: bool) -> Any:
    """The tasks that lm-eval can load; those of the library are thousands of files, read once."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=library)


def _loaded(known: Any, names: list[Any]) -> Any:
    try:
        return known.load(names)
    # Of the hub, of the network and of the disk, each with a type of its own.
    except Exception as error:
        line = " ".join(str(error).split())
        raise UnsupportedError(
            f"the data of {', '.join(name for name in names if isinstance(name, str))} cannot be had ({line}); wanted "
            f"a network or a cache that holds them: or take the tasks that need none, {', '.join(OFFLINE)}"
        ) from None


def _metrics(task: Any, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Values of every example: what lm-eval measured, where it is one number or a likelihood and its length."""
    first = samples[0]["filter"]
    rows = sorted((row for row in samples if row["filter"] == first), key=lambda row: row["doc_id"])
    found: dict[str, Any] = {}
    for metric in rows[0]["metrics"]:
        values = [row[metric] for row in rows]
        if metric == "bits_per_byte":
            found[metric] = [-likelihood / length / math.log(2) for likelihood, length in values]
        elif all(isinstance(value, int | float) for value in values):
            found[metric] = [float(value) for value in values]
    return {"values": found, "shots": task.get_config("num_fewshot")}


def _continuation(documents: Sequence[Document], random: np.random.Generator) -> dict[str, Any]:
    """Where a passage goes on: its own next words, or those behind three other places."""
    words = [document.text.split() for document in documents]
    long = [each for each in words if len(each) >= _SHOWN + _CHOICE]
    if not long:
        raise DataError(
            f"no held-out document has {_SHOWN + _CHOICE} words; wanted one for text_continuation: give more text"
        )
    share = np.array([len(each) - _SHOWN - _CHOICE + 1 for each in long], dtype=float)

    def place() -> tuple[str, str]:
        each = long[int(random.choice(len(long), p=share / share.sum()))]
        start = int(random.integers(0, len(each) - _SHOWN - _CHOICE + 1))
        middle = start + _SHOWN
        return " ".join(each[start:middle]), " ".join(each[middle : middle + _CHOICE])

    rows = []
    for _ in range(_EXAMPLES):
        query, right = place()
        choices = [right, *(place()[1] for _ in range(_CHOICES - 1))]
        order = [int(index) for index in random.permutation(_CHOICES)]
        rows.append({"query": query, "choices": [choices[index] for index in order], "gold": order.index(0)})
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    return _task(
        "text_continuation", rows, output_type="multiple_choice", doc_to_text="{{query}}", doc_to_target="gold",
        doc_to_choice="choices", metric_list=metrics,
    )  # fmt: skip


def _likelihood(documents: Sequence[Document], random: np.random.Generator) -> dict[str, Any]:
    """Pieces of text one after another."""
    words = [word for document in documents for word in document.text.split()]
    pieces = [" ".join(words[start : start + _WORDS]) for start in range(0, len(words) - _WORDS + 1, _WORDS)]
    if not pieces:
        raise DataError(f"the held-out text has {len(words)} words; wanted {_WORDS} for text_likelihood: give more")
    rows = [{"text": piece} for piece in pieces[:_EXAMPLES]]
    metrics = [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}]
    return _task(
        "text_likelihood", rows, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}",
        metric_list=metrics,
    )  # fmt: skip


_MADE = {"text_continuation": _continuation, "text_likelihood": _likelihood}
OFFLINE = tuple(_MADE)


def _task(name: str, rows: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    """A task of lm-eval whose examples are given."""
    from datasets import Dataset

    def examples(**_: Any) -> dict[str, Dataset]:
        return {"test": Dataset.from_list(rows)}

    # Demonstrations are other examples of the same split.
    return {"task": name, "custom_dataset": examples, "test_split": "test", "fewshot_split": "test", **fields}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's log; with its bars of progress where a person looks."""
    log = logging.getLogger("lm_eval")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(before)
