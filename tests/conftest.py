"""Loaded before any test or doctest runs."""

import signal

# It hashes all that `builtins` holds, to which a doctest adds its last result, when it is first imported.
import tyro  # noqa: F401

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would every process that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
