"""Where Triton is not installed, everything else works, and its kernels say what is missing."""

import os
import subprocess
import sys

# None in sys.modules is how Python is told that there is no such module.
SCRIPT = """
import sys
sys.modules["triton"] = None
import torch, diffattn
from diffattn.errors import DiffattnError
q, k, v = torch.randn(1, 5, 4, 16), torch.randn(1, 7, 4, 16), torch.randn(1, 7, 2, 32)
call = [x.bfloat16() for x in (q[:, :, :2], k[:, :, :2], q[:, :, 2:], k[:, :, 2:], v)]
print(*diffattn.diff_attention(*call, 0.5).shape)
try:
    diffattn.diff_attention(*call, 0.5, backend="fused_triton")
except DiffattnError as error:
    print(error)
"""


def test_the_package_computes_and_the_kernels_refuse() -> None:
    # The kernels serve the CPU, as far as they know: without the interpreter's switch that would be the reason.
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    shape, refusal = done.stdout.splitlines()
    assert shape == "1 5 2 32"
    assert refusal.startswith("fused_triton: Triton is not installed; ")
