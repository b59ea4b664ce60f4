"""One of our models as an ONNX graph, with or without a key/value cache, for batches and lengths of any size.

The graph holds what the model does under the standard call, one attention node per layer (``attention.py``), grouped
as the call is, so that no key is repeated and no operator of our own is needed:

    in     input_ids (B, T), attention_mask (B, P + T), position_ids (B, T), all int64,
           past_key_values.N.key and .value (B, G, P, W) of each layer N, float32; P may be 0,
           num_logits_to_keep (), int64, which need not be given: 1; 0 for all
    out    logits (B, kept, V), present.N.key and .value (B, G, P + T, W), float32

           and of layers whose maps are asked for maps.N.query (B, n, T, d) and maps.N.lambda (B, T or 1, H), float32

These are the names that optimum and transformers.js use. Where past and present share their
buffers (``SHARED_KEY`` of the file's properties is ``yes``), both may be longer than P + T. Without a cache there is no
past, no present and no number of logits: all are returned. The mask is computed from its inputs: no length is written
down. λ of V1, its norm's scale and DEX's λ·W_D are constants by then.

Shape suffixes as in ``diffattn.model.attention``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from diffattn.errors import UnsupportedError
from diffattn.export.attention import GROUPED, REPEATED, SHARED, SharedCache, added, can_share
from diffattn.export.maps import check_maps, map_names, read_maps
from diffattn.export.run import DATA_FILE, HEAD, KEEP, MODEL_FILE, PAST, PRESENT, SHARED_KEY, require
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.masks.layers import layer_masks
from diffattn.model.modeling import DiffTransformerForCausalLM
from diffattn.model.transformers_private import attention_implementation

# The first with Attention and RMSNormalization.
OPSET = 23
BATCH, NEW, EARLIER = "batch_size", "sequence_length", "past_sequence_length"
# Weights beside the graph are read from the file where they lie, which onnxruntime cannot do with those in the graph:
# it holds the whole file in memory, and then a copy of each. Below this size one file is handier.
LARGEST_FILE = 32_000_000


class FlatDecoder(nn.Module):
    """Our model with the cache as a flat list of tensors, which a graph can have as inputs and outputs."""

    def __init__(self, model: DiffTransformerForCausalLM, *, cache: bool, shared: bool, maps: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.cache = cache
        self.shared = shared
        self.maps = maps

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor) -> Any:
        """Returns logits, then key 0, value 0, key 1, ... of all tokens, then what the maps are made of.

        Without a cache it returns logits alone.
        """
        pairs = list(zip(past[0::2], past[1::2], strict=True))
        cache: Any = DynamicCache(pairs) if self.cache and not self.shared else None
        options: dict[str, Any] = {}
        if self.shared:
            cache = options["buffers"] = SharedCache(pairs, attention_mask, input_ids.shape[1])
        # A row is one sequence. From positions the model would look for several, by operators that ONNX lacks.
        x = self.model.model.embed_tokens(input_ids)
        masks = layer_masks(self.model.config, x, attention_mask, None, cache, {})
        if self.shared:
            masks = {kind: added(mask) for kind, mask in masks.items()}
        given = {"inputs_embeds": x, "attention_mask": masks, "position_ids": position_ids}
        if cache is None:
            return self.model(**given, use_cache=False).logits
        with read_maps(self.model, self.maps) as read:
            logits = self.model(**given, past_key_values=cache, use_cache=True, **options).logits
        if self.shared:
            present = [cache.present[layer] for layer in range(len(pairs))]
        else:
            present = [(layer.keys, layer.values) for layer in cache.layers]
        return logits, *(tensor for pair in present for tensor in pair), *read


def to_graph(
    model: DiffTransformerForCausalLM, *, cache: bool = True, repeat_heads: bool = False, maps: Sequence[int] = ()
) -> Any:
    """Returns the model as an ``onnx_ir.Model`` of opset 23 in float32; the module's docstring has names and shapes.

    Args:
        model: any variant.
        cache: take and return keys and values.
        repeat_heads: write each key/value head once for every query head of its group.
        maps: layers whose queries and λ are returned too (see ``diffattn.export.maps``).

    Raises:
        ConfigError: maps of a layer that is not there, or without a cache.
        UnsupportedError: the rotary frequencies depend on the length, the maps of a head cannot be subtracted, or a
            package of the extra is missing.
    """
    require("onnx", "onnxscript")
    from onnxscript.optimizer import optimize_ir

    config = model.config
    kind = config.rope_parameters["rope_type"]
    if "dynamic" in kind or kind == "longrope":
        raise UnsupportedError(
            f"rope_type is {kind!r}, whose frequencies depend on the length",
            "fixed frequencies, which a graph can hold",
            "train the model with rope_type default, linear, llama3 or yarn",
        )
    check_maps(config, maps, cache=cache)
    # No two sizes are equal, and none is 0 or 1: what the tracer takes for equal or fixed is so.
    B, T, P = 2, 3, 5
    past_names = [f"{PAST}.{i}.{kind}" for i in range(config.num_hidden_layers) for kind in ("key", "value")]
    if not cache:
        past_names, P = [], 0
    shared = cache and not repeat_heads and can_share(config)
    past = tuple(torch.zeros(B, config.num_key_value_heads, P, config.head_dim) for _ in past_names)
    ids, mask, positions = (torch.ones(B, size, dtype=torch.long) for size in (T, P + T, T))
    batch, new, earlier = (torch.export.Dim(name) for name in (BATCH, NEW, EARLIER))
    shapes = ({0: batch, 1: new}, {0: batch, 1: torch.export.Dim.AUTO if cache else new}, {0: batch, 1: new})
    implementation = REPEATED if repeat_heads else SHARED if shared else GROUPED
    with attention_implementation(model, implementation), _quiet(), torch.no_grad():
        program = torch.onnx.export(
            FlatDecoder(model, cache=cache, shared=shared, maps=maps).eval(),
            (ids, mask, positions, *past),
            input_names=["input_ids", "attention_mask", "position_ids", *past_names],
            output_names=["logits", *(name.replace(PAST, PRESENT) for name in past_names), *map_names(config, maps)],
            dynamic_shapes=(*shapes, tuple({0: batch, 2: earlier} for _ in past)) if past else shapes,
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    assert program is not None
    graph = program.model
    _name_weights(graph)
    # The one matrix with two uses left is a tied embedding's, of which the optimizer would make a transposed copy.
    optimize_ir(graph, should_fold=lambda node: False if node.op_type == "Transpose" else None)
    if cache:
        _keep_last(graph)
    _describe(graph, config, cache, shared)
    return graph


def save(graph: Any, folder: Path) -> None:
    """Writes ``model.onnx``; weights that one file cannot hold go into ``model.onnx.data`` beside it."""
    import onnx_ir

    for name in (MODEL_FILE, DATA_FILE):
        (folder / name).unlink(missing_ok=True)
    onnx_ir.save(graph, folder / MODEL_FILE, external_data=DATA_FILE if weight_bytes(graph) > LARGEST_FILE else None)


def shares_buffers(graph: Any) -> bool:
    """Returns whether the graph writes new keys and values into the cache that it is given."""
    return graph.metadata_props.get(SHARED_KEY) == "yes"


def weight_bytes(graph: Any) -> int:
    """Returns the bytes of all constants of the graph."""
    return sum(value.const_value.nbytes for value in graph.graph.initializers.values())


def _name_weights(graph: Any) -> None:
    """Names weights as in the checkpoint, and transposes matrices of products, as ``MatMul`` takes them."""
    import onnx_ir

    weights = graph.graph.initializers
    for old in list(weights):
        name = old.removeprefix("model.")
        weights[old].name = (
            "model.embed_tokens.weight" if name == "lm_head.weight" and _is_table(weights[old]) else name
        )
    for node in list(graph.graph):
        if node.op_type != "Transpose" or not node.inputs[0].is_initializer() or len(node.inputs[0].uses()) > 1:
            continue
        weight = node.inputs[0]
        rows, columns = weight.shape
        # Made when it is written: the weights of a large model are in memory once.
        weight.const_value = onnx_ir.LazyTensor(
            functools.partial(_transposed, weight.const_value),
            dtype=weight.dtype,
            shape=onnx_ir.Shape((columns, rows)),
            name=weight.name,
        )
        weight.shape = onnx_ir.Shape((columns, rows))
        node.outputs[0].replace_all_uses_with(weight)
        graph.graph.remove(node, safe=True)
    for node in graph.graph:
        if node.op_type == "MatMul":
            node.name = (node.inputs[1].name if node.inputs[1].is_initializer() else HEAD).removesuffix(".weight")


def _transposed(tensor: Any) -> Any:
    import onnx_ir

    return onnx_ir.tensor(tensor.numpy().T.copy(), name=tensor.name)


def _is_table(weight: Any) -> bool:
    return any(node.op_type == "Gather" for node, _ in weight.uses())


def _keep_last(graph: Any) -> None:
    """Computes the logits of the last tokens alone, of one unless the caller says of how many."""
    import onnx_ir

    def constant(name: str, value: Any) -> Any:
        array = np.array(value, np.int64)
        made = onnx_ir.val(name, const_value=onnx_ir.tensor(array, name=name))
        graph.graph.register_initializer(made)
        return made

    kept = constant(KEEP, 1)
    # An input that has a value already is one that the caller may leave out.
    graph.graph.inputs.append(kept)
    negative = onnx_ir.node("Neg", [kept])
    start = onnx_ir.node("Reshape", [negative.outputs[0], constant(f"{KEEP}_shape", [1])])
    end, axis = constant(f"{KEEP}_end", [np.iinfo(np.int64).max]), constant(f"{KEEP}_axis", [1])
    head = next(node for node in graph.graph if node.name == HEAD)
    last = onnx_ir.node("Slice", [head.inputs[0], start.outputs[0], end, axis])
    graph.graph.insert_before(head, [negative, start, last])
    head.replace_input_with(0, last.outputs[0])
    logits = head.outputs[0]
    # A size that is written down tells onnxruntime-genai that it need not look for the last; onnxruntime itself gives
    # as many as it is asked for.
    logits.shape = onnx_ir.Shape((logits.shape[0], 1, logits.shape[2]))


def _describe(graph: Any, config: DiffTransformerConfig, cache: bool, shared: bool) -> None:
    """Names the lengths that the tracer has no names for, says what made the file, and leaves out paths of ours."""
    import onnx_ir

    version = importlib.metadata.version("diffattn")
    if cache:
        mask = next(value for value in graph.graph.inputs if value.name == "attention_mask")
        mask.shape = onnx_ir.Shape((BATCH, f"{EARLIER} + {NEW}"))
    for node in graph.graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    graph.graph.metadata_props.clear()
    graph.metadata_props.clear()
    graph.metadata_props.update(diffattn=version, attention=config.attention)
    if shared:
        graph.metadata_props[SHARED_KEY] = "yes"
    graph.producer_name, graph.producer_version = "diffattn", version


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter from telling of its workings: packages that it does not need, lengths that are equal."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "# The axis name", UserWarning)
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
            yield
    finally:
        logger.setLevel(before)
