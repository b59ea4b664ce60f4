"""The ranks of one run: how they meet, agree, wait for the first, and end together, so that none is left waiting.

They talk through the key-value store that torchrun keeps (rank 0 keeps one where nothing else does). Each rank has a
thread that looks for the word that a rank has failed. The first that fails says why, all others stay silent, and all
end with its exit status. What is computed goes through PyTorch's process group, whose operations have a time limit.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from diffattn.errors import ConfigError, DiffattnError, TrainingError, one_line
from diffattn.rank import Rank, rank_here

PATIENCE = timedelta(minutes=10)
"""The time in which all ranks have to be there, the limit of each operation in which all take part, and how long the
rank that others wait for may give no sign of life."""
# How often a rank looks for the word of a failure, and how long a rank that was told of one may take to end.
_LOOK, _GRACE = 0.2, 5.0
_FAILED, _NOTICED = "failed", "noticed"
# A wrapper that accelerate was told to put around the model, and which our runs do not take from it.
_WRAPPERS = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM":
             "Megatron-LM"}  # fmt: skip
_T = TypeVar("_T")


class EndedError(DiffattnError):
    """Ends this rank because another has failed, and has said why."""

    def __init__(self, rank: int, status: int) -> None:
        super().__init__(f"rank {rank} has failed", "a rank that has not", "read what it said")
        self.rank, self.status = rank, status


class LostError(TrainingError):
    """Another rank ended without a word, or does not answer."""


class Ranks:
    """The ranks of a run as one of them sees them; the only one sees itself alone."""

    def __init__(self, rank: Rank, store: dist.Store | None = None) -> None:
        self.rank = rank
        self._store = store
        self._asked = itertools.count()

    @property
    def is_first(self) -> bool:
        """True on the rank that writes the run folder and speaks."""
        return self.rank.is_first

    @property
    def world(self) -> int:
        """The number of ranks."""
        return self.rank.world

    def share(self, act: Callable[[], _T]) -> _T:
        """Does something on rank 0 and returns its result, which JSON can hold, on every rank.

        The others wait as long as it takes and rank 0 is alive.

        Raises:
            DiffattnError: on rank 0 what ``act`` raises; the others end by :class:`EndedError` then.
        """
        return self._by(0, self.is_first, act)

    def first_on_host(self, act: Callable[[], _T]) -> _T:
        """Does something on each rank, on the first of each host before all others of it, which then find it done."""
        leader = self.rank.number - self.rank.local
        if self.rank.local == 0:
            done = act()
            self._by(leader, True, lambda: None)
            return done
        self._by(leader, False, lambda: None)
        return act()

    def any(self, flag: bool) -> bool:
        """Returns on every rank whether one of them gives True."""
        if self._store is None:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def mean(self, total: float, count: int) -> float:
        """Returns the sum of all ranks' totals over that of their counts, on every rank."""
        if self._store is None:
            return total / count
        both = torch.tensor([total, count], dtype=torch.float64)
        dist.all_reduce(both)
        return float(both[0] / both[1])

    def _by(self, leader: int, leads: bool, act: Callable[[], _T]) -> _T:
        if self._store is None:
            return act()
        key = f"asked/{next(self._asked)}/{leader}"
        if leads:
            value = act()
            self._store.set(key, json.dumps(value))
            return value
        beats, heard = b"", time.monotonic()
        while not self._store.check([key]):
            time.sleep(0.02)
            pulse = _store(self.rank)
            now = pulse.get(f"beat/{leader}") if pulse.check([f"beat/{leader}"]) else b""
            if now != beats:
                beats, heard = now, time.monotonic()
            if time.monotonic() - heard > PATIENCE.total_seconds():
                raise lost(f"rank {leader} gave no sign of life for {PATIENCE.total_seconds():.0f} s")
        found: _T = json.loads(self._store.get(key))
        return found


ALONE = Ranks(Rank())
_here: Ranks | None = None
# A process may join several times, one after another, and what was said before must not be heard again.
_times = itertools.count()
# The status with which another rank has failed, once this one knows.
_told: int | None = None


def ranks() -> Ranks:
    """Returns the ranks that this process has joined; outside of :func:`joined` it is the only one."""
    return _here or ALONE


