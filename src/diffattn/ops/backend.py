"""The record of a backend of ``diff_attention``, which says whether it serves a call and computes it.

A package may bring one of its own: an entry point of the group ``diffattn.backends`` names a ``Backend``, which is then
asked for by its name. It is imported when it is asked for and never chosen by ``"auto"``.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from diffattn.errors import UnsupportedError
from diffattn.ops.reference import Call

GROUP = "diffattn.backends"


class Backend(NamedTuple):
    """A way to compute differential attention.

    >>> from diffattn.ops.standard import standard_diff_attention
    >>> mine = Backend("mine", "any device", lambda call: None, standard_diff_attention)
    >>> mine.name, mine.hardware
    ('mine', 'any device')
    """

    name: str
    """The name by which it is asked for; its sentences begin with it."""
    hardware: str
    """The devices that it runs on, in a few words, for ``diffattn doctor``."""
    supports: Callable[[Call], str | None]
    """Returns None where it serves the call, else one sentence that says why it does not."""
    run: Callable[[Call], Tensor]
    """Returns the output (B, T, H, Dv) in the dtype of the values, for a call that it serves."""
    run_by_name: Callable[[Call], Tensor] | None = None
    """A function that takes the place of ``run`` where the backend was asked for by name, if it then refuses
    derivatives that "auto" has all the same."""
    passed_over: Callable[[Call], str | None] = lambda call: None
    """Returns None where "auto" may take it for a call that it serves, else one sentence that says why another backend
    is the better one."""
    packs: bool = False
    """True for a backend that reads ``queries`` of a call, which is how packed sequences and windows reach it."""
    shares_noise: bool = False
    """True for a backend that takes q2 with fewer heads than q1, each of which is subtracted by several heads."""

    def refuses(self, call: Call) -> str | None:
        """Returns None where it serves the call, else one sentence that begins with its name and says why not."""
        if call.queries is not None and not self.packs:
            return f"{self.name}: packed sequences (cu_seqlens) and windows are not supported"
        if call.q2.shape[2] != call.q1.shape[2] and not self.shares_noise:
            return f"{self.name}: fewer heads in q2 than in q1 are not supported"
        return self.supports(call)


def refusal(sentence: str) -> UnsupportedError:
    """Returns the error of a backend that was asked for by name and does not serve the call, from its sentence."""
    return UnsupportedError(sentence, "a backend that serves this call", 'pass backend="auto", which finds one')


def installed() -> dict[str, importlib.metadata.EntryPoint]:
    """Returns the backends that other packages bring, by name, before any of them is imported."""
    return {found.name: found for found in importlib.metadata.entry_points(group=GROUP)}


def load(found: importlib.metadata.EntryPoint) -> Backend:
    """Imports a backend that another package brings.

    Raises:
        UnsupportedError: it cannot be imported, or is no backend of this name; one line that names the package.
    """
    said = f"backend {found.name!r} of {package_of(found)}"
    way_out = "install a version of that package that works with this one, or uninstall it"
    try:
        backend = found.load()
    # The code of others may raise anything when it is imported.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UnsupportedError(f"{said} cannot be imported ({reason})", "a package that loads", way_out) from error
    if not isinstance(backend, Backend) or backend.name != found.name:
        raise UnsupportedError(
            f"{said} is {found.value}, of type {type(backend).__name__}",
            f"a diffattn.ops.backend.Backend named {found.name!r}",
            way_out,
        )
    return backend


def package_of(found: importlib.metadata.EntryPoint) -> str:
    """Returns the name and version of the package that brings a backend."""
    return "an unknown package" if found.dist is None else f"{found.dist.name} {found.dist.version}"
