"""Machines that a model may run on: peak rates, memory and disk, each with the vendor's data sheet that states them.

The rates are peaks. Real work reaches a part of them, so a time computed from them is a lower bound.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from diffattn.config_fields import is_number
from diffattn.errors import ConfigError, one_line
from diffattn.files import parse_json
from diffattn.names import one_of, plain

GiB = 1024**3
RATED_DTYPES = ("fp32", "bf16", "fp16")
# Beyond this a rate is a slip, and what is computed from it no number.
_FASTEST = 1e30
# Said before a name on boxes and by drivers.
_VENDORS = ("nvidia", "geforce", "amd")


@dataclass(frozen=True)
class Machine:
    """The most that a machine can do.

    Args:
        name: what it is called.
        flops: FLOP/s of dense matrix products by the dtype of the inputs: fp32, bf16 and fp16, each above 0; None:
            unknown, and so are all times.
        bandwidth: bytes per second between memory and processor; None: unknown.
        memory: bytes that a program can fill; None: unknown.
        disk: bytes per second of reading a large file; None: unknown.
        source: where the numbers come from.
        chip: of a GPU its architecture, as compilers name it, such as ``"sm_90"``; it says which backend serves there.
            None: a processor.

    Raises:
        ConfigError: a rate that is not above 0, or a dtype without one.

    >>> machine = Machine("toy", {"fp32": 1e9, "bf16": 2e9, "fp16": 2e9}, bandwidth=1e9, memory=GiB, disk=1e8)
    >>> machine.seconds(4e9, 1e9, "bf16")
    2.0
    """

    name: str
    flops: Mapping[str, float] | None = field(default=None, hash=False)
    bandwidth: float | None = None
    memory: int | None = None
    disk: float | None = None
    source: str = ""
    chip: str | None = None

    def __post_init__(self) -> None:
        for key in ("bandwidth", "memory", "disk"):
            _check_rate(self.name, key, getattr(self, key))
        if self.flops is not None:
            if not isinstance(self.flops, Mapping) or not {"fp32", "bf16"} <= set(self.flops) <= set(RATED_DTYPES):
                raise ConfigError(
                    f"machine {self.name!r} has flops={self.flops!r}",
                    "FLOP/s for fp32 and bf16 (and fp16, else that of bf16)",
                    "write them as an object of these names",
                )
            for dtype, rate in self.flops.items():
                _check_rate(self.name, f"flops of {dtype}", rate)
            object.__setattr__(self, "flops", {"fp16": self.flops["bf16"], **self.flops})

    def seconds(self, flops: float, moved: float, dtype: str) -> float | None:
        """Returns the least seconds of work, by the roofline; None: a rate is unknown.

        ``max(flops / rate, moved / bandwidth)``.

        Source: Williams, Waterman, Patterson, "Roofline" (2009).
        """
        if self.flops is None or self.bandwidth is None:
            return None
        return max(flops / self.flops[dtype], moved / self.bandwidth)

    def read_seconds(self, size: float) -> float | None:
        """Returns the least seconds to read a file of ``size`` bytes; None: the disk is unknown."""
        return None if self.disk is None else size / self.disk

    def to_json(self) -> dict[str, object]:
        """Returns the fields by name, as ``load_machine`` reads them from a file."""
        return asdict(self)


def _check_rate(name: str, key: str, value: object) -> None:
    if value is None:
        return
    if not is_number(value) or not 0 < value <= _FASTEST:
        raise ConfigError(
            f"machine {name!r} has {key}={value!r}",
            "a number above 0 and at most 1e30, or null",
            "correct it, or write null where it is unknown",
        )


def _rates(fp32: float, half: float, bf16: float | None = None) -> dict[str, float]:
    return {"fp32": fp32, "bf16": half if bf16 is None else bf16, "fp16": half}


# Disks are not part of the data sheets: one NVMe drive of the bus that the machine has is assumed.
MACHINES: dict[str, Machine] = {
    "H100 SXM": Machine(
        "H100 SXM",
        _rates(67e12, 989e12),
        3.35e12,
        80 * GiB,
        7e9,
        "NVIDIA H100 Tensor Core GPU data sheet: FP32 67 and BF16 989 TFLOP/s dense, 3.35 TB/s; disk: PCIe 4 NVMe, "
        "assumed 7 GB/s",
        "sm_90",
    ),
    "A100 80GB": Machine(
        "A100 80GB",
        _rates(19.5e12, 312e12),
        2.039e12,
        80 * GiB,
        7e9,
        "NVIDIA A100 data sheet (80GB SXM): FP32 19.5 and BF16 312 TFLOP/s dense, 2,039 GB/s; disk: PCIe 4 NVMe, "
        "assumed 7 GB/s",
        "sm_80",
    ),
    "RTX 4090": Machine(
        "RTX 4090",
        _rates(82.6e12, 165.2e12),
        1.008e12,
        24 * GiB,
        7e9,
        "NVIDIA Ada GPU architecture whitepaper, appendix A: FP32 82.6, BF16 with FP32 accumulate 165.2 TFLOP/s dense, "
        "1,008 GB/s; disk: PCIe 4 NVMe, assumed 7 GB/s",
        "sm_89",
    ),
    "RTX 3060 12GB": Machine(
        "RTX 3060 12GB",
        _rates(12.74e12, 25.5e12),
        3.6e11,
        12 * GiB,
        3.5e9,
        "NVIDIA GeForce RTX 3060 specifications: 3,584 cores at 1.78 GHz (12.7 TFLOP/s), 360 GB/s; BF16 with FP32 "
        "accumulate twice that, as in the GA102 whitepaper; disk: PCIe 3 NVMe, assumed 3.5 GB/s",
        "sm_86",
    ),
    "Apple M2": Machine(
        "Apple M2",
        _rates(3.6e12, 3.6e12),
        1e11,
        16 * GiB,
        3e9,
        "Apple newsroom, 6 June 2022: 10-core GPU with 3.6 TFLOP/s, 100 GB/s; memory: the 16 GB model; half precision "
        "at the rate of float32; disk: assumed 3 GB/s",
    ),
    "DDR5 desktop": Machine(
        "DDR5 desktop",
        _rates(0.9728e12, 0.9728e12, 1.9456e12),
        8.32e10,
        32 * GiB,
        5e9,
        "AMD Ryzen 7 7700 specifications: 8 cores, 3.8 GHz base, AVX-512 (32 float32 FLOPs per cycle and core, BF16 "
        "twice that), two channels of DDR5-5200 (83.2 GB/s); memory 32 GB and disk 5 GB/s assumed",
    ),
    "Raspberry Pi 5": Machine(
        "Raspberry Pi 5",
        _rates(153.6e9, 307.2e9, 153.6e9),
        1.7e10,
        8 * GiB,
        4.5e8,
        "Raspberry Pi 5 product brief: 4 Cortex-A76 cores at 2.4 GHz, 32-bit LPDDR4X-4267 (17 GB/s), the 8 GB model, "
        "PCIe 2.0 x1 (assumed 450 MB/s from NVMe); Arm Cortex-A76 Software Optimization Guide: two pipes of 128 bits, "
        "so 16 float32 FLOPs per cycle and core, twice that in FP16, no BF16; what is reached: docs/small_machines.md",
    ),
}

# The names by which NVIDIA's driver calls these cards. An H200 is an H100 with more and faster memory, and has its
# rates of arithmetic.
_BY_DRIVER = {
    "NVIDIA H100 80GB HBM3": "H100 SXM",
    "NVIDIA H200": "H100 SXM",
    "NVIDIA A100-SXM4-80GB": "A100 80GB",
    "NVIDIA A100 80GB PCIe": "A100 80GB",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
    "NVIDIA GeForce RTX 3060": "RTX 3060 12GB",
}


def card_flops(name: str) -> Mapping[str, float] | None:
    """Returns the peak FLOP/s of a card by dtype, as :class:`Machine` has them; None for a card that is not known.

    Args:
        name: what the driver calls the card, such as ``torch.cuda.get_device_name()``. Only whole names are known,
            since cards of one chip differ in their rates: an H100 for PCIe is slower than one for SXM.

    >>> card_flops("NVIDIA A100-SXM4-80GB")["bf16"], card_flops("NVIDIA H100 PCIe")
    (312000000000000.0, None)
    """
    return MACHINES[_BY_DRIVER[name]].flops if name in _BY_DRIVER else None


def load_machine(name_or_path: str | Path) -> Machine:
    """Returns a machine by its name or a part of it, in any case, or from a JSON file with the fields of ``Machine``.

    Raises:
        ConfigError: neither a known name nor a file, a part that several names have; a file that is no JSON object; an
            unknown or impossible key.

    >>> load_machine("rtx4090").bandwidth, load_machine("RTX 3060").name
    (1008000000000.0, 'RTX 3060 12GB')
    """
    text = str(name_or_path)
    if not text.endswith(".json") and not (os.path.isfile(text) and plain(text) not in map(plain, MACHINES)):
        words = [word for word in text.split() if word.casefold() not in _VENDORS]
        return MACHINES[
            one_of(" ".join(words), MACHINES, given=f"machine {text!r}", way_out="; or give the path of a .json file")
        ]
    try:
        values = parse_json(Path(text).read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else one_line(error)
        raise ConfigError(f"machine {text!r} cannot be read ({reason})", "a JSON file", "correct the file") from error
    return machine_from(values, name=Path(text).stem)


def machine_from(values: Any, *, name: str) -> Machine:
    """Returns a machine from the object of a JSON file; ``name`` is used where it gives none.

    Raises:
        ConfigError: no object, or an unknown or impossible key.

    >>> machine_from({"disk": 1e9}, name="mine").read_seconds(5e8)
    0.5
    """
    keys = [one.name for one in fields(Machine)]
    if not isinstance(values, dict):
        raise ConfigError(f"machine {name!r} is {values!r}", "a JSON object", f"write one with {', '.join(keys)}")
    for key in values:
        if key not in keys:
            raise ConfigError(f"machine {name!r} has the unknown key {key!r}", f"one of {', '.join(keys)}", "rename it")
    for key in ("name", "source"):
        if not isinstance(values.get(key, ""), str):
            raise ConfigError(f"machine {name!r} has {key}={values[key]!r}", "text", "put it in quotes")
    if not isinstance(values.get("chip"), str | None):
        raise ConfigError(
            f"machine {name!r} has chip={values['chip']!r}",
            "the name of a GPU's architecture, such as sm_90, or null",
            "put it in quotes, or write null for a processor",
        )
    return Machine(**{"name": name, **values})