@contextlib.contextmanager
def joined(device: str = "cpu", agree: Mapping[str, object] | None = None) -> Iterator[Ranks]:
    """Joins the other ranks for as long as the block lasts; a process that is the only one does nothing.

    Inside of another such block it returns the same ranks. Where a process group exists already, as in a worker of Ray,
    it is used, and whoever made it ends the ranks.

    Args:
        device: the device that the ranks train on, ``cpu`` or ``cuda``.
        agree: options that have to be the same on every rank, by their names, as JSON can hold them.

    Raises:
        ConfigError: a rank that did not come, other options on another rank, no GPU for each rank of this host.
        TrainingError: a rank that was lost on the way.
    """
    global _here
    rank = rank_here()
    _check_wrappers()
    if _here is not None or rank.world == 1:
        yield ranks()
        return
    ours = not dist.is_initialized()
    store = dist.PrefixStore(f"joined/{next(_times)}", _store(rank))
    _here = Ranks(rank, store)
    try:
        with _Watch(rank):
            _meet(rank, store)
            _agree(_here, store, agree or {})
            if ours:
                _make_group(rank, device, store)
            yield _here
            # None leaves before all have come so far, since its end would look like a failure to them.
            _here.any(False)
    except RuntimeError as error:
        # The group stays until this process ends. Without it the others would fail before they are told why.
        if isinstance(error, DiffattnError) or not _is_of_ranks(error):
            raise
        raise lost(one_line(error, 160)) from error
    else:
        if ours:
            dist.destroy_process_group()
    finally:
        _here = None


def tell(status: int, say: Callable[[], None]) -> int:
    """Says why this rank ends, once among all ranks, and returns the status with which it has to end.

    Rank 0 comes first where several fail at once. It waits until the others know, so that whoever started the ranks
    does not end them before.
    """
    rank = rank_here()
    if rank.world == 1:
        say()
        return status
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    mine = json.dumps([rank.number, status]).encode()
    # The status of the rank that failed first, once this one knows.
    heard = _told
    # Nobody keeps the store any more where the rank that kept it was killed, or has ended before this one.
    with contextlib.suppress(RuntimeError, ConfigError):
        store = _store(rank)
        if not rank.is_first:
            time.sleep(1.0)
        first = store.compare_set(_FAILED, "", mine.decode())
        heard = int(json.loads(first)[1])
        if first == mine:
            say()
        store.add(_NOTICED, 1)
        until = time.monotonic() + _GRACE
        while store.add(_NOTICED, 0) < rank.world and time.monotonic() < until:
            time.sleep(0.05)
    if heard is None:
        say()
        return status
    return heard


def lost(what: str) -> LostError:
    """Returns the error of a rank that ended without a word, or that does not answer."""
    return LostError(
        f"another rank has ended or does not answer ({what})",
        "all ranks until the run ends",
        "go on from the last checkpoint with --resume, on any number of ranks",
    )


def _is_of_ranks(error: RuntimeError) -> bool:
    words = ("gloo", "nccl", "connection", "timed out", "timeout", "process group", "socket", "broken pipe")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)


def _check_wrappers() -> None:
    """Raises where accelerate was told to wrap the model: it would not, and nobody would know."""
    for name, wrapper in _WRAPPERS.items():
        if os.environ.get(name, "").lower() in ("1", "true"):
            raise ConfigError(
                f"{name} is set: accelerate is to wrap the model in {wrapper}",
                "ranks that torchrun starts, since accelerate wraps nothing here",
                "start with torchrun, and spread the model with --shard and --tp",
            )


_stores: dict[int, dist.Store] = {}


def _store(rank: Rank, *, anew: bool = False) -> dist.Store:
    """Returns the store of these ranks, which torchrun keeps, or else rank 0; over a connection of its own if anew."""
    # A forked process must not use the connection of its parent.
    found = _stores.get(os.getpid())
    if found is not None and not anew:
        return found
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdigit():
        raise ConfigError(
            f"{rank.world} ranks, with MASTER_ADDR={host!r} and MASTER_PORT={port!r}",
            "the address and the port at which the ranks meet",
            "start with torchrun, which sets both",
        )
    kept_elsewhere = anew or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or dist.is_initialized()
    try:
        plain = dist.TCPStore(
            host, int(port), rank.world, is_master=rank.is_first and not kept_elsewhere, timeout=PATIENCE,
            wait_for_workers=False,
        )  # fmt: skip
    # PyTorch's errors of the network.
    except RuntimeError as error:
        raise ConfigError(
            f"rank {rank.number} cannot reach {host}:{port} ({one_line(error, 160)})",
            "an address and a free port that all hosts reach",
            "check --rdzv-endpoint or --master-addr of torchrun, and the network",
        ) from error
    # After a restart by torchrun the words of the ranks before are no longer true.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"diffattn/{attempt}", plain)
    return store if anew else _stores.setdefault(os.getpid(), store)


