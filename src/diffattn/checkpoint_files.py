"""Reads and checks the files of a checkpoint folder without reading a weight: ``config.json`` and safetensors.

A safetensors file is 8 bytes for the length of its header, the header (JSON: name, dtype, shape and position of each
tensor), then the tensors one after another. So the header and the size of the file show whether the file is whole. No
pickle is ever opened. Source: the format's description at https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from diffattn.config_fields import Config, check_config, is_whole, shown
from diffattn.errors import CheckpointError, ConfigError
from diffattn.files import is_utf8, parse_json, read_object
from diffattn.folders import no_model

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# It takes the place of the template in tokenizer_config.json.
CHAT_TEMPLATE = "chat_template.jinja"
# Every tokenizer has at least one of these files.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")

# Files without weights, which mean the same whatever the weights are.
_COMPANIONS = (
    *TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
    CHAT_TEMPLATE, "chat_template.json", "generation_config.json",
)  # fmt: skip
_TEMPLATES = "additional_chat_templates"

# Bits of one value, as the format names its types.
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
# For each type of floating-point number: the integer type of its width, and the bits that are all ones in an infinity
# or a NaN (in F8_E4M3 only in a NaN).
_EXPONENTS = {
    "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F800000), "F64": ("<u8", 0x7FF0000000000000),
    "F8_E5M2": ("<u1", 0x7C), "F8_E4M3": ("<u1", 0x7F),
}  # fmt: skip
# Bytes that are read at once: as many as a core's cache holds.
_CHUNK = 1 << 19
# The format's own limit.
_LONGEST_HEADER = 100_000_000
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class HeaderEntry(TypedDict):
    """The facts of one tensor in the header of a safetensors file."""

    dtype: str
    """The type of its numbers, as the format names it, such as ``"BF16"``."""
    shape: list[int]
    data_offsets: list[int]
    """The place of its first byte and of the byte after its last, counted from the end of the header."""


class TensorEntry(HeaderEntry):
    """The facts of one tensor of a checkpoint, with the file that holds it."""

    file: Path


def read_config(folder: str | Path) -> Config:
    """Reads the ``config.json`` of a checkpoint folder.

    Raises:
        CheckpointError: no such folder, no config.json in it, or one that is not a JSON object; or the folder of a run,
            whose model lies in a folder inside it.

    >>> read_config("absent")
    Traceback (most recent call last):
    diffattn.errors.CheckpointError: there is no folder 'absent'; wanted the folder of a checkpoint: check the path
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = f"{str(folder)!r} is a file" if folder.is_file() else f"there is no folder {str(folder)!r}"
        raise CheckpointError(what, "the folder of a checkpoint", "check the path")
    # The folder of a ladder has no config.json.
    config = _read_object(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if "model_type" not in config and (error := no_model(folder, CheckpointError)):
        raise error
    return config or _read_object(folder / CONFIG)


def checked_config(folder: str | Path) -> Config:
    """Reads the ``config.json`` of a checkpoint folder and checks that each of its fields is possible.

    Raises:
        CheckpointError: the same as :func:`read_config`.
        ConfigError: a field with an impossible value, of our model or of another library's.
    """
    values = read_config(folder)
    try:
        check_config(values)
    except ConfigError as error:
        raise error.at(repr(str(Path(folder) / CONFIG))) from None
    return values


def companions(folder: str | Path) -> list[Path]:
    """The files of a checkpoint's tokenizer, chat templates and generation settings, as many as there are."""
    folder = Path(folder)
    files = [folder / name for name in _COMPANIONS]
    return [path for path in (*files, *sorted((folder / _TEMPLATES).glob("*.jinja"))) if path.is_file()]


def copy_companions(files: Iterable[Path], folder: Path) -> None:
    """Copies the files that :func:`companions` found, unchanged, into a folder that exists."""
    for path in files:
        target = folder / _TEMPLATES if path.parent.name == _TEMPLATES else folder
        target.mkdir(exist_ok=True)
        shutil.copyfile(path, target / path.name)


def weights_digest(folder: str | Path) -> str:
    """Returns the SHA-256 of the weights, file by file; raises the errors of :func:`weight_files`."""
    whole = hashlib.sha256()
    for path in weight_files(folder):
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint: ``model.safetensors``, or those that its index names, sorted.

    Raises:
        CheckpointError: no safetensors (weights that are pickles are never opened), an index that cannot be read, one
            that names a file outside the folder, a file of it that is missing, or a path that is no UTF-8.
    """
    folder = Path(folder)
    if not is_utf8(str(folder)):
        raise CheckpointError(
            f"the path {str(folder)!r} is not UTF-8",
            "a folder whose path is UTF-8, since weights cannot be read from another",
            "rename it",
        )
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{str(folder)!r} holds its weights in {pickles[0]}, a pickle, which can run any program and is never "
                "loaded",
                "weights in safetensors",
                "save the model again with save_pretrained of a recent transformers",
            )
        raise CheckpointError(
            f"{str(folder)!r} holds no {WEIGHTS} and no {INDEX}",
            f"the weights beside {CONFIG}",
            "copy or download the whole checkpoint",
        )
    names = sorted(set(_weight_map(folder).values()))
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{str(folder / INDEX)!r} names {missing[0]}, which is not there ({len(missing)} of {len(names)} files are "
            "missing)",
            "the whole checkpoint",
            "copy or download it again",
        )
    return [folder / name for name in names]


def folder_name(folder: str | Path) -> str:
    """The name of a checkpoint: the name of its folder, or that of the run whose folder ``model`` it is.

    >>> folder_name("runs/v1-seed0/model"), folder_name("SmolLM2-135M")
    ('v1-seed0', 'SmolLM2-135M')
    """
    path = Path(folder)
    return path.parent.name if path.name == "model" else path.name


def read_tensors(folder: str | Path) -> dict[str, TensorEntry]:
    """Reads the names and facts of a checkpoint's tensors from the headers of its files, which it checks.

    Returns:
        The facts of each tensor by its name.

    Raises:
        CheckpointError: the same as :func:`weight_files` and :func:`check_safetensors`; or a tensor that the index
            names and its file lacks, or that two files hold.
    """
    folder = Path(folder)
    found: dict[str, TensorEntry] = {}
    files = weight_files(folder)
    for path in files:
        for name, entry in check_safetensors(path).items():
            if name in found:
                raise CheckpointError(
                    f"{str(path)!r} and {found[name]['file'].name} both hold {printable(name)}",
                    "each tensor in one file",
                    "copy or download the checkpoint again",
                )
            found[name] = {**entry, "file": path}
    if files != [folder / WEIGHTS]:
        for name, file in _weight_map(folder).items():
            if name not in found or found[name]["file"].name != file:
                raise CheckpointError(
                    f"{str(folder / INDEX)!r} says that {file} holds {printable(name)}, which it does not",
                    "files of one checkpoint",
                    "copy or download them again",
                )
    return found


def printable(name: str) -> str:
    """Returns a name in a form that can stand in a message; a file can give a tensor any name.

    >>> printable("model.norm.weight"), printable("a\\nb")
    ('model.norm.weight', "'a\\\\nb'")
    """
    return name if name.isprintable() and len(name) <= 100 else shown(name)


def check_finite(entries: Mapping[str, TensorEntry]) -> None:
    """Raises unless every floating-point number of a checkpoint is finite; reads each file once, from begin to end.

    The files are read and not mapped, so this takes half a megabyte of memory whatever their size. The system keeps
    what was read in its cache of files, from which a model is then mapped.

    Args:
        entries: the result of :func:`read_tensors`.

    Raises:
        CheckpointError: a NaN or an infinity; the message names the first tensor in the order of the files.
    """
    import numpy as np

    memory = bytearray(_CHUNK)
    buffer = np.frombuffer(memory, np.uint8)
    for path in sorted({entry["file"] for entry in entries.values()}):
        own = {name: entry for name, entry in entries.items() if entry["file"] == path}
        with path.open("rb") as file:
            start = 8 + struct.unpack("<Q", file.read(8))[0]
            for name, entry in sorted(own.items(), key=lambda item: item[1]["data_offsets"]):
                if entry["dtype"] not in _EXPONENTS:
                    continue
                kind, bits = _EXPONENTS[entry["dtype"]]
                begin, end = entry["data_offsets"]
                file.seek(start + begin)
                while begin < end:
                    count = min(_CHUNK, end - begin)
                    if file.readinto(memoryview(memory)[:count]) != count:
                        raise _damaged(path, "it became shorter while it was read")
                    numbers = buffer[:count].view(kind)
                    numbers &= numbers.dtype.type(bits)
                    if int(numbers.max()) == bits:
                        raise CheckpointError(
                            f"{str(path)!r} holds a NaN or an infinity in {printable(name)}",
                            "finite weights, since such a model answers nothing",
                            "take an earlier checkpoint, or copy it again",
                        )
                    begin += count


def check_safetensors(path: str | Path) -> dict[str, HeaderEntry]:
    """Reads the header of a safetensors file and checks that it describes the file to its last byte.

    Only the header is read, so this takes as long for 100 GB as for 100 kB; it does not look at the weights' values.

    Returns:
        The facts of each tensor by its name, without ``__metadata__``.

    Raises:
        CheckpointError: a file that is cut off or longer than its header says, or a header that is none.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
                raise _damaged(
                    path, f"its header should be {length:,} bytes of {size:,}" if length else "it has no header"
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be read ({error.strerror})", "a readable file", "check the path and its permissions"
        ) from None
    try:
        header = parse_json(raw)
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is no JSON object")
    header.pop("__metadata__", None)
    end = 0
    for begin, stop in sorted(_ranges(path, header)):
        if begin != end:
            raise _damaged(path, f"bytes {min(begin, end):,} to {max(begin, end):,} belong to no tensor, or to two")
        end = stop
    if 8 + length + end != size:
        raise _damaged(path, f"it has {size:,} bytes and its header describes {8 + length + end:,}")
    return header


def _ranges(path: Path, header: dict[str, Any]) -> Iterable[tuple[int, int]]:
    """The first byte of each tensor and the byte after its last, for a header that may hold anything."""
    for name, entry in header.items():
        try:
            begin, end = entry["data_offsets"]
            sound = all(is_whole(number) and number >= 0 for number in (begin, end, *entry["shape"]))
            sound = sound and begin <= end < 1 << 63
            sound = sound and math.prod(entry["shape"]) * _BITS[entry["dtype"]] == 8 * (end - begin)
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            raise _damaged(path, f"its header has impossible facts about {printable(name)}")
        yield begin, end


def _is_beside(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name and name.isprintable() and len(name) < 200


def _weight_map(folder: Path) -> dict[str, str]:
    """The file of each tensor by the tensor's name, as the index of a checkpoint says it."""
    file = folder / INDEX
    weights = _read_object(file).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise CheckpointError(
            f"{str(file)!r} has no weight_map", "the file of each tensor in it", "copy or download it again"
        )
    if foreign := [name for name in weights.values() if not _is_beside(name)]:
        raise CheckpointError(
            f"{str(file)!r} names the file {shown(foreign[0])}", "a file beside it", "copy or download it again"
        )
    return weights


def _read_object(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise CheckpointError(
            f"{str(file.parent)!r} holds no {file.name}", "the folder of a whole checkpoint", "check the path"
        )
    return read_object(file, way_out="copy or download it again")


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{str(path)!r} is damaged: {what}", "the whole file", "copy or download it again")
