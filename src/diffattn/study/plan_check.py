"""The planner held against the real model on this machine: predicted and measured, row by row."""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.cache_utils import DynamicCache

from diffattn.checkpoint_files import check_safetensors
from diffattn.errors import ConfigError, UnsupportedError
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.fused import DIFF_FUSED, serving_backend
from diffattn.model.modeling import DiffTransformerForCausalLM
from diffattn.model.transformers_private import attention_implementation
from diffattn.plan.activations import AUTO
from diffattn.plan.cost import cache_bytes_per_token, count_parameters, flops_per_token, weight_bytes
from diffattn.plan.hardware import Machine
from diffattn.plan.memory import decoding_memory, prefill_memory, training_memory
from diffattn.plan.setting import BYTES, Setting
from diffattn.plan.shape import ModelShape
from diffattn.progress import OnStage, Stage, unseen
from diffattn.study.measured_machine import forget, main_memory, measure_machine
from diffattn.train.measure import TrainingStep, median_seconds, peak_bytes
from diffattn.variants import VARIANTS

# The precisions and the backends that can be built here; the planner knows more of both.
_PRECISIONS = ("fp32", "autocast", "bf16")
IMPLEMENTATIONS = {"fused_cpu": DIFF_FUSED, "standard": "sdpa", "materialised": "eager"}


