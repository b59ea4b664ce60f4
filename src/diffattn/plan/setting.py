"""The setting of a plan: how much text at once, in which number formats, by which attention, on which machine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from diffattn.errors import ConfigError
from diffattn.names import SHORT_DTYPES, one_of
from diffattn.plan.activations import AUTO, check_backend, find_backend, serving
from diffattn.plan.hardware import Machine, load_machine
from diffattn.plan.ranks.mesh import Mesh, mesh_sizes
from diffattn.plan.shape import ModelShape, check_positive_int
from diffattn.quantities import short, whole

# Beyond this a context or a batch is a slip.
FAR = 1 << 40

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
                raise ConfigError(f"{key}={value!r}", "a number format", f"use one of {', '.join(known)}")

    @property
    def autocast(self) -> bool:
        """True where float32 weights are cast for products in a narrower dtype."""
        return self.weights == "fp32" and self.activations != "fp32"

    @property
    def name(self) -> str | None:
        """The name in ``PRECISIONS``; None: this one has none.

        >>> Precision("bf16", "bf16", "bf16", "bf16", "bf16").name
        'bf16'
        """
        return next((name for name, known in PRECISIONS.items() if known == self), None)

    @property
    def trains(self) -> bool:
        """True where the weights are floating-point numbers: integers are not trained."""
        return not self.weights.startswith("int")

    def to_json(self) -> dict[str, str | None]:
        """Returns the dtype of each kind of number, by its name."""
        return asdict(self)


PRECISIONS: dict[str, Precision] = {
    "fp32": Precision("fp32", "fp32", "fp32", "fp32", "fp32"),
    "autocast": Precision("fp32", "fp32", "fp32", "bf16", "bf16"),
    "bf16": Precision("bf16", "bf16", "bf16", "bf16", "bf16"),
    "mixed": Precision("bf16", "bf16", "fp32", "bf16", "bf16", master="fp32"),
}


@dataclass(frozen=True, init=False)
class Setting:
    """The conditions under which a model is planned.

    Names are found as people write them: ``Setting(context="4k", machine="rtx 3060")``.

    Raises:
        ConfigError: a number below 1, or a name that is not known.

    >>> setting = Setting(context="4k", precision="bf16", machine="rtx 3060")
    >>> setting.context, setting.precision.weights, setting.machine.name
    (4096, 'bf16', 'RTX 3060 12GB')
    """

    context: int
    """Tokens T in a sequence, at least 1; decoding adds one behind them. Default: 4096."""
    batch: int
    """Sequences B in one forward pass of all ranks together, at least 1; those ranks that take different blocks share
    them equally. A training step of several such passes holds the gradients of the first through the others, so at most
    the bytes of all gradients more. Default: 1."""
    precision: Precision
    """Number format of each part, or the name of one in ``PRECISIONS``. Default: ``"mixed"``, bfloat16 with a float32
    copy of the weights."""
    backend: str
    """The way in which attention is computed: ``"auto"``, the one that serves on the machine (``for_model`` says which;
    without a machine the standard call); ``"standard"`` (one sdpa call), ``"unequal"`` (one sdpa call, in which V1's
    values are twice as wide as its keys), ``"fused_triton"`` (the GPU kernel), ``"fused_cpu"`` and ``"definition"``
    (maps subtracted in the kernel), ``"materialised"`` (eager: maps written out); or one of two forms of V1 that are
    known from the literature and that this package does not have, ``"two_calls"`` and ``"four_calls"``.
    Default: ``"auto"``."""
    checkpointing: bool
    """True where training keeps only each layer's input and computes the layer again for its backward pass. Default:
    False."""
    machine: Machine | None
    """The machine's peak rates, its name in ``MACHINES``, or a JSON file; None: no times. Default: ``"H100 SXM"``."""
    ranks: int
    """Processes that train together, each with a device of its own. Default: as many as ``tp``."""
    shard: str
    """The way in which the ranks share the model: ``"none"``, each has a copy of it (DDP); ``"full"``, weights,
    gradients and the optimizer's state are shared out over all ranks (FSDP2); ``"hybrid"``, over the ranks of a host,
    and each host has a copy. Default: ``"none"``."""
    tp: int
    """Ranks that share the heads and the feed-forward network of each layer; a divisor of the key/value heads of the
    one attention call. Default: 1."""
    per_host: int | None
    """Ranks on each host, for ``"hybrid"``. Default: None, all are on one."""

    def __init__(
        self,
        *,
        context: int | str = 4096,
        batch: int | str = 1,
        precision: Precision | str = "mixed",
        backend: str = AUTO,
        checkpointing: bool = False,
        machine: Machine | str | Path | None = "H100 SXM",
        ranks: int | None = None,
        shard: str = "none",
        tp: int = 1,
        per_host: int | None = None,
    ) -> None:
        read = {
            "context": parse_tokens(context, "context") if isinstance(context, str) else context,
            "batch": parse_tokens(batch, "batch") if isinstance(batch, str) else batch,
            "precision": resolve_precision(precision),
            "backend": find_backend(backend),
            "checkpointing": checkpointing,
            "machine": load_machine(machine) if isinstance(machine, str | Path) else machine,
            "ranks": tp if ranks is None else ranks,
            "shard": shard,
            "tp": tp,
            "per_host": per_host,
        }
        for key in ("context", "batch", "tp", "ranks", *([] if per_host is None else ["per_host"])):
            check_positive_int(key, read[key])
        for key, value in read.items():
            object.__setattr__(self, key, value)
        if self.batch % self.mesh.data:
            raise ConfigError(
                f"a batch of {self.batch} over {self.mesh.data} ranks that each take a part of it",
                "a batch that they divide",
                f"take {self.mesh.data * -(-self.batch // self.mesh.data)}",
            )

    def for_model(self, shape: ModelShape, attention: str) -> Setting:
        """Returns the setting with the backend by which this model is planned: ``"auto"`` is the one that serves.

        Raises:
            ConfigError: the shape cannot carry the variant, or the variant does not have the backend.

        >>> shape = ModelShape.preset("3M")
        >>> [Setting().for_model(shape, name).backend for name in ("diff_v1", "softmax")]
        ['fused_triton', 'standard']
        >>> Setting(machine="Raspberry Pi 5").for_model(shape, "diff_v1").backend
        'fused_cpu'
        """
        shape.check_variant(attention)
        if self.backend == AUTO:
            served = serving(
                shape, attention, self.machine, activations=self.precision.activations, context=self.context,
                trains=self.precision.trains,
            )  # fmt: skip
            return replace(self, backend=served)
        check_backend(attention, self.backend)
        return self

    @property
    def mesh(self) -> Mesh:
        """The layout of the ranks."""
        return mesh_sizes(self.ranks, shard=self.shard, tensor=self.tp, per_host=self.per_host)

    @property
    def rank_batch(self) -> int:
        """The sequences that one rank computes in a forward pass."""
        return self.batch // self.mesh.data

    @property
    def wrapper(self) -> str:
        """The wrapper of PyTorch that holds the ranks together: ``"DDP"``, ``"FSDP2"``, or ``""`` for one rank.

        >>> Setting(ranks=2, batch=2).wrapper, Setting(ranks=2, batch=2, shard="full").wrapper, Setting(tp=2).wrapper
        ('DDP', 'FSDP2', 'FSDP2')
        """
        if self.ranks == 1:
            return ""
        return "DDP" if self.shard == "none" and self.tp == 1 else "FSDP2"

    @property
    def stored(self) -> int:
        """The bytes of a weight as FSDP2 keeps it, and of its gradient: those of the copy that the optimizer changes.

        >>> Setting().stored, Setting(precision="bf16").stored
        (4, 2)
        """
        return int(BYTES[self.precision.master or self.precision.weights])

    @property
    def alone(self) -> Setting:
        """This setting on one rank, which computes the whole batch."""
        return replace(self, ranks=1, shard="none", tp=1, per_host=None)

    @property
    def gpu(self) -> bool:
        """True where the machine is known to be a GPU."""
        return self.machine is not None and self.machine.chip is not None

    def to_json(self) -> dict[str, object]:
        """Returns the fields by name, each as JSON has it.

        >>> list(Setting().to_json())
        ['context', 'batch', 'precision', 'backend', 'checkpointing', 'machine', 'ranks', 'shard', 'tp', 'per_host']
        """
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        machine = None if self.machine is None else self.machine.to_json()
        return found | {"precision": self.precision.to_json(), "machine": machine}


