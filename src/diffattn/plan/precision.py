"""The dtypes of a model's numbers, and the bytes of its parameters."""

from __future__ import annotations

from dataclasses import dataclass

from diffattn.errors import ConfigError
from diffattn.names import one_of
from diffattn.plan.activations import check_backend
from diffattn.plan.cost import count_parameters
from diffattn.plan.shape import ModelShape, check_positive_int

# PyTorch's names of the same.
_LONG_NAMES = {"float32": "fp32", "bfloat16": "bf16"}

BYTES: dict[str, float] = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1, "int4": 0.5}


@dataclass(frozen=True)
class Precision:
    """The dtype of each kind of number: ``fp32``, ``bf16``, ``fp16``, ``int8`` or ``int4``.

    Args:
        weights: what the products read. ``fp32`` under narrower activations means autocast: each weight is cast, and
            the copy is kept for the backward pass.
        gradients: of the parameters.
        optimizer: both moments of AdamW.
        activations: results of the products.
        cache: keys and values.
        master: a second copy of the weights that the optimizer updates; None: there is none.

    Raises:
        ConfigError: an unknown dtype, or integers where only floating-point numbers work (all but weights and cache).

    >>> PRECISIONS["mixed"].master
    'fp32'
    """

    weights: str
    gradients: str
    optimizer: str
    activations: str
    cache: str
    master: str | None = None

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            known = tuple(BYTES) if key in ("weights", "cache") else ("fp32", "bf16", "fp16")
            if value not in known and not (key == "master" and value is None):
                raise ConfigError(f"{key}={value!r} given; a dtype is wanted there; use one of {', '.join(known)}")

    @property
    def autocast(self) -> bool:
        """Whether float32 weights are cast for products in a narrower dtype."""
        return self.weights == "fp32" and self.activations != "fp32"


PRECISIONS: dict[str, Precision] = {
    "fp32": Precision("fp32", "fp32", "fp32", "fp32", "fp32"),
    "autocast": Precision("fp32", "fp32", "fp32", "bf16", "bf16"),
    "bf16": Precision("bf16", "bf16", "bf16", "bf16", "bf16"),
    "mixed": Precision("bf16", "bf16", "fp32", "bf16", "bf16", master="fp32"),
}


def weight_bytes(shape: ModelShape, attention: str, *, dtype: str) -> int:
    """Bytes of the parameters, in memory and (without the header) in the safetensors file; V1's λ stays float32.

    Args:
        shape: the softmax Transformer being replaced; for a matched V2, what ``match_parameters`` returned.
        attention: a name in ``VARIANTS``.
        dtype: a name of ``BYTES``.

    Raises:
        ConfigError: an unknown dtype, or a variant that the shape cannot carry.

    Source: ``diffattn.model.attention.Float32Module``.

    >>> weight_bytes(ModelShape.preset("3M"), "softmax", dtype="bf16")
    6000768
    """
    if dtype not in BYTES:
        raise ConfigError(f"dtype={dtype!r} given; a dtype is wanted; use one of {', '.join(BYTES)}")
    return bytes_of(count_parameters(shape, attention).total, float32_parameters(shape, attention), dtype)


def resolve_precision(precision: Precision | str) -> Precision:
    """A precision by its name in ``PRECISIONS``, in any case; a ``Precision`` is returned as it is.

    Raises:
        ConfigError: no precision has this name.

    >>> resolve_precision("bf16").weights
    'bf16'
    """
    if isinstance(precision, Precision):
        return precision
    return PRECISIONS[one_of(precision, PRECISIONS, given=f"precision={precision!r} given", also=_LONG_NAMES)]


def resolve_dtype(text: str, part: str) -> str:
    """A dtype of ``BYTES`` as people write it: in any case, or by PyTorch's name; ``part`` is what it is of.

    Raises:
        ConfigError: no dtype has this name.

    >>> resolve_dtype("BFloat16", "weights")
    'bf16'
    """
    return one_of(text, BYTES, given=f"{part}={text!r} given", also=_LONG_NAMES | {"float16": "fp16"})


def checked(
    shape: ModelShape, attention: str, batch: int, context: int, precision: Precision | str, backend: str
) -> Precision:
    """The precision, after all arguments of a function of memory were looked at."""
    shape.check_variant(attention)
    check_positive_int("batch", batch)
    check_positive_int("context", context)
    check_backend(attention, backend)
    return resolve_precision(precision)


def float32_parameters(shape: ModelShape, attention: str) -> int:
    """How many parameters stay float32 whatever the dtype: V1's λ vectors."""
    return 4 * shape.head_dim * shape.num_layers if attention == "diff_v1" else 0


def bytes_of(count: int, float32: int, dtype: str) -> int:
    """Of ``count`` numbers of a dtype, ``float32`` of which stay float32; whole bytes, rounded up."""
    return -int(-(count - float32) * BYTES[dtype] // 1) + 4 * float32
