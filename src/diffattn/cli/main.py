"""The command line: each verb is a thin front of a public Python function."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Sequence

import tyro

from diffattn.cli.ablation import ablation
from diffattn.cli.compare import compare
from diffattn.cli.convert import convert
from diffattn.cli.doctor import doctor
from diffattn.cli.evaluate import EVAL
from diffattn.cli.export import export
from diffattn.cli.generate import generate
from diffattn.cli.lens import lens
from diffattn.cli.plan import plan
from diffattn.cli.scale import scale_fit, scale_run
from diffattn.cli.serve import serve
from diffattn.cli.train import train
from diffattn.errors import DiffattnError, TrainingError

VERBS: dict[str, Callable[..., Callable[[], int]]] = {
    "compare": compare,
    "train": train,
    "plan": plan,
    "scale run": scale_run,
    "scale fit": scale_fit,
    "generate": generate,
    "serve": serve,
    "convert": convert,
    "export": export,
    **EVAL,
    "eval ablation": ablation,
    "lens": lens,
    "doctor": doctor,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``diffattn``; the exit status is 0, 2 for a user's mistake, 1 for a run that failed, 130 for Ctrl-C."""
    # Waiting threads that spin lose nearly all speed where other work shares the cores; read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if " ".join(arguments[:2]) in VERBS:
        # The parser knows a verb of two words as one.
        arguments[:2] = [" ".join(arguments[:2])]
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            call: Callable[[], int] = tyro.extras.subcommand_cli_from_dict(
                VERBS,
                prog="diffattn",
                description="Differential Transformers, each next to the softmax Transformer that it replaces.",
                args=arguments,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
            )
    except SystemExit as end:
        if end.code in (0, None):
            return 0
        return _fail(_one_line(complaint.getvalue(), arguments), status=2)
    try:
        return call()
    except TrainingError as error:
        return _fail(str(error), status=1)
    except DiffattnError as error:
        return _fail(str(error), status=2)
    except KeyboardInterrupt:
        return 130


def _fail(line: str, *, status: int) -> int:
    print(f"diffattn: {line}", file=sys.stderr)
    return status


def _one_line(box: str, arguments: list[str]) -> str:
    """What the parser says in a box of several lines, as one line."""
    # A title, a rule in some terminals, what is wrong, a rule, hints.
    lines = [line.strip("│╭╰╮╯ ") for line in box.splitlines()][1:]
    parts = re.split("[─-]{5,}", " ".join(lines))
    sentence = next((part.strip().rstrip(".") for part in parts if part.strip()), "these options cannot be read")
    nearest = re.search(r"Perhaps you meant:\s+(--[\w-]+)", " ".join(parts))
    verb = f" {arguments[0]}" if arguments and arguments[0] in VERBS else ""
    return f"{sentence}{f'; perhaps you meant {nearest[1]}' if nearest else ''}; see diffattn{verb} --help"