def resolve_precision(precision: Precision | str) -> Precision:
    """Returns a precision by its name in ``PRECISIONS``, in any case; a ``Precision`` is returned as it is.

    Raises:
        ConfigError: no precision has this name.

    >>> resolve_precision("bf16").weights
    'bf16'
    """
    if isinstance(precision, Precision):
        return precision
    return PRECISIONS[_meant(precision, PRECISIONS, f"precision={precision!r}")]


def resolve_dtype(text: str, part: str) -> str:
    """Returns a dtype of ``BYTES`` as people write it: in any case, or by PyTorch's name; ``part`` is what it is of.

    Raises:
        ConfigError: no dtype has this name.

    >>> resolve_dtype("BFloat16", "weights")
    'bf16'
    """
    return _meant(text, BYTES, f"{part}={text!r}")


def _meant(text: str, names: Iterable[str], given: str) -> str:
    """Returns the one of our short names that a text means, which may be PyTorch's name of it."""
    known = {SHORT_DTYPES.get(name, name): name for name in names}
    return known[one_of(text, known, given=given, also={name: long for long, name in known.items()})]


def parse_tokens(text: str | int, name: str = "context") -> int:
    """Reads a context or a batch: 4096, or 4k, where k is 1024 and M its square, as contexts are named.

    Raises:
        ConfigError: text that is no whole number from 1 to 2^40.

    >>> parse_tokens("4k"), parse_tokens("1M"), parse_tokens(4096)
    (4096, 1048576, 4096)
    """
    value = whole(text, {"": 1, "k": 1024, "m": 1024**2}, most=FAR)
    if value is None:
        raise ConfigError(
            f"{name} {short(text)}", "a whole number from 1 to 2^40", "write it such as 4096 or 4k, where k is 1024"
        )
    return value


