"""Repairs of Triton's interpreter, which runs kernels on the CPU, for dry runs and tests. No kernel needs them."""

from __future__ import annotations

import builtins
import contextlib
from collections.abc import Iterator
from typing import Any


def mend_interpreter() -> None:
    """Products of bfloat16 (Triton's issue 11584), loops under NumPy 2.4, which refuses int() of arrays of one, and
    results that are copied onto themselves, all memory of a view, where the tensors are a CPU's already."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    def widen(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        # The interpreter holds bfloat16 as the upper halves of float32, and multiplies them as integers.
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    dot, patch = interpreter.InterpreterBuilder.create_dot, interpreter._patch_lang_tensor

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widen(a), widen(b), *rest)

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter._patch_lang_tensor = patch_lang_tensor
    interpreter.GridExecutor._restore_args_dev = lambda self, *arguments: None


@contextlib.contextmanager
def last_programs(number: int) -> Iterator[None]:
    """Runs of each launch the last programs alone, where it has more than 65,535."""
    from triton.runtime import interpreter

    def programs(*bounds: int) -> builtins.range:
        every = builtins.range(*bounds)
        return every[-number:] if len(every) > 65_535 else every

    interpreter.range = programs
    try:
        yield
    finally:
        del interpreter.range
