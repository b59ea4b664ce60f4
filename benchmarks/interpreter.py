"""Two repairs of Triton's interpreter, which runs kernels on the CPU, for dry runs and tests. No kernel needs them."""

from __future__ import annotations

from typing import Any


def mend_interpreter() -> None:
    """Products of bfloat16 (Triton's issue 11584), and loops under NumPy 2.4, which refuses int() of arrays of one."""
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
