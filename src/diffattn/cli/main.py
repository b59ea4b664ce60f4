"""The command line: a table of verbs, each a thin front of a public Python function that is loaded when it is asked."""

from __future__ import annotations

import errno
import importlib
import io
import os
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version

from diffattn import __version__
from diffattn.cli.arguments import nearest, parse, remember, shortened
from diffattn.cli.options import WIDTH, help_of, summary
from diffattn.errors import ConfigError, DiffattnError, TrainingError
from diffattn.probes.registry import OURS, plug_ins
from diffattn.rank import rank_here

_STUDY = "diffattn.cli.evaluate:verb_of"
# By verb: the module and the function that is called with the verb's options, and returns the exit status. A study's
# function is made from its record.
VERBS = {
    "compare": "diffattn.cli.compare:compare",
    "train": "diffattn.cli.train:train",
    "plan": "diffattn.cli.plan:plan",
    "scale run": "diffattn.cli.scale:scale_run",
    "scale fit": "diffattn.cli.scale:scale_fit",
    "generate": "diffattn.cli.generate:generate",
    "serve": "diffattn.cli.serve:serve",
    "convert": "diffattn.cli.convert:convert",
    "export": "diffattn.cli.convert:export",
    **{f"eval {study}": _STUDY for study in OURS},
    "eval ablation": "diffattn.cli.scale:ablation",
    "lens": "diffattn.cli.lens:lens",
    "demo": "diffattn.cli.lens:demo",
    "doctor": "diffattn.cli.doctor:doctor",
}
GROUPS = {
    "scale": "Train models of growing size, and fit scaling laws to their losses.",
    "eval": "Measure what the papers say of differential attention, on any model.",
}
_ABOUT = "Differential Transformers, each next to the softmax Transformer that it replaces."
_HELP = ("-h", "--help")
_VERSION = ("-V", "--version")
# What several ranks can do together; each would do the whole of any other verb.
_OF_RANKS = ("compare", "train", "plan")
_UNUSABLE = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR)


def load(verb: str) -> Callable[..., int]:
    """Returns the function of a verb; no other verb's module is imported."""
    # The study of a plug-in stands in no table.
    where = VERBS.get(verb, _STUDY)
    module, _, function = where.partition(":")
    found = getattr(importlib.import_module(module), function)
    verb_function: Callable[..., int] = found(verb.partition(" ")[2]) if where == _STUDY else found
    return verb_function


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs ``diffattn``; the exit status is 0, 2 for a user's mistake, 1 for a run that failed, 130 for Ctrl-C."""
    # Waiting threads that spin lose nearly all speed where other work shares the cores; read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        # Names of files may hold bytes that are no text, and a terminal may lack characters.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return _run(sys.argv[1:] if arguments is None else list(arguments))
    except TrainingError as error:
        return _fail(error, status=1)
    except DiffattnError as error:
        return _fail(error, status=2)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read has read enough; Python would complain once more as it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        # A path that was given is used in many places, and each of them may meet one that cannot be used.
        if error.errno not in _UNUSABLE or not isinstance(error.filename, str | bytes):
            if not _are_several():
                raise
            return _end(traceback.print_exc, status=1)
        given = f"{shortened(os.fsdecode(error.filename))!r} ({os.strerror(error.errno)})"
        return _fail(ConfigError(given, "a path that can be used", "check the path and its rights"), status=2)
    except Exception:
        if not _are_several():
            raise
        return _end(traceback.print_exc, status=1)


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
        from diffattn.cli.evaluate import list_studies

        return list_studies()
    verb, rest = _verb(arguments, asked)
    if verb in GROUPS:
        return _say(overview(verb))
    if asked:
        return _say(help_of(verb, load(verb)))
    if rank_here().world > 1 and verb not in _OF_RANKS:
        raise ConfigError(f"diffattn {verb} on {rank_here().world} ranks", "a verb that ranks do together: "
                          f"{', '.join(_OF_RANKS)}", "start it without torchrun, in one process")  # fmt: skip
    return parse(verb, load(verb), rest)()


def _verb(arguments: list[str], asked: bool) -> tuple[str, list[str]]:
    """Returns the verb that is named, or a group of verbs where help is asked for, and the words behind it.

    Raises:
        ConfigError: no verb, or one that there is not.
    """
    if not arguments:
        raise ConfigError("no verb", "one, such as diffattn compare", "all of them: diffattn --help")
    first, *rest = arguments
    if first in VERBS:
        return first, rest
    if first in GROUPS:
        second = next(iter(rest), "")
        if f"{first} {second}" in VERBS or (first == "eval" and second in plug_ins()):
            return f"{first} {second}", rest[1:]
        if asked and second.startswith("-"):
            return first, rest
        known = [name.partition(" ")[2] for name in VERBS if name.startswith(f"{first} ")]
        given = f"diffattn {first} {shortened(repr(second))}" if second else f"diffattn {first} alone"
        raise ConfigError(given, f"one of {', '.join(known)} behind {first}",
                          f"{_meant(nearest(second, known))}see diffattn {first} --help")  # fmt: skip
    if first.startswith("-"):
        later = next((word for word in rest if word in VERBS or word in GROUPS), None)
        write = f"write diffattn {later} {first} ..." if later else "all verbs: diffattn --help"
        raise ConfigError(f"{shortened(first)} before the verb", "the verb first, such as diffattn compare", write)
    # A study alone is known by the second of its words.
    full = {name: name for name in (*VERBS, *GROUPS)} | {name.partition(" ")[2]: name for name in VERBS if " " in name}
    near = nearest(first, full)
    way_out = f"{_meant(near and f'diffattn {full[near]}')}see diffattn --help"
    raise ConfigError(shortened(repr(first)), "a verb of diffattn", way_out)


def _meant(near: str | None) -> str:
    return f"perhaps you meant {near}; " if near else ""


def overview(group: str | None = None) -> str:
    """Returns the verbs, or those of one group, with a sentence each."""
    width = min(WIDTH, shutil.get_terminal_size().columns)
    names = [name for name in VERBS if group is None or name.startswith(f"{group} ")]
    column = max(map(len, names)) + 4
    lines = [f"usage: diffattn {f'{group} ' if group else ''}VERB [OPTIONS]", ""]
    lines += [textwrap.fill(GROUPS[group] if group else _ABOUT, width), "", "verbs:"]
    for name in names:
        first, later = f"  {name}".ljust(column), " " * column
        lines.append(textwrap.fill(summary(load(name)), width, initial_indent=first, subsequent_indent=later))
    example = "eval noise" if group == "eval" else "scale run" if group else "compare"
    lines += ["", f"Each verb has a help of its own, such as: diffattn {example} --help"]
    if group == "eval":
        lines += ["All studies, also those of plug-ins: diffattn eval --list"]
    if group is None:
        lines += ["The release: diffattn --version", "The machine, and what diffattn uses of it: diffattn doctor"]
    return "\n".join(lines)


def _say(text: str) -> int:
    print(text, flush=True)
    return 0


def _fail(error: DiffattnError, *, status: int) -> int:
    return _end(lambda: print(f"diffattn: {error}", file=sys.stderr, flush=True), status=status)


def _end(say: Callable[[], None], *, status: int) -> int:
    """Says why the command ends, once on all ranks; returns the status with which this one ends."""
    if not _are_several():
        say()
        return status
    from diffattn.train.spread.ranks import tell

    return tell(status, say)


def _are_several() -> bool:
    """Returns whether this is one of several ranks, as far as the environment makes sense."""
    try:
        return rank_here().world > 1
    except ConfigError:
        return False