def _make_group(rank: Rank, device: str, store: dist.Store) -> None:
    backend = "gloo"
    if device == "cuda":
        if not dist.is_nccl_available():
            raise ConfigError("PyTorch without nccl", "a build with it for ranks on GPUs", "pass --device cpu")
        if (count := torch.cuda.device_count()) < rank.per_host:
            raise ConfigError(
                f"{rank.per_host} ranks on a host with {count} GPUs",
                "a GPU for each rank",
                f"start torchrun with --nproc-per-node {max(count, 1)}, or pass --device cpu",
            )
        torch.cuda.set_device(rank.local)
        backend = "cpu:gloo,cuda:nccl"
    group = dist.PrefixStore("group", store)
    dist.init_process_group(backend, store=group, rank=rank.number, world_size=rank.world, timeout=PATIENCE)


def _meet(rank: Rank, store: dist.Store) -> None:
    """Waits until all ranks are there. PyTorch would wait too, but could not be told of a failure meanwhile."""
    until = time.monotonic() + PATIENCE.total_seconds()
    store.add("here", 1)
    while (here := store.add("here", 0)) < rank.world:
        if time.monotonic() > until:
            raise ConfigError(
                f"{here} of {rank.world} ranks came within {PATIENCE.total_seconds():.0f} s",
                "all of them",
                "check that every host was started, with the same command",
            )
        time.sleep(0.02)


def _agree(ranks: Ranks, store: dist.Store, mine: Mapping[str, object]) -> None:
    """Raises on rank 0 where another rank has another option; the others end by that."""
    versions = {f"the version of {name}": importlib.metadata.version(name) for name in ("diffattn", "torch")}
    said = json.loads(json.dumps({**versions, **mine}, default=str))
    store.set(f"options/{ranks.rank.number}", json.dumps(said))

    def compare() -> None:
        for number in range(1, ranks.world):
            other = json.loads(store.get(f"options/{number}"))
            for name in sorted(said.keys() | other.keys()):
                if said.get(name) != other.get(name):
                    raise ConfigError(
                        f"{name} is {said.get(name)!r} on rank 0 and {other.get(name)!r} on rank {number}",
                        "the same options on every rank",
                        "start all ranks by one command, with one environment",
                    )

    ranks.share(compare)


class _Watch:
    """The thread of a rank that looks for the word of a failure and says that the rank is alive."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        # An operation of the store that waits must not keep the other thread.
        self._store = _store(rank, anew=True)
        # Python runs what a signal asks for in the main thread alone. Where a run is in another, as in a worker of Ray,
        # whoever started it ends it.
        self._in_main = threading.current_thread() is threading.main_thread()
        self._over = threading.Event()
        self._ended: EndedError | None = None
        self._thread = threading.Thread(target=self._look, name="ranks", daemon=True)
        self._before: Any = None

    def __enter__(self) -> _Watch:
        if self._in_main:
            self._before = signal.signal(signal.SIGUSR1, self._end)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if self._in_main:
            signal.signal(signal.SIGUSR1, self._before)

    def _end(self, number: int, frame: FrameType | None) -> None:
        if self._ended is not None and not self._over.is_set():
            raise self._ended

    def _look(self) -> None:
        rank = self._rank
        with contextlib.suppress(RuntimeError):
            for beat in itertools.count():
                if self._over.wait(_LOOK):
                    return
                if rank.local == 0:
                    self._store.set(f"beat/{rank.number}", str(beat))
                if self._store.check([_FAILED]):
                    break
            failed, status = json.loads(self._store.get(_FAILED))
            if failed == rank.number or not self._in_main:
                return
            global _told
            _told = status
            self._ended = EndedError(failed, status)
            main = threading.main_thread().ident
            assert main is not None
            # It interrupts Python; an operation of all ranks fails by itself once the rank that failed has ended.
            signal.pthread_kill(main, signal.SIGUSR1)
            if self._over.wait(_GRACE / 2):
                return
            self._store.add(_NOTICED, 1)
            # A library that is being imported may have swallowed it.
            signal.pthread_kill(main, signal.SIGUSR1)
            if not self._over.wait(_GRACE):
                os._exit(status)
