"""What is no test here: what runs in a process of its own, and the mutations of the kernels."""

from __future__ import annotations

import os

collect_ignore = ["interpreted.py", "mutants.py"]
# By its name in a process of the interpreter, pytest collects it.
if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore.append("interpreted_operator.py")
