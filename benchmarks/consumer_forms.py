"""The models of `benchmarks.consumer` in every form: what each engine loads, written once and then taken as it is."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from diffattn.checkpoint_files import read_config

CONVERTED = ("softmax", "diff_v2", "dex", "diff_gda_v2")
ONNX = {"float32": 32, "int8": 8, "int4": 4}


@dataclass(frozen=True)
class Form:
    """One model in one engine; llama.cpp's formats have 0.5 (Q4_0, Q8_0) or 1 bit more for each weight's block."""

    attention: str
    engine: str
    bits: int
    format: str


def forms(attentions: list[str], bits: int, shipped: bool) -> list[Form]:
    """Forms of equal bits: llama.cpp's first, which the others are compared with."""
    native = {32: ("F32",), 16: ("BF16",), 8: ("Q8_0",), 4: ("Q4_0", "Q4_1")}[bits]
    made = [Form("softmax", "llama.cpp", bits, name) for name in native]
    if shipped and bits == 4:
        made.append(Form("softmax", "llama.cpp", bits, "as shipped"))
    if bits != 16:
        name = next(name for name, width in ONNX.items() if width == bits)
        made += [Form(attention, "onnxruntime", bits, name) for attention in attentions]
    if bits >= 16:
        name = "float32" if bits == 32 else "bfloat16"
        made += [Form(attention, "torch", bits, name) for attention in attentions]
    return made


def find_models(given: list[str], folder: Path) -> dict[str, Path]:
    """The folder of each variant; ``smollm2`` is the pretrained model and what it is converted to."""
    if given != ["smollm2"]:
        models = {read_config(Path(path)).get("attention", ""): Path(path) for path in given}
        if "softmax" not in models or len(models) != len(given):
            sys.exit(
                f"models {given} given; checkpoints of ours, one of each variant and softmax among them, are wanted"
            )
        return models
    from benchmarks.smollm2 import smollm2_folder
    from diffattn.convert.convert import convert

    folder.mkdir(parents=True, exist_ok=True)
    source = smollm2_folder(folder / "llama")
    models = {attention: folder / attention for attention in CONVERTED}
    for attention, place in models.items():
        if not place.exists():
            convert(source, place, attention)
    return models


def prepare(models: dict[str, Path], forms: list[Form], folder: Path) -> dict[Form, Path]:
    """The file or folder of every form; those that are there are taken as they are."""
    return {form: place(form, models, folder) for form in forms}


def place(form: Form, models: dict[str, Path], folder: Path) -> Path:
    """The file or folder of a form, written unless it is there."""
    if form.format == "as shipped":
        from benchmarks.smollm2 import smollm2_gguf

        return smollm2_gguf()
    source = models[form.attention]
    if form.engine == "torch" and form.bits == 32:
        return source
    if form.engine == "onnxruntime":
        return onnx_folder(form, source, folder)
    if form.engine == "torch":
        return written(folder / f"{form.attention}-{form.format}", lambda out: to_bfloat16(source, out))
    from benchmarks.llama_gguf import quantize_gguf, write_gguf

    exact = written(folder / "F32.gguf", lambda out: write_gguf(source, out))
    return exact if form.bits == 32 else written(
        folder / f"{form.format}.gguf", lambda out: quantize_gguf(exact, out, form.format)
    )  # fmt: skip


def written(path: Path, write: Callable[[Path], None]) -> Path:
    """The path, whole: under another name until all is written."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"partial-{path.name}")
        if partial.is_dir():
            shutil.rmtree(partial)
        write(partial)
        partial.rename(path)
    return path


def to_bfloat16(source: Path, out: Path) -> None:
    from diffattn.model.loading import load_model

    load_model(source, "bfloat16", "cpu").save_pretrained(out)


def onnx_folder(form: Form, source: Path, folder: Path) -> Path:
    """The exported model; all numbers of bits are written from one trace, which takes a minute and more."""

    def write(out: Path) -> None:
        from diffattn.export.graph import save, to_graph
        from diffattn.export.quantize import quantize
        from diffattn.model.loading import load_model

        graph = to_graph(load_model(source, "float32", "cpu"))
        for name, bits in ONNX.items():
            (out / name).mkdir(parents=True)
            save(graph if bits == 32 else quantize(graph, bits), out / name)

    return written(folder / f"{form.attention}-onnx", write) / form.format


def llama_options(models: dict[str, Path]) -> list[str]:
    """What llama.cpp is told: its flash attention is 3 times slower where registers do not divide a head's width."""
    return ["--no-flash"] if read_config(models["softmax"])["head_dim"] % 8 else []


def file_bytes(place: Path) -> int:
    files = [place] if place.is_file() else [f for name in ("*.safetensors", "*.onnx*") for f in place.glob(name)]
    return sum(file.stat().st_size for file in files)


def cache_bytes(form: Form, models: dict[str, Path]) -> int:
    """Bytes of the keys and values of one token: llama.cpp keeps them in float16 unless it is told otherwise."""
    config = read_config(models[form.attention])
    width = {"llama.cpp": 2, "torch": form.bits // 8, "onnxruntime": 4}[form.engine]
    return 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * width


def held_out(text: str, source: Path, tokens: int) -> npt.NDArray[np.int64]:
    """The first tokens of the documents that training holds out."""
    from diffattn.data.text import read_corpus, split_by_document
    from diffattn.model.loading import load_tokenizer

    tokenizer, ids = load_tokenizer(source), []
    for document in split_by_document(read_corpus(text)).validation:
        for start in range(0, len(document.text), 1 << 16):
            ids += tokenizer(document.text[start : start + (1 << 16)], add_special_tokens=False)["input_ids"]
            if len(ids) >= tokens:
                return np.array(ids[:tokens], np.int64)
    sys.exit(f"{text!r} given, which holds {len(ids)} tokens out; at least {tokens} are wanted: choose a longer text")
