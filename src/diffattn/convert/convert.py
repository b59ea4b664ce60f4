"""The conversion of a checkpoint folder into another: a table of directions, each a pure function of what is in it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from diffattn.config_fields import Config, dtype_name, shown
from diffattn.convert import diffllama, gda, llama, motif, unilm
from diffattn.convert.folder import check_destination, check_loads, write_folder
from diffattn.convert.inputs.source import read_source
from diffattn.convert.layout import EMBEDDING, Tensors
from diffattn.convert.options import TARGETS
from diffattn.convert.reading import OURS
from diffattn.convert.refused import MOTIF, check_not_refused, check_own_code
from diffattn.convert.sources import LLAMA_LIKE, unknown_architecture
from diffattn.errors import ConfigError, UnsupportedError
from diffattn.progress import OnStage, Stage, unseen
from diffattn.variants import ATTENTIONS, DEFAULT

_BITS = "every weight is kept bit for bit"


@dataclass(frozen=True)
class Direction:
    """One way to convert.

    Attributes:
        function: ``(config, tensors, **options)`` to ``(config, tensors)``.
        changed: what is done to the weights.
        exact: how near the result is to the source.
        options: those that the function takes.
    """

    function: Callable[..., tuple[Config, Tensors]]
    changed: str
    exact: str
    options: tuple[str, ...] = ()


_V2 = Direction(
    llama.to_diff_v2,
    "each query head twice, W_O doubled, W_λ = 0",
    "the same function: the maps start alike and λ = 1/2",
    ("noise", "noise_std", "seed"),
)
_GDA_V2 = Direction(
    gda.to_diff_gda_v2,
    "a noise head for each key/value head, a copy of its first query head, and W_λ = 0",
    f"the same function, since λ = 0, and {_BITS}",
)
_DEX = Direction(
    llama.to_dex, "W_D = 0 added to the chosen heads", f"the same function, and {_BITS}", ("heads",)
)  # fmt: skip
_FROM_MOTIF = Direction(motif.from_motif, "the names of λ, and λ_init of each layer", f"the same function, and {_BITS}")
_TO_MOTIF = Direction(motif.to_motif, "the names of λ and the configuration", f"the same function, and {_BITS}")

# Of an adapter for a model of ours, which may stay what it is.
_MERGED = Direction(
    lambda config, tensors: (dict(config), dict(tensors)),
    "the adapter merged into the weights",
    "each changed weight rounded once",
)

DIRECTIONS: dict[tuple[str, str], Direction] = {
    ("diffllama", "diff_v1"): Direction(
        diffllama.to_diff_v1, "heads paired as neighbours in W_Q, W_K and W_V", f"the same function, and {_BITS}"
    ),
    ("diff_v1", "diffllama"): Direction(
        diffllama.to_diffllama,
        "heads paired by halves in W_Q, W_K and W_V; a gain in the norm of the heads, if any, went into W_O",
        f"the same function, and {_BITS} but for the exponents in W_O where there was a gain",
    ),
    ("motif V1", "diff_v1"): _FROM_MOTIF,
    ("motif GDA", "diff_gda"): _FROM_MOTIF,
    ("diff_v1", "motif"): _TO_MOTIF,
    ("diff_gda", "motif"): _TO_MOTIF,
    ("reference V1", "diff_v1"): Direction(
        unilm.from_reference, "channels of W_Q and W_K in half-rotation order", f"the same function, and {_BITS}"
    ),
    ("reference V2", "diff_v2"): Direction(
        unilm.from_reference, "channels of W_Q and W_K in half-rotation order", f"the same function, and {_BITS}"
    ),
    ("diff_v1", "reference"): Direction(
        unilm.to_reference, "channels of W_Q and W_K interleaved", f"the same function, and {_BITS}"
    ),
    ("diff_v2", "reference"): Direction(
        unilm.to_reference, "channels of W_Q and W_K interleaved", f"the same function, and {_BITS}"
    ),
    ("llama", "softmax"): Direction(llama.to_softmax, "the configuration", f"the same function, and {_BITS}"),
    ("softmax", "llama"): Direction(llama.to_llama, "the configuration", f"the same function, and {_BITS}"),
    ("llama", "diff_v2"): _V2,
    ("softmax", "diff_v2"): _V2,
    ("llama", "diff_gda_v2"): _GDA_V2,
    ("softmax", "diff_gda_v2"): _GDA_V2,
    ("llama", "dex"): _DEX,
    ("softmax", "dex"): _DEX,
    ("dex", "softmax"): Direction(
        llama.fold_dex, "W_D folded into W_O", "the same function but for the rounding of the new W_O"
    ),
}
# The target of a kind that has one obvious target. Our own models can become several, so a user has to name one.
OBVIOUS = {
    "diffllama": "diff_v1",
    "motif V1": "diff_v1",
    "motif GDA": "diff_gda",
    "reference V1": "diff_v1",
    "reference V2": "diff_v2",
    "llama": "softmax",
}
# The model types of which the library has no class, so that it cannot check what was made.
_NO_CLASS = (unilm.REFERENCE, MOTIF[0])


@dataclass(frozen=True)
class Conversion:
    """The outcome of :func:`convert`.

    Attributes:
        source: kind of the source, such as ``"diffllama"`` or ``"diff_v1"``; of Llama-like models their model_type.
        target: kind that was written.
        folder: the folder that was written.
        parameters: the number of parameters of the result; a tied output head counts once.
        source_parameters: the number of parameters of the source.
        bytes: the bytes of the result's weights.
        dtype: the number format of the result's embeddings, such as ``"float32"``.
        same_function: whether the result computes what the source does, but for rounding.
        changed: what was done to the weights.
        exact: how near the result is to the source.
        notes: what to know before using it.
    """

    source: str
    target: str
    folder: str
    parameters: int
    source_parameters: int
    bytes: int
    dtype: str
    same_function: bool
    changed: str
    exact: str
    notes: tuple[str, ...]


def convert(
    src: str | Path,
    dst: str | Path,
    to: str | None = None,
    *,
    chat_template: str | None = None,
    max_shard_size: int | str = "5GB",
    on_stage: OnStage = unseen,
    **options: Any,
) -> Conversion:
    """Converts the checkpoint folder ``src`` into the new folder ``dst``, without loss or not at all.

    ==================== ======================= =======================================
    source               targets                 by
    ==================== ======================= =======================================
    diffllama            diff_v1                 :mod:`diffattn.convert.diffllama`
    Motif                diff_v1, diff_gda       :mod:`diffattn.convert.motif`
    reference V1, V2     diff_v1, diff_v2        :mod:`diffattn.convert.unilm`
    llama-like, softmax  softmax, diff_v2, dex   :mod:`diffattn.convert.llama`, :mod:`diffattn.convert.sources`
    llama-like, softmax  diff_gda_v2             :mod:`diffattn.convert.gda`
    diff_v1              diffllama, motif, reference
    diff_gda             motif
    diff_v2              reference
    softmax              llama                   the model_type that it fits
    dex                  softmax                 rounds W_O once
    ==================== ======================= =======================================

    Args:
        src: a folder as ``save_pretrained`` writes it, of a model or of a LoRA adapter of PEFT whose base is a folder
            here; a GGUF file, or a folder with one; or a reference folder (``docs/convert.md``).
        dst: a folder that is new or empty. It appears whole or not at all. The source's tokenizer and
            ``generation_config.json`` are copied into it.
        to: one of ``TARGETS``; ``None`` for the obvious one, which our own models do not have.
        chat_template: the template itself, for the tokenizer in ``dst``. Default: the source's own.
        max_shard_size: the largest size of one file of weights, in bytes or as ``"5GB"``.
        on_stage: called with what is being done.
        options: to diff_v2 ``noise``, ``noise_std`` and ``seed`` of :func:`diffattn.convert.llama.to_diff_v2`; to dex
            ``heads``, for every layer the heads that subtract, or one list for all layers.

    Raises:
        CheckpointError: the source is missing, damaged or incomplete, or its weights are pickles.
        UnsupportedError: an architecture or a direction that is not here, or a model that the target cannot say.
        ConfigError: an unknown target or option, a configuration that is no model, or a ``dst`` that holds something.
    """
    if to is not None and to not in TARGETS:
        raise ConfigError(f"to is {to!r}", f"one of {', '.join(TARGETS)}", "name one of these with --to")
    on_stage(Stage("reading the weights"))
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = read_source(src, Path(scratch))
        destination = check_destination(src, dst)
        kind = kind_of(checkpoint.config)
        target = OBVIOUS.get(kind) if to is None else to
        if checkpoint.merged and target in (None, kind):
            target, direction = kind, _MERGED
        else:
            direction = _direction(kind, target, options)
        if options.get("heads") is not None:
            options["heads"] = _heads_of_layers(options["heads"], checkpoint.config)
        if chat_template is not None and not checkpoint.has_tokenizer:
            raise ConfigError(
                f"a chat template, and {str(src)!r} holds no tokenizer", "a tokenizer that it belongs to",
                "save the tokenizer there, or leave --chat-template out",
            )  # fmt: skip
        on_stage(Stage("converting the weights"))
        config, tensors = direction.function(checkpoint.config, checkpoint.tensors, **options)
        if config["model_type"] not in _NO_CLASS:
            # Without this field, the library takes the dtype of the tensor that it finds first.
            config.setdefault("dtype", dtype_name(tensors[EMBEDDING].dtype))
            on_stage(Stage("checking that the result is a whole model"))
            check_loads(config, tensors)
        on_stage(Stage("writing the weights"))
        size = write_folder(destination, config, tensors, checkpoint.copied, max_shard_size, chat_template)
    made = config.get("converted")
    same = made.get("same_function", True) if isinstance(made, dict) else True
    return Conversion(
        source=checkpoint.config["model_type"] if kind == "llama" else kind,
        target=config["model_type"] if target == "llama" else str(target),
        folder=str(dst),
        parameters=_count(tensors),
        source_parameters=_count(checkpoint.tensors),
        bytes=size,
        dtype=dtype_name(tensors[EMBEDDING].dtype),
        same_function=same,
        changed=direction.changed,
        exact=direction.exact if same else "not the same function: noise moved the second map, as was asked",
        notes=(*checkpoint.notes, *_notes(checkpoint.config, config, checkpoint.has_tokenizer)),
    )


def kind_of(config: Config) -> str:
    """The kind of a source by its ``config.json``: a key of ``DIRECTIONS``.

    >>> kind_of({"model_type": "qwen2"}), kind_of({"model_type": "diff_transformer", "attention": "diff_v2"})
    ('llama', 'diff_v2')
    """
    check_not_refused(config)
    kind = config.get("model_type")
    if kind == OURS:
        # A missing field means the default, as it does to the configuration class.
        attention = config.get("attention", DEFAULT)
        if not isinstance(attention, str) or attention not in ATTENTIONS:
            raise ConfigError(
                f"attention is {shown(attention)}", f"one of {', '.join(ATTENTIONS)}", "correct config.json"
            )
        return str(attention)
    if kind == unilm.REFERENCE:
        return f"reference V{unilm.version_of(config)}"
    if isinstance(kind, str) and kind in MOTIF:
        return motif.form_of(config)
    if isinstance(kind, str) and (kind in LLAMA_LIKE or kind == "diffllama"):
        check_own_code(config)
        return "diffllama" if kind == "diffllama" else "llama"
    raise unknown_architecture(config)


def _direction(kind: str, target: str | None, options: Mapping[str, object]) -> Direction:
    targets = [end for start, end in DIRECTIONS if start == kind]
    if target is None and targets:
        raise ConfigError(
            f"the source is a {kind} model, which has no obvious target",
            f"--to {_or(targets)}",
            f"pass --to {targets[0]}, for example",
        )
    if target == kind or (target == "reference" and kind.startswith("reference")):
        raise UnsupportedError(f"the source is a {kind} model already", "another target", "use it as it is")
    direction = DIRECTIONS.get((kind, str(target)))
    if direction is None:
        ways = f"one to {_or(targets)}" if targets else f"a source of {', '.join(sorted({s for s, _ in DIRECTIONS}))}"
        raise UnsupportedError(
            f"there is no exact conversion from {kind} to {target}", ways, "choose that, or convert in two steps"
        )
    if unknown := sorted(set(options) - set(direction.options)):
        takes = f"only {', '.join(direction.options)}" if direction.options else "no option"
        raise ConfigError(
            f"option {unknown[0]} for the conversion from {kind} to {target}", takes, f"leave {unknown[0]} out"
        )
    return direction


def _heads_of_layers(heads: Any, config: Config) -> list[list[int]]:
    """Returns a list of heads for each layer, also where one list was given for all layers."""
    heads = list(heads)
    if all(isinstance(head, int) for head in heads):
        layers = config.get("num_hidden_layers")
        return [heads] * (layers if isinstance(layers, int) else 0)
    return heads


def _notes(source: Config, made: Config, has_tokenizer: bool) -> tuple[str, ...]:
    notes = []
    if source["model_type"] == "diffllama" and (source.get("num_key_value_heads") or 0) % 2:
        before = source["num_key_value_heads"]
        notes.append(
            f"{before} key/value heads cannot be paired, so each was written twice: the cache takes twice the bytes"
        )
    positions = made.get("rope_parameters")
    if source["model_type"] == "phi3" and isinstance(positions, dict) and positions.get("rope_type") == "longrope":
        notes.append(
            "where a text grows past the original number of positions, generate of transformers' phi3 computes its "
            "cache anew; ours goes on with the keys that it has, as with any other longrope model"
        )
    if made["model_type"] == "diffllama":
        notes.append("λ is written in float32; transformers casts diffllama's to the model's dtype when it loads it")
    if source.get("auto_map") and source["model_type"] != OURS:
        notes.append("the code that the source names in auto_map was not run: its published layout was followed")
    if made["model_type"] == MOTIF[0]:
        notes.append(
            "Motif's own code is not in the folder: copy it there from the published model to run it with that"
        )
    if made.get("attention") == "diff_gda_v2":
        more, v2_more = gda.parameters_beside_v2(made)
        notes.append(f"{more:,} parameters more than the source; diff_v2 would have {v2_more:,} more")
    if not has_tokenizer:
        notes.append("the source has no tokenizer: diffattn generate needs one beside the weights")
    return tuple(notes)


def _or(names: list[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _count(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())
