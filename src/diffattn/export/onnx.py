"""Export a checkpoint folder of ours to ONNX: the graph, its configuration and its tokenizer, whole or not at all."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from diffattn.checkpoint_files import companions, copy_companions, read_config
from diffattn.errors import ConfigError, UnsupportedError
from diffattn.export.attention import GROUPED
from diffattn.export.check import CheckReport, Expected, OnnxCheckError, check_float32, check_quantized
from diffattn.export.genai import genai_config
from diffattn.export.graph import OPSET, save, shares_buffers, to_graph, weight_bytes
from diffattn.export.maps import layers_of
from diffattn.export.options import BITS, ExportOptions
from diffattn.export.quantize import check_block_size, quantize
from diffattn.export.run import DATA_FILE, MODEL_FILE, require
from diffattn.files import whole_folder, write_json
from diffattn.folders import own_folder
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.loading import load_model, load_tokenizer
from diffattn.progress import OnStage, Stage, unseen


@dataclass(frozen=True)
class OnnxExport:
    """The result of an export: what was written, and how well it was checked."""

    folder: Path
    """The folder that holds the files."""
    attention: str
    """The variant, such as ``"diff_v1"``."""
    cache: bool
    """True where the graph takes and returns keys and values."""
    bits: int
    """Bits of a weight in the layers' matrices; 32 for float32."""
    block_size: int | None
    """Weights that share one scale; None for float32."""
    maps: tuple[int, ...]
    """Layers whose queries and λ are outputs."""
    opset: int
    """The version of ONNX's operators."""
    weight_bytes: int
    """Bytes of the initializers."""
    file_bytes: int
    """Bytes of the model's files on the disk."""
    seconds: float
    """Seconds that the export took, with its check."""
    check: CheckReport | None
    """The comparison with the torch model, where one was asked for."""


def export_onnx(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    cache: bool = ExportOptions.cache,
    bits: int | None = ExportOptions.bits,
    block_size: int = ExportOptions.block_size,
    repeat_heads: bool = ExportOptions.repeat_heads,
    maps: str | None = ExportOptions.maps,
    check: bool = ExportOptions.check,
    on_stage: OnStage = unseen,
) -> OnnxExport:
    """Writes ``model.onnx``, its configuration and its tokenizer into a folder, whole or not at all.

    Args:
        folder: a checkpoint of ours; half-precision weights are exported as float32.
        out, block_size, repeat_heads, maps: see :class:`diffattn.export.options.ExportOptions`.
        cache: take and return keys and values, for decoding token by token.
        bits: 8 or 4 to quantise the weights (see ``diffattn.export.quantize``); ``None`` for float32.
        check: compare the written model with the torch model (see ``diffattn.export.check``); one that differs by
            more than rounding does not stay.
        on_stage: called with what is being done and how much of it is.

    Raises:
        CheckpointError: a folder that holds no whole checkpoint.
        UnsupportedError: a model that is not ours, rotary positions whose frequencies depend on the length, maps
            that cannot be subtracted, or a missing package of the extra ``onnx``.
        ConfigError: other bits or block size, layers that are not there, or a folder ``out`` that holds something.
        OnnxCheckError: with ``check``, a difference beyond rounding.
    """
    began = time.perf_counter()
    source = Path(folder)
    if bits is not None and bits not in BITS:
        raise ConfigError(
            f"bits is {bits}", f"one of {', '.join(map(str, BITS))}", "choose one of them, or leave it out for float32"
        )
    check_block_size(block_size)
    _check_source(source)
    target = Path(out) if out is not None else source / ("onnx" if bits is None else f"onnx-int{bits}")
    own_folder(target)
    require("onnx", "onnxscript", *(("onnxruntime",) if check or bits else ()))

    on_stage(Stage("loading the weights as float32"))
    model = load_model(source, "float32", "cpu", attn_implementation=GROUPED)
    layers = layers_of(maps, model.config.num_hidden_layers)
    on_stage(Stage("tracing the graph"))
    graph = to_graph(model, cache=cache, repeat_heads=repeat_heads, maps=layers)
    with whole_folder(target) as partial:
        if check or bits is None:
            on_stage(Stage("writing the graph"))
            save(graph, partial)
        report = None
        if check:
            # The graph is compared before it is quantised, too: quantising is no reason for it to be wrong.
            on_stage(Stage("comparing with the torch model"))
            tokenizer = load_tokenizer(source) if (source / "tokenizer.json").is_file() else None
            expected = Expected.of(model, tokenizer)
            report = _passed(check_float32(model, partial, expected))
        if bits is not None:
            on_stage(Stage(f"quantising to {bits} bits"))
            graph = quantize(graph, bits, block_size=block_size)
            on_stage(Stage("writing the quantised graph"))
            save(graph, partial)
            if report is not None:
                on_stage(Stage("comparing the quantised graph with the torch model"))
                report = _passed(check_quantized(model, partial, bits, report, expected, block_size=block_size))
        _save_companions(model.config, source, partial, cache)
        if cache:
            write_json(partial / "genai_config.json", genai_config(model, shared=shares_buffers(graph)))
        sizes = [(partial / name).stat().st_size for name in (MODEL_FILE, DATA_FILE) if (partial / name).exists()]
    return OnnxExport(
        target, model.config.attention, cache, bits or 32, block_size if bits else None, layers, OPSET,
        weight_bytes(graph), sum(sizes), time.perf_counter() - began, report,
    )  # fmt: skip


def _passed(report: CheckReport) -> CheckReport:
    if not report.passed:
        raise OnnxCheckError(
            f"the exported graph computes something else ({', '.join(report.lines())})",
            "a graph that differs from the model by rounding alone",
            "the graph was not kept; please report the model's config.json",
        )
    return report


def _check_source(source: Path) -> None:
    config = read_config(source)
    if config.get("model_type") != DiffTransformerConfig.model_type:
        raise UnsupportedError(
            f"model_type is {config.get('model_type')!r} in {str(source / 'config.json')!r}",
            DiffTransformerConfig.model_type,
            "convert a checkpoint of Llama or diffllama with diffattn convert; optimum exports others as they are",
        )


def _save_companions(config: DiffTransformerConfig, source: Path, folder: Path, cache: bool) -> None:
    if hasattr(config, "auto_map"):
        # Names Python files of the checkpoint, which do not come along.
        del config.auto_map
    config.use_cache = cache
    config.save_pretrained(folder)
    copy_companions(companions(source), folder)
