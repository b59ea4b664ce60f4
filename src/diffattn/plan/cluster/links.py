"""Clusters: a number of equal machines, the hosts in which they stand, and the links between them with sources."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import NamedTuple

from diffattn.errors import ConfigError
from diffattn.plan.hardware import Machine, load_machine
from diffattn.plan.shape import check_positive_int
from diffattn.quantities import short

# Bytes in a unit of bandwidth: capital B is a byte, b is a bit.
_UNITS = {"GB/s": 1e9, "GBps": 1e9, "TB/s": 1e12, "MB/s": 1e6, "Gb/s": 1e9 / 8, "Gbps": 1e9 / 8, "Gbit/s": 1e9 / 8}


class Links(NamedTuple):
    """The links of a machine as its maker's servers have them: bytes per second each way, for each GPU."""

    per_host: int
    inside: float
    between: float
    source: str


LINKS: dict[str, Links] = {
    "H100 SXM": Links(
        8,
        450e9,
        50e9,
        "NVIDIA H100 data sheet: NVLink 900 GB/s, both ways together; DGX H100 data sheet: 8 GPUs, and for each a "
        "ConnectX-7 with 400 Gb/s InfiniBand",
    ),
    "A100 80GB": Links(
        8,
        300e9,
        25e9,
        "NVIDIA A100 data sheet: NVLink 600 GB/s, both ways together; DGX A100 data sheet: 8 GPUs, and for each a "
        "ConnectX-6 with 200 Gb/s InfiniBand",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Equal machines that train together.

    >>> parse_cluster("64xH100").hosts
    8
    """

    machine: Machine
    """The machine, of which each rank has one."""
    count: int
    """The number of machines, and of ranks."""
    per_host: int
    """The machines in one host."""
    inside: float
    """Bytes per second between two machines of a host, each way."""
    between: float
    """Bytes per second of each machine to other hosts, each way."""
    source: str
    """The sources of the links' numbers."""

    @property
    def hosts(self) -> int:
        """The number of hosts."""
        return self.count // self.per_host

    @property
    def name(self) -> str:
        """The cluster as it is written."""
        return f"{self.count}x{self.machine.name}"

    def seconds(self, size: float, ranks: int, apart: int) -> float:
        """Returns the least seconds in which each of ``ranks`` ranks gets what the others have of ``size`` bytes.

        Each receives size·(r − 1)/r over its own links. Where the ranks stand in h > 1 hosts, size·(h − 1)/h has to
        come into each host, over the links of those of them that stand in it. A sum over ranks that leaves each with a
        part of it moves as much, and one that leaves each with all of it twice as much.

        Args:
            size: bytes of the whole.
            ranks: ranks of the group.
            apart: the distance of two neighbours of the group among all ranks; 1 where they stand side by side.

        >>> parse_cluster("16xH100").seconds(450e9, 8, 1)
        0.875
        """
        if ranks == 1:
            return 0.0
        together = max(1, min(ranks, self.per_host // apart))
        hosts = ranks // together
        if hosts == 1:
            return size * (ranks - 1) / ranks / self.inside
        into_hosts = size * (hosts - 1) / hosts / (together * self.between)
        return max(into_hosts, size * (ranks - 1) / ranks / (self.inside + self.between))

    def to_json(self) -> dict[str, object]:
        """Returns the fields by name."""
        return asdict(self) | {"name": self.name, "hosts": self.hosts}


def parse_cluster(
    text: str, *, per_host: int | None = None, inside: str | None = None, between: str | None = None
) -> Cluster:
    """Reads a cluster as it is written: a number, ``x`` and a machine's name.

    Args:
        text: such as ``"64xH100"`` or ``"16 x A100 80GB"``.
        per_host: machines in a host. Default: as the maker's servers have, or fewer where there are fewer.
        inside, between: the links' bandwidths, such as ``"450GB/s"``. Default: those of ``LINKS``.

    Raises:
        ConfigError: text that is no cluster, a machine without known links, or hosts that are not full.
    """
    match = re.fullmatch(r"\s*([0-9]+)\s*[x×*]\s*(\S.*?)\s*", text, re.I)
    if match is None:
        raise ConfigError(f"cluster {short(text)}", "a number, x and a machine, such as 64xH100", "write it like that")
    count, machine = int(match[1]), load_machine(match[2])
    check_positive_int("the number of machines", count, most=1_000_000)
    known = LINKS.get(machine.name)
    if known is None and (per_host is None or inside is None or between is None):
        raise ConfigError(
            f"a cluster of {machine.name}, whose links are not known",
            "how many stand in a host, and the bandwidths in it and between hosts",
            "pass --per-host, --link-inside and --link-between",
        )
    if machine.flops is None or machine.bandwidth is None or machine.memory is None:
        raise ConfigError(
            f"machine {machine.name!r} in a cluster", "its rates and its memory", "add flops, bandwidth and memory"
        )
    host = per_host or min(count, known.per_host if known else count)
    if count % host:
        raise ConfigError(
            f"{count} machines, {host} in each host", "hosts that are full", f"take {-(-count // host) * host}"
        )
    given = [words for words, value in (("inside a host", inside), ("between hosts", between)) if value is not None]
    source = known.source if known else ""
    return Cluster(
        machine=machine,
        count=count,
        per_host=host,
        inside=parse_rate(inside, "link-inside") if inside else known.inside if known else 0.0,
        between=parse_rate(between, "link-between") if between else known.between if known else 0.0,
        source="; ".join([*([source] if source else []), *(f"{words}: as given" for words in given)]),
    )


def parse_rate(text: str, name: str) -> float:
    """Reads a bandwidth with its unit and returns bytes per second.

    Raises:
        ConfigError: no number above 0, or no unit that is known.

    >>> parse_rate("400Gb/s", "link"), parse_rate("450 GB/s", "link")
    (50000000000.0, 450000000000.0)
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z/]+)\s*", text)
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise ConfigError(
            f"{name} {short(text)}",
            f"a number above 0 and one of {', '.join(_UNITS)}",
            "write it such as 450GB/s or 400Gb/s, where B is a byte and b a bit",
        )
    return float(match[1]) * _UNITS[match[2]]
