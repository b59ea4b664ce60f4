"""The command line: each verb is a thin front of a public Python function."""

from __future__ import annotations

import errno
import io
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from importlib.metadata import version

from diffattn import __version__
from diffattn.cli.ablation import ablation
from diffattn.cli.arguments import remember
from diffattn.cli.compare import compare
from diffattn.cli.convert import convert
from diffattn.cli.doctor import doctor
from diffattn.cli.evaluate import EVAL, plugged_in, studies
from diffattn.cli.export import export
from diffattn.cli.generate import generate
from diffattn.cli.lens import lens
from diffattn.cli.options import WIDTH, help_of, nearest, parse, shortened, summary
from diffattn.cli.plan import plan
from diffattn.cli.scale import scale_fit, scale_run
from diffattn.cli.serve import serve
from diffattn.cli.train import train
from diffattn.errors import ConfigError, DiffattnError, TrainingError

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
GROUPS = {
    "scale": "Train models of growing size, and fit scaling laws to their losses.",
    "eval": "Measure what the papers say of differential attention, on any model.",
}
_ABOUT = "Differential Transformers, each next to the softmax Transformer that it replaces."
_HELP = ("-h", "--help")
_OF_A_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR)
_VERSION = ("-V", "--version")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``diffattn``; the exit status is 0, 2 for a user's mistake, 1 for a run that failed, 130 for Ctrl-C."""
    # Waiting threads that spin lose nearly all speed where other work shares the cores; read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        # Names of files may hold bytes that are no text, and a terminal may lack characters.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return _run(sys.argv[1:] if arguments is None else list(arguments))
    except TrainingError as error:
        return _fail(str(error), status=1)
    except DiffattnError as error:
        return _fail(str(error), status=2)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read has read enough; Python would complain once more as it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        # Of a path that was given; it is used in many places, and each of them may meet one that cannot be.
        if error.errno not in _OF_A_PATH or not isinstance(error.filename, str | bytes):
            raise
        given = shortened(os.fsdecode(error.filename))
        return _fail(f"{given!r} cannot be used: {os.strerror(error.errno)}; check the path and its rights", status=2)


def _run(arguments: list[str]) -> int:
    remember(arguments)
    if arguments[:1] and arguments[0] in _VERSION:
        beside = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
        return _say(f"diffattn {__version__} ({beside})")
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    words = arguments[: arguments.index("--")] if "--" in arguments else arguments
    asked = any(word in _HELP for word in words)
    if asked and (not arguments or arguments[0] in _HELP):
        return _say(overview())
    if arguments == ["eval", "--list"]:
        return _say(studies())
    verb, rest = _verb(arguments, asked)
    if verb in GROUPS:
        return _say(overview(verb))
    if asked:
        return _say(help_of(verb, VERBS[verb]))
    return parse(verb, VERBS[verb], rest)()


def _verb(arguments: list[str], asked: bool) -> tuple[str, list[str]]:
    """The verb that is named, or a group of verbs where help is asked for, and the words behind it.

    Raises:
        ConfigError: no verb, or one that there is not.
    """
    if not arguments:
        raise ConfigError("a verb is missing; wanted one, such as diffattn compare; all of them: diffattn --help")
    first, *rest = arguments
    if first in VERBS:
        return first, rest
    if first in GROUPS:
        second = next(iter(rest), "")
        if first == "eval" and (study := plugged_in(second)) is not None:
            VERBS[f"eval {second}"] = study
        if f"{first} {second}" in VERBS:
            return f"{first} {second}", rest[1:]
        if asked and second.startswith("-"):
            return first, rest
        known = [name.partition(" ")[2] for name in VERBS if name.startswith(f"{first} ")]
        near = nearest(second, known)
        given = f"{shortened(second)!r} given behind it" if second else "nothing stands behind it"
        wanted = f"perhaps you meant {near}" if near else f"wanted one of {', '.join(known)}"
        raise ConfigError(f"diffattn {first}: {given}; {wanted}; see diffattn {first} --help")
    if first.startswith("-"):
        later = next((word for word in rest if word in VERBS or word in GROUPS), None)
        behind = f"write it behind the verb: diffattn {later} {first} ..."
        way = behind if later else "a verb is wanted first, such as diffattn compare"
        raise ConfigError(f"{shortened(first)} given in place of a verb; {way}; see diffattn --help")
    # A study alone is known by the second of its words.
    full = {name: name for name in (*VERBS, *GROUPS)} | {name.partition(" ")[2]: name for name in VERBS if " " in name}
    near = nearest(first, full)
    hint = f"perhaps you meant diffattn {full[near]}; " if near else ""
    raise ConfigError(f"{shortened(first)!r} given; a verb of diffattn is wanted; {hint}see diffattn --help")


def overview(group: str | None = None) -> str:
    """The verbs, or those of one group, with a sentence each."""
    width = min(WIDTH, shutil.get_terminal_size().columns)
    names = [name for name in VERBS if group is None or name.startswith(f"{group} ")]
    column = max(map(len, names)) + 4
    lines = [f"usage: diffattn {f'{group} ' if group else ''}VERB [OPTIONS]", ""]
    lines += [textwrap.fill(GROUPS[group] if group else _ABOUT, width), "", "verbs:"]
    for name in names:
        lines.append(
            textwrap.fill(
                summary(VERBS[name]), width, initial_indent=f"  {name}".ljust(column), subsequent_indent=" " * column
            )
        )
    first = "eval noise" if group == "eval" else "scale run" if group else "compare"
    lines += ["", f"diffattn {first} --help says more of one verb, and so for each."]
    if group == "eval":
        lines += ["diffattn eval --list shows the studies, also those of plug-ins."]
    if group is None:
        lines += ["diffattn --version says which release this is, diffattn doctor what it runs on."]
    return "\n".join(lines)


def _say(text: str) -> int:
    print(text, flush=True)
    return 0


def _fail(line: str, *, status: int) -> int:
    print(f"diffattn: {line}", file=sys.stderr)
    return status
