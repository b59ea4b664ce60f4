"""Where Triton is not installed, everything else works."""

import subprocess
import sys

# None in sys.modules is how Python is told that there is no such module.
SCRIPT = """
import sys
sys.modules["triton"] = None
import torch, diffattn
q, k, v = torch.randn(1, 5, 4, 16), torch.randn(1, 7, 4, 16), torch.randn(1, 7, 2, 32)
print(*diffattn.diff_attention(q[:, :, :2], k[:, :, :2], q[:, :, 2:], k[:, :, 2:], v, 0.5).shape)
"""


def test_the_package_imports_and_computes() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "5", "2", "32"]
