"""The names of lm-eval that the study of standard tasks uses although lm-eval does not promise to keep them.

Each function imports lm-eval when it is called, since importing it takes seconds and it may not be installed.
"""

from __future__ import annotations

from typing import Any

from diffattn.private_names import PrivateName


def evaluator() -> tuple[Any, Any]:
    """Returns the function that evaluates tasks, and the class that lets it read a model of ``transformers``.

    Raises:
        ImportError: lm-eval is not installed, or its modules have other names.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    return evaluate, HFLM


def task_manager(*, library: bool) -> Any:
    """Returns what loads tasks by their name; with ``library`` also those that lm-eval brings, thousands of files."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=library)


_TESTED = ">=0.4.13,<0.4.14"
_TASKS = ("diffattn eval standard", "lm-eval documents how a task is made in Python and asked for its samples")
NAMES = (
    PrivateName("lm_eval.evaluator:evaluate", _TESTED, *_TASKS),
    PrivateName("lm_eval.models.huggingface:HFLM", _TESTED, *_TASKS),
    PrivateName("lm_eval.tasks:TaskManager.load", _TESTED, *_TASKS),
    PrivateName("lm_eval.tasks:TaskManager.all_tasks", _TESTED, *_TASKS),
    *(
        PrivateName(f"lm_eval.api.task:ConfigurableTask.{name}", _TESTED, *_TASKS)
        for name in ("get_config", "set_config", "set_fewshot_seed")
    ),
)
