"""What is no test here: what runs in a process of its own, and the mutations of the kernels."""

from __future__ import annotations

import os

collect_ignore = ["interpreted.py", "mutants.py"]
# By their names in a process of the interpreter, pytest collects them.
if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore += ["interpreted_operator.py", "interpreted_shared.py"]
