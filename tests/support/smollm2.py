"""The pretrained model of the tests that are marked ``smollm2``: 135M parameters, nine heads in three groups."""

import warnings
from pathlib import Path

import pytest

from benchmarks.smollm2 import smollm2_folder


def smollm2(folder: Path) -> Path:
    """A folder with ``LlamaForCausalLM`` in float32 and its tokenizer; skips the test, with the reason, without it."""
    with warnings.catch_warnings():
        # gguf and numpy, in reading the file.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=UserWarning)
        try:
            return smollm2_folder(folder)
        except LookupError as error:
            pytest.skip(str(error))
