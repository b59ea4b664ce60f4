"""Small models as ONNX files, each traced once for the tests of a file."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from support.small_folders import TOKENS, small_tokenizer
from support.small_models import SHAPE, small_model

from diffattn.export.graph import save, to_graph
from diffattn.export.run import OnnxDecoder
from diffattn.model.modeling import DiffTransformerForCausalLM

ATTENTIONS = ("softmax", "diff_v1", "diff_v2", "dex")


def model_of(attention: str, num_layers: int = 2, **config) -> DiffTransformerForCausalLM:
    """With a DEX that subtracts something, of heads that are not all."""
    if attention == "dex":
        config.setdefault("dex_heads", [[0, 3, 11], [5]][:num_layers])
    model = small_model(attention, shape=dataclasses.replace(SHAPE, num_layers=num_layers), **config)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("dex.weight"):
            torch.nn.init.normal_(tensor, std=0.3)
        elif name.endswith("dex.annealed"):
            tensor.fill_(0.7)
    return model


def small_checkpoint(path: Path) -> Path:
    """The folder of a V1 model of one layer in bfloat16, with a tokenizer."""
    shape = dataclasses.replace(SHAPE, num_layers=1, vocab_size=TOKENS)
    small_model("diff_v1", shape=shape).bfloat16().save_pretrained(path)
    small_tokenizer().save_pretrained(path)
    return path


@functools.cache
def traced(attention: str, cache: bool) -> Any:
    """The graph of ``model_of(attention, layers(cache))``; not to be changed, see :func:`copy`."""
    return to_graph(model_of(attention, layers(cache)), cache=cache)


def layers(cache: bool) -> int:
    """Tracing takes seconds for each layer, and only the cache tells two from one."""
    return 2 if cache else 1


def copy(graph: Any) -> Any:
    return onnx_ir.from_proto(onnx_ir.to_proto(graph))


def decoder(graph: Any, folder: Path) -> OnnxDecoder:
    save(graph, folder)
    return OnnxDecoder(folder, threads=1)
