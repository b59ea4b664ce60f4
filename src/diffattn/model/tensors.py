"""The tensors of a checkpoint of ours, from its configuration alone, and the header of a file held against them.

Nothing is built, so a configuration that asks for a thousand layers too many is refused as fast as any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from diffattn.checkpoint_files import INDEX, WEIGHTS, HeaderEntry, printable, read_tensors
from diffattn.errors import CheckpointError
from diffattn.model.activations import activation_shapes
from diffattn.model.configuration import DiffTransformerConfig

_FLOATS = ("F16", "BF16", "F32", "F64")
# The last two parts of an error: what is wanted, and the way out.
ONE_CHECKPOINT = ("config.json and weights of one checkpoint", "copy or download both again")
EVERY_TENSOR = ("every tensor of the model, since none is made up", "copy or download the weights again")
_BASE, _HEAD, _EMBEDDING = "model.", "lm_head.weight", "model.embed_tokens.weight"


def tensor_shapes(config: DiffTransformerConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor in a checkpoint of ``DiffTransformerForCausalLM``; a tied output head is none.

    >>> shapes = tensor_shapes(DiffTransformerConfig())
    >>> len(shapes), shapes["model.layers.23.mlp.down_proj.weight"]
    (338, (2048, 5461))
    """
    assert config.head_dim is not None
    hidden, vocabulary, width = config.hidden_size, config.vocab_size, config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + name: shape for name, shape in _of_layer(config).items()}
        heads = config.output_heads
        if config.record.chosen_heads:
            heads = len(config.layer_dex_heads(layer))
        # A layer of which no head was chosen has none of them.
        for own in config.own_tensors() if heads else ():
            shapes[f"{prefix}self_attn.{own.name}"] = own.shape(D=hidden, d=config.rope_width, H=heads, V=width)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return shapes


def _of_layer(config: DiffTransformerConfig) -> dict[str, tuple[int, ...]]:
    """Returns the tensors that every layer has, without those of the variant's own."""
    assert config.head_dim is not None
    assert config.num_key_value_heads is not None
    hidden, inner, width = config.hidden_size, config.intermediate_size, config.rope_width
    queries, keys = config.num_attention_heads * width, config.num_key_value_heads * config.head_dim
    outputs = config.output_heads * config.head_dim
    linear = {
        "self_attn.q_proj": (queries, hidden, config.attention_bias),
        "self_attn.k_proj": (keys, hidden, config.attention_bias),
        "self_attn.v_proj": (keys, hidden, config.attention_bias),
        "self_attn.o_proj": (hidden, outputs, config.attention_output_bias),
        "mlp.gate_proj": (inner, hidden, config.mlp_bias),
        "mlp.up_proj": (inner, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, inner, config.mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns, bias) in linear.items():
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)
    shapes |= {f"mlp.act_fn.{name}": shape for name, shape in activation_shapes(config.hidden_act).items()}
    if config.normalizes_heads and config.subln_affine:
        shapes["self_attn.subln.weight"] = (config.head_dim,)
    if config.qk_norm:
        shapes |= {f"self_attn.{name}.weight": (width,) for name in ("q_norm", "k_norm")}
    return shapes | {f"{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}


def check_layers(layers: int, tensors: int) -> None:
    """Raise a ``CheckpointError`` for more layers than tensors, which would be built for nothing, by the million."""
    if layers > tensors:
        raise CheckpointError(
            f"num_hidden_layers is {layers:,} and the weights are {tensors:,} tensors",
            "both of one checkpoint",
            "correct config.json, or copy the weights again",
        )


def check_fitting(folder: str | Path, config: DiffTransformerConfig, entries: Mapping[str, HeaderEntry]) -> None:
    """Raise a ``CheckpointError`` where the header has a tensor in another shape, or a layer less than are asked for.

    Args:
        folder: for the message.
        config: of the model.
        entries: what ``diffattn.checkpoint_files.read_tensors`` gave, of the model with or without its output head.
    """
    check_layers(config.num_hidden_layers, len(entries))
    wanted, found = tensor_shapes(config), _of_whole_model(entries)
    where = f"the weights in {str(folder)!r}"
    if mismatched := sorted(name for name in wanted.keys() & found.keys() if wanted[name] != found[name]):
        name = mismatched[0]
        raise CheckpointError(
            f"{where} do not fit config.json: {name} is {_sizes(found[name])} there and {_sizes(wanted[name])} by "
            f"config.json{_more(mismatched)}",
            *ONE_CHECKPOINT,
        )
    last = f"model.layers.{config.num_hidden_layers - 1}."
    if not any(name.startswith(last) for name in found):
        missing = sorted(wanted.keys() - found.keys())
        raise CheckpointError(f"{where} lack {missing[0]}{_more(missing)}", *EVERY_TENSOR)


def check_folder(folder: str | Path, config: DiffTransformerConfig | None = None) -> None:
    """:func:`check_fitting` of a folder that holds safetensors; nothing of any other, such as the name of one on a hub.

    Quantised weights have shapes of their own, which the quantiser checks.

    Args:
        folder: of a checkpoint.
        config: of the model. Default: the folder's own.
    """
    folder = Path(folder)
    if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
        entries = read_tensors(folder)
        config = config or DiffTransformerConfig.from_pretrained(folder)
        if not getattr(config, "quantization_config", None):
            check_fitting(folder, config, entries)


def check_whole(folder: str | Path, config: DiffTransformerConfig, entries: Mapping[str, HeaderEntry]) -> None:
    """Raise a ``CheckpointError`` unless the header has the tensors of the configuration, no more and no less.

    Arguments as of :func:`check_fitting`. A tied output head may be stored or not, or be stored for the embedding.
    """
    check_fitting(folder, config, entries)
    for name, entry in entries.items():
        if entry["dtype"] not in _FLOATS:
            raise CheckpointError(
                f"{printable(name)} in {str(folder)!r} is {entry['dtype']}",
                "floating-point weights of at least 16 bits",
                "take the model as it was before it was quantised",
            )
    wanted, found = tensor_shapes(config), _of_whole_model(entries)
    where = f"the weights in {str(folder)!r}"
    if config.tie_word_embeddings and (head := found.pop(_HEAD, None)) is not None:
        found.setdefault(_EMBEDDING, head)
    if missing := sorted(wanted.keys() - found.keys()):
        raise CheckpointError(f"{where} lack {missing[0]}{_more(missing)}", *EVERY_TENSOR)
    if unexpected := sorted(found.keys() - wanted.keys()):
        raise CheckpointError(
            f"{where} hold {printable(unexpected[0])}{_more(unexpected)}, which the model of config.json does not have",
            *ONE_CHECKPOINT,
        )


def _of_whole_model(entries: Mapping[str, HeaderEntry]) -> dict[str, tuple[int, ...]]:
    """Shapes by the names that the tensors have in the model with its output head."""
    inner = not any(name.startswith(_BASE) for name in entries)
    return {f"{_BASE}{name}" if inner else name: tuple(entry["shape"]) for name, entry in entries.items()}


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _sizes(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape)) or "a number"