class Subject:
    """A model with random weights, and what is measured on it.

    Args:
        shape: the softmax Transformer being replaced; for a matched V2, what ``match_parameters`` returned.
        attention: a name in ``VARIANTS``.
        setting: how it is run, here on one rank: the precision ``"fp32"``, ``"autocast"`` or ``"bf16"``, the backend
            ``"fused_cpu"``, ``"standard"``, ``"materialised"``, or ``"auto"`` for what serves here; softmax's fused_cpu
            is the standard call. The setting's machine is not used.

    Raises:
        ConfigError: a name that is not among these, or a shape that cannot carry the variant.
        UnsupportedError: ``"fused_cpu"`` where no kernel serves.

    >>> Subject(ModelShape.preset("300K"), "softmax", Setting(context=16, precision="fp32")).setting.batch
    1
    """

    def __init__(self, shape: ModelShape, attention: str, setting: Setting) -> None:
        setting = as_built_here(shape, attention, setting.alone)
        self.shape, self.attention, self.setting = shape, attention, setting
        self.autocasts = setting.precision.autocast
        dtype = _dtype(setting)
        implementation = IMPLEMENTATIONS[setting.backend]
        if setting.backend == "fused_cpu" and VARIANTS[attention].maps == 1:
            implementation = "sdpa"
        elif setting.backend == "fused_cpu" and _serving(shape, attention, dtype) != "fused_cpu":
            raise UnsupportedError("backend='fused_cpu'", "a compiled kernel", "`diffattn doctor` says what fails")
        # One position more than the context, for the token that is decoded behind it.
        config = DiffTransformerConfig.from_shape(
            shape, attention, max_position_embeddings=max(shape.max_position_embeddings, setting.context + 1)
        )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            self.model = DiffTransformerForCausalLM(config)
        if setting.precision.name == "bf16":
            self.model = self.model.bfloat16()
        self.model.set_attn_implementation(implementation)
        if setting.checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                self.model.gradient_checkpointing_enable()
        self.cache_dtype = dtype
        self.ids = torch.randint(0, shape.vocab_size, (setting.batch, setting.context))

    def autocast(self) -> AbstractContextManager[object]:
        """Returns the context in which products run in the precision's dtype."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.autocasts)

    def training(self, repeats: int = 0) -> tuple[int, float]:
        """Returns the peak bytes of a settled training step, and the median of its seconds where it is repeated."""
        # Without this option a model with checkpointing warns at the first step that it makes no cache.
        options = {"use_cache": False} if self.setting.checkpointing else {}
        step = TrainingStep(self.model, self.ids, autocast=self.autocasts, **options)
        # The first step makes the optimizer's state, which the peak of a settled one has from the start.
        step(length=4)
        return step.peak_bytes(), median_seconds(step, repeats, "cpu")

    @torch.no_grad()
    def prefill(self, repeats: int = 0) -> tuple[int, float]:
        """Returns the peak bytes of reading the context into a new cache, and the median of its seconds."""
        model = self.model.eval()

        def read() -> None:
            with self.autocast():
                model(self.ids, use_cache=True, logits_to_keep=1)

        peak = peak_bytes(read, [*model.parameters(), *model.buffers(), self.ids], "cpu")
        return peak, median_seconds(read, repeats, "cpu")

    @torch.no_grad()
    def decoding(self, repeats: int = 0) -> tuple[int, float]:
        """Returns the peak bytes of one token behind a full cache, and the median of its seconds (the cache ready)."""
        model = self.model.eval()
        token = self.ids[:, :1].clone()

        def behind(cache: DynamicCache) -> None:
            with self.autocast():
                model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)

        # The profiler must see the cache begin, to see the old one end as it grows.
        peak = peak_bytes(lambda: behind(self.cache()), [*model.parameters(), *model.buffers(), token], "cpu")
        taken = []
        for _ in range(repeats):
            cache = self.cache()
            began = time.perf_counter()
            behind(cache)
            taken.append(time.perf_counter() - began)
        return peak, statistics.median(taken) if taken else 0.0

    def cache(self) -> DynamicCache:
        """Returns a cache of zeros that holds the context."""
        config = self.model.config
        sizes = (self.setting.batch, config.num_key_value_heads, self.setting.context, config.head_dim)
        cache = DynamicCache(config=config)
        for layer in cache.layers:
            keys, values = (torch.zeros(sizes, dtype=self.cache_dtype) for _ in range(2))
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        return cache

    @torch.no_grad()
    def flops(self) -> int:
        """Returns FLOPs of one forward pass over the context, as torch counts them on the standard path.

        ``FlopCounterMode`` knows no CPU flash kernel, so the call runs as two plain products per head, which it counts
        over all T × T pairs, masked ones included.
        """
        standard = attention_implementation(self.model.eval(), "sdpa")
        with standard, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self.model(self.ids, use_cache=False)
        return int(counter.get_total_flops())


def all_pairs_flops(shape: ModelShape, attention: str, *, batch: int, context: int) -> int:
    """Returns FLOPs of one forward pass on the standard path, masked pairs too, as torch's counter counts them.

    ``flops_per_token`` is ``linear + u·(T + 1)`` with a mean of (T + 1)/2 visible keys; with all T it is
    ``linear + u·2T``.

    Args:
        shape: the softmax Transformer being replaced; for a matched V2, what ``match_parameters`` returned.
        attention: a name in ``VARIANTS``.
        batch: sequences, at least 1.
        context: tokens T in each, at least 1.

    Raises:
        ConfigError: an unknown variant, or one that the shape cannot carry.

    >>> shape = ModelShape.preset("3M")
    >>> all_pairs_flops(shape, "softmax", batch=1, context=1) > flops_per_token(
    ...     shape, "softmax", context=1, phase="forward"
    ... ).executed
    False
    """
    one, two = (flops_per_token(shape, attention, context=T, phase="forward").executed for T in (1, 2))
    return batch * context * (one + (two - one) * 2 * (context - 1))


@dataclass(frozen=True, kw_only=True)
class MeasuredRow:
    """One quantity, as it is predicted and as it is."""

    what: str
    """The name of the quantity."""
    unit: str
    """``"count"``, ``"bytes"``, ``"FLOPs"`` or ``"seconds"``."""
    predicted: float
    """The planner's number, in the unit; seconds are the roofline's, a lower bound."""
    measured: float
    """The number that was found, in the unit."""
    exact: bool
    """True where the two must be equal."""

    @property
    def ratio(self) -> float:
        """The predicted number over the measured one."""
        return self.predicted / self.measured

    def to_json(self) -> dict[str, object]:
        """Returns the fields by name, and the ratio."""
        found = asdict(self)
        exact = found.pop("exact")
        return found | {"ratio": self.ratio, "exact": exact}


def measure_plan(
    shape: ModelShape,
    attention: str,
    setting: Setting,
    *,
    machine: Machine | None = None,
    repeats: int = 3,
    on_stage: OnStage = unseen,
) -> list[MeasuredRow]:
    """Builds a model with random weights, does with it what the planner predicts, and puts both side by side.

    Counts of parameters, bytes of cache and of disk, and FLOPs must be equal (``exact``). Peaks of memory are to be
    within 10%. Seconds are the roofline's, a lower bound that small models do not reach.

    Args:
        shape, attention, setting: as in ``Subject``; the setting's machine is not used.
        machine: the rates of this machine. Default: None, measured now.
        repeats: timed runs; medians are reported. Default: 3.
        on_stage: called with what is being measured.

    Raises:
        ConfigError, UnsupportedError: as ``Subject``; or a training step that this machine's memory cannot hold.

    Source: what is measured, and what is not, is in docs/plan.md.

    >>> setting = Setting(context=32, precision="fp32", backend="fused_cpu")
    >>> rates = Machine("toy", {"fp32": 1e11, "bf16": 1e11}, bandwidth=1e10, disk=1e9)
    >>> rows = measure_plan(ModelShape.preset("300K"), "softmax", setting, machine=rates, repeats=1)
    >>> all(row.ratio == 1 for row in rows if row.exact)
    True
    """
    setting = as_built_here(shape, attention, setting.alone)
    batch, context, precision = setting.batch, setting.context, setting.precision
    step_peak = training_memory(shape, attention, setting).total
    memory = main_memory()
    if step_peak > 0.9 * memory:
        # Without this the system would end the process, and perhaps others, without a word.
        raise ConfigError(
            f"a model whose training step holds {step_peak / 2**30:.1f} GiB",
            f"at most nine tenths of this machine's {memory / 2**30:.1f} GiB, to measure it",
            "take a smaller model, such as 3M, or a shorter context",
        )
    on_stage(Stage("building the model"))
    subject = Subject(shape, attention, setting)
    on_stage(Stage("measuring this machine"))
    rates = measure_machine() if machine is None else machine
    dtype = precision.activations
    # A cost is stated for every backend but the materialised one, whose products are those of the standard call.
    costed = "standard" if setting.backend == "materialised" else setting.backend
    forward = flops_per_token(shape, attention, context=context, phase="forward", backend=costed).executed
    training = flops_per_token(shape, attention, context=context, backend=costed).executed
    stored = weight_bytes(shape, attention, dtype=precision.weights)
    cached = batch * context * cache_bytes_per_token(shape, attention, bytes_per_value=int(BYTES[dtype]))

    rows: list[MeasuredRow] = []

    def row(what: str, unit: str, predicted: float, measured: float, exact: bool = False) -> None:
        rows.append(MeasuredRow(what=what, unit=unit, predicted=predicted, measured=measured, exact=exact))

    def timed(what: str, flops: float, moved: float, measured: float) -> None:
        least = rates.seconds(flops, moved, dtype)
        if least is not None:
            row(what, "seconds", least, measured)

    model = subject.model
    row("parameters", "count", count_parameters(shape, attention).total, model.num_parameters(), True)
    tensors = [tensor for layer in subject.cache().layers for tensor in (layer.keys, layer.values)]
    row("cache", "bytes", cached, sum(tensor.nbytes for tensor in tensors), True)
    del tensors
    if not precision.autocast:
        # Which casts inside the counter as well, and counts the same.
        row("forward", "FLOPs", all_pairs_flops(shape, attention, batch=batch, context=context), subject.flops(), True)

    on_stage(Stage("measuring the reading of a prompt"))
    prefill_peak, prefill_seconds = subject.prefill(repeats)
    on_stage(Stage("measuring the writing of a token"))
    decoding_peak, decoding_seconds = subject.decoding(repeats)
    row("prefill peak", "bytes", prefill_memory(shape, attention, setting).total, prefill_peak)
    timed("prefill", batch * context * forward, stored, prefill_seconds)
    row("decoding peak", "bytes", decoding_memory(shape, attention, setting).total, decoding_peak)
    # The new token sees the whole context; the cache is read once.
    linear = all_pairs_flops(shape, attention, batch=batch, context=1)
    timed("decoding one token", linear, stored + cached, decoding_seconds)

    on_stage(Stage("measuring how the model is saved and loaded"))
    on_disk, load_seconds = _save_and_load(model, repeats)
    row("disk", "bytes", stored, on_disk, True)
    read_seconds = rates.read_seconds(stored)
    if read_seconds is not None:
        row("load", "seconds", read_seconds, load_seconds)

    on_stage(Stage("measuring a training step"))
    training_peak, step_seconds = subject.training(repeats)
    row("training peak", "bytes", step_peak, training_peak)
    timed("training step", batch * context * (training + (forward if setting.checkpointing else 0)), 0, step_seconds)
    return rows


def _dtype(setting: Setting) -> torch.dtype:
    """Returns the dtype of queries, keys and values."""
    return torch.float32 if setting.precision.name == "fp32" else torch.bfloat16


def as_built_here(shape: ModelShape, attention: str, setting: Setting) -> Setting:
    """Returns the setting as this machine's processor runs it, with the backend that serves there for ``"auto"``.

    Raises:
        ConfigError: no model can be built here in this setting.

    >>> as_built_here(ModelShape.preset("300K"), "softmax", Setting(precision="fp32")).backend
    'standard'
    """
    precision = setting.precision.name
    given = f"precision={precision!r}" if precision else "a format of a single part, such as --weights-dtype"
    if precision not in _PRECISIONS:
        raise ConfigError(
            given,
            "for a model that is built, one of float32, autocast, bfloat16",
            "pass one of them as --dtype alone",
        )
    backend = setting.backend
    if backend == AUTO:
        backend = _serving(shape, attention, _dtype(setting))
    if backend not in IMPLEMENTATIONS:
        raise ConfigError(
            f"backend={backend!r}",
            f"for a model that is built, one of {', '.join(IMPLEMENTATIONS)}",
            "pass one of them as --backend",
        )
    return replace(setting, backend=backend, machine=None)


def _save_and_load(model: DiffTransformerForCausalLM, repeats: int) -> tuple[int, float]:
    """Returns the bytes of the tensors in the saved files, and the median of the seconds to load them from disk."""
    with tempfile.TemporaryDirectory() as name:
        model.save_pretrained(name)
        files = sorted(Path(name).glob("*.safetensors"))
        size = 0
        for file in files:
            places = (entry["data_offsets"] for entry in check_safetensors(file).values())
            size += sum(end - begin for begin, end in places)
        taken = []
        for _ in range(max(1, repeats)):
            for file in files:
                forget(file)
            began = time.perf_counter()
            DiffTransformerForCausalLM.from_pretrained(name)
            taken.append(time.perf_counter() - began)
    return size, statistics.median(taken)


def _serving(shape: ModelShape, attention: str, dtype: torch.dtype) -> str:
    shared = VARIANTS[attention].signals_per_noise(shape)
    return serving_backend(attention, "cpu", dtype, shape.head_dim, shared)
