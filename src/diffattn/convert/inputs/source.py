"""Opens what is converted: a folder of safetensors, one with an adapter of PEFT for another, or a GGUF file."""

from __future__ import annotations

from pathlib import Path

from diffattn.convert.folder import Checkpoint, read_folder
from diffattn.convert.inputs.adapters import ADAPTER, read_adapter
from diffattn.convert.inputs.gguf import gguf_file, read_gguf


def read_source(source: str | Path, scratch: Path) -> Checkpoint:
    """Reads the model in a folder or a file; see the three functions for what is refused.

    Args:
        source: a folder that :func:`diffattn.convert.folder.read_folder` takes; a folder with ``adapter_config.json``;
            or a ``.gguf`` file, or a folder with one and without safetensors.
        scratch: an empty folder, for files that are made from the source and copied beside the result.
    """
    path = Path(source)
    if (path / ADAPTER).is_file():
        return read_adapter(path)
    file = gguf_file(path)
    return read_folder(path) if file is None else read_gguf(file, scratch)