def precision_of(name: str, **dtypes: str | None) -> Precision:
    """Returns a precision by name, in which the dtypes that are given replace its own.

    Raises:
        ConfigError: an unknown precision or dtype.

    >>> precision_of("bf16", weights="int4", cache=None).weights
    'int4'
    """
    chosen = {key: resolve_dtype(value, key) for key, value in dtypes.items() if value is not None}
    return replace(resolve_precision(name), **chosen)


DEFAULT_SETTING = Setting()


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """A plan as a person asks for it: one model or two, the setting in words, and what else is to be answered."""

    model: str | None = None
    """The model, as VARIANT:SIZE. VARIANT is softmax, diff_v1, diff_v2, diff_gda, diff_gda_v2 or gated. SIZE is a
    preset such as 6.8B, a count such as 11B, a .toml file, a model's folder or a public model such as llama-3.2-1B or
    motif-2.6B. A folder or a public model alone brings its own variant; a size alone means diff_v1. Default:
    diff_v1:6.8B."""
    against: str | None = None
    """A second model to compare it with, written in the same way; a size alone means softmax. Default: none, or
    softmax:11B if no model is given either."""
    group: int | None = None
    """Query heads for each key/value head, in both models. diff_gda and diff_gda_v2 need 2 or more: so many signal
    heads then share a noise head. Default: as the size says."""
    context: str = str(DEFAULT_SETTING.context)
    """Number of tokens in one sequence; 4k means 4096."""
    batch: str = str(DEFAULT_SETTING.batch)
    """Number of sequences that are computed together, by all GPUs."""
    machine: str = DEFAULT_SETTING.machine.name if DEFAULT_SETTING.machine else ""
    """H100 SXM, A100 80GB, RTX 4090, RTX 3060 12GB, Apple M2, DDR5 desktop or Raspberry Pi 5 (a part of the name is
    enough, such as "rtx 3060"), or a .json file."""
    precision: str = field(
        default=DEFAULT_SETTING.precision.name or "", metadata={"option": "dtype", "also": ("precision",)}
    )
    """Number formats of all parts: float32, autocast (float32 weights, bfloat16 products), bfloat16 or mixed (bfloat16
    with a float32 copy of the weights). The short names fp32 and bf16 work too."""
    weights_dtype: str | None = None
    """Format of the weights: float32, bfloat16, float16, int8 or int4. Default: as ``precision`` says."""
    gradients_dtype: str | None = None
    """Format of the gradients: float32, bfloat16 or float16. Default: as ``precision`` says."""
    optimizer_dtype: str | None = None
    """Format of the two numbers that AdamW keeps for each weight. Default: as ``precision`` says."""
    activations_dtype: str | None = None
    """Format of the results of layers. Default: as ``precision`` says."""
    cache_dtype: str | None = None
    """Format of the keys and values in the cache; int8 and int4 work too. Default: as ``precision`` says."""
    master_dtype: str | None = None
    """Format of the second copy of the weights. Default: as ``precision`` says."""
    backend: str = DEFAULT_SETTING.backend
    """Way to compute attention: auto (the one that diffattn takes on this machine), standard, unequal, fused_triton,
    fused_cpu, definition or materialised. The planner also knows two_calls and four_calls, two ways from the literature
    to compute V1 that diffattn itself does not have."""
    checkpointing: bool = DEFAULT_SETTING.checkpointing
    """Save memory in training by computing each layer twice."""
    ranks: int | None = None
    """Number of processes that train together, each on a GPU of its own. Default: as many as --tp."""
    shard: str = DEFAULT_SETTING.shard
    """Way to share the model: none (each has the whole model), full (weights, gradients and the optimizer's numbers are
    cut into parts) or hybrid (the same within each host; each host has the whole model)."""
    tp: int = DEFAULT_SETTING.tp
    """Number of GPUs that share the heads and the feed-forward network of each layer."""
    per_host: int | None = None
    """Number of GPUs in one host, for hybrid. Default: all GPUs are in one host; of a cluster, 8."""
    sweep: str | None = None
    """Answer for several values as well: context=1k:128k or batch=1:64."""
    fits: str | None = None
    """An amount of memory, such as 8GiB or 24GB: say the largest models, contexts and batches that it holds."""

    def setting(self) -> Setting:
        """Returns the setting that the words mean.

        Raises:
            ConfigError: a number below 1, or a name that is not known.

        >>> PlanOptions(context="1k", precision="bfloat16", cache_dtype="int8").setting().precision.cache
        'int8'
        """
        precision = precision_of(
            self.precision, weights=self.weights_dtype, gradients=self.gradients_dtype, optimizer=self.optimizer_dtype,
            activations=self.activations_dtype, cache=self.cache_dtype, master=self.master_dtype,
        )  # fmt: skip
        return Setting(
            context=self.context, batch=self.batch, machine=self.machine, backend=self.backend,
            checkpointing=self.checkpointing, precision=precision, ranks=self.ranks, shard=self.shard, tp=self.tp,
            per_host=self.per_host,
        )  # fmt: skip
