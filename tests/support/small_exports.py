"""Small models as ONNX files, each traced once for all tests of a run, whichever process they are in."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import onnx_ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from support.small_folders import TOKENS, small_tokenizer
from support.small_models import SHAPE, small_model, tokens

from diffattn.export.graph import save, to_graph
from diffattn.export.run import MAPS, OnnxDecoder
from diffattn.model.loading import load_model
from diffattn.model.modeling import DiffTransformerForCausalLM
from diffattn.plan.shape import ModelShape

ATTENTIONS = ("softmax", "diff_v1", "diff_v2", "dex")
# onnxruntime's kernel that shares the buffers of a cache wants widths that 8 divides.
EXPORTED = dataclasses.replace(SHAPE, head_dim=8)


def model_of(
    attention: str, num_layers: int = 2, *, shape: ModelShape = EXPORTED, **config
) -> DiffTransformerForCausalLM:
    """With a DEX that subtracts something, of heads that are not all."""
    if attention == "dex":
        config.setdefault("dex_heads", [[0, 3, 11], [5]][:num_layers])
    model = small_model(attention, shape=dataclasses.replace(shape, num_layers=num_layers), **config)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("dex.weight"):
            torch.nn.init.normal_(tensor, std=0.3)
        elif name.endswith("dex.annealed"):
            tensor.fill_(0.7)
    return model


def small_checkpoint(path: Path) -> Path:
    """The folder of a V1 model of one layer in bfloat16, with a tokenizer."""
    shape = dataclasses.replace(EXPORTED, num_layers=1, vocab_size=TOKENS)
    small_model("diff_v1", shape=shape).bfloat16().save_pretrained(path)
    small_tokenizer().save_pretrained(path)
    return path


class Traces:
    """Graphs that were traced, which takes seconds for each, as files of a folder that the processes of a run share."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._read: dict[str, Any] = {}

    def share(self, folder: Path) -> None:
        """Has other processes find the graphs of this one."""
        self._folder = folder

    def get(self, name: str, trace: Callable[[], Any]) -> Any:
        """Returns the graph of that name, which is not to be changed (see :func:`copy`)."""
        if name not in self._read:
            assert self._folder is not None, "only tests in tests/export may trace"
            file = self._folder / f"{name}.onnx"
            with filelock.FileLock(file.with_suffix(".lock")):
                if not file.exists():
                    onnx_ir.save(trace(), file)
            self._read[name] = onnx_ir.load(file)
        return self._read[name]


TRACES = Traces()


def traced(attention: str, cache: bool) -> Any:
    """The graph of ``model_of(attention, layers(cache))``."""
    name = f"{attention}-{'cache' if cache else 'whole'}"
    if not cache:
        return TRACES.get(name, lambda: to_graph(model_of(attention, layers(cache)), cache=cache))
    return TRACES.get(name, lambda: without_maps(traced_with_maps(attention)))


def traced_with_maps(attention: str) -> Any:
    """The graph with a cache whose last layer's queries and λ are outputs too."""
    return TRACES.get(f"{attention}-maps", lambda: to_graph(model_of(attention), maps=[layers(True) - 1]))


def without_maps(graph: Any) -> Any:
    """A copy of a graph without outputs for maps and what only they need, which spares another trace."""
    plain = copy(graph)
    kept = [value for value in plain.graph.outputs if not value.name.startswith(f"{MAPS}.")]
    plain.graph.outputs[:] = kept
    RemoveUnusedNodesPass()(plain)
    return plain


def traced_checkpoint(folder: Path) -> Any:
    """The graph of :func:`small_checkpoint`, without a cache."""
    return TRACES.get("checkpoint", lambda: to_graph(load_model(folder, "float32", "cpu"), cache=False))


def every_option() -> DiffTransformerForCausalLM:
    """A V1 model of one layer that has what a configuration can ask for: biases, norms, rotary positions, a window."""
    options: dict[str, Any] = {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True, "qk_norm": True}
    options["sliding_window"] = 3
    rope = {"rope_type": "linear", "factor": 3.0, "rope_theta": 1000.0}
    model = model_of("diff_v1", 1, tie_word_embeddings=False, rope_parameters=rope, **options)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def traced_every_option() -> Any:
    """The graph of :func:`every_option`, with a cache and a head of its own."""
    return TRACES.get("every-option", lambda: to_graph(every_option()))


def layers(cache: bool) -> int:
    """Tracing takes seconds for each layer, and only the cache tells two from one."""
    return 2 if cache else 1


def copy(graph: Any) -> Any:
    return onnx_ir.from_proto(onnx_ir.to_proto(graph))


def decoder(graph: Any, folder: Path) -> OnnxDecoder:
    save(graph, folder)
    return OnnxDecoder(folder, threads=1)


def padded(batch, length, padding):
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        mask[row, : padding * row // max(1, batch - 1)] = 0
    return tokens(batch, length), mask


@torch.no_grad()
def whole(model, ids, mask):
    """By the model's own attention, the fused kernel where there is one."""
    return model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
