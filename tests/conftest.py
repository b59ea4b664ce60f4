"""Loaded before any test or doctest runs."""

import os
import signal
import tempfile

# It hashes all that `builtins` holds, to which a doctest adds its last result, when it is first imported.
import tyro  # noqa: F401

# What inductor compiled for an earlier version of an operator, whose results lay otherwise in memory, is of no use.
_compiled = tempfile.TemporaryDirectory(prefix="diffattn-inductor-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _compiled.name

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would every process that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
