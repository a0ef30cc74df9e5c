"""The paths that are timed side by side: each a function, and what must be so before and after it."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench.beside import PYTHON, TORCH, Beside, busy
from bench.exactness import BenchError, Original
from bench.json_client import JsonClient
from bench.owner import Owner
from bench.raw_socket import RawReceiver
from bench.trainer import NUM_SINGLE, Trainer
from bench.workloads import Workload
from gpu_cache.rpc import RTensor, runtime
from gpu_cache.rpc.rtensor import ClearReport

# What a row's name begins with: the cache's settings are a user's defaults, or everything is preallocated.
DEFAULTS, TUNED = "defaults", "tuned"
SAME_HOST = "samehost"  # at defaults, from the owner's memory; the others come over HTTP
# Hits of flat lists: of AReaL's own code, and of this project; and of a dict of tensors, which they are compared with.
HITS = OWN_HITS, LOCALIZE_HITS, GET_MANY_HITS = "areal/own_hits", f"{DEFAULTS}/hits", f"{DEFAULTS}/hits_get_many"
REFERENCE = "areal/hits"
_OWN_ADDRESS = "127.0.0.1:9"  # of handles that none reads
# Rows that are worth a look with everything preallocated too.
_TUNED_ROWS = ("cold", "warm", "clear")


def _nothing(*_: object) -> None:
    pass


@dataclass(frozen=True)
class Path:
    """One way of bringing a batch, or of doing away with it.

    Attributes:
        name: Short, for tables.
        run: What is timed; takes what `prepare` returned.
        check: Raises if the result of `run` is wrong; takes the path's name and the result.
        nbytes: Of the batch, or of the part of it that `run` brings.
        num_shards: Likewise.
        prepare: Before `run`, untimed.
        finish: After `run`, untimed.
        is_transfer: Whether bytes move, so that bytes per second mean something.
        is_reading: Whether tensors or bytes are there afterwards, so that its speed can be compared with others'.
        beside: Work that another thread does meanwhile.
        quiet: The path that does the same with nothing beside it.
        reason: Why it cannot run; "" if it can.
    """

    name: str
    run: Callable[[Any], Any]
    check: Callable[[str, Any], None]
    nbytes: int
    num_shards: int
    prepare: Callable[[], Any] = _nothing
    finish: Callable[[], None] = _nothing
    is_transfer: bool = True
    is_reading: bool = True
    beside: Beside | None = None
    quiet: str | None = None
    reason: str = ""

    @classmethod
    def unavailable(cls, name: str, reason: str) -> Path:
        """One that cannot run here."""
        return cls(name, _nothing, _nothing, 0, 0, reason=reason)

    def besides(self, kind: str, device: str) -> Path:
        """The same beside a thread of this kind."""
        return dataclasses.replace(self, name=f"{self.name}+{kind}", beside=busy(kind, device), quiet=self.name)


def variants(paths: Sequence[Path], device: str) -> list[Path]:
    """Each path quiet, beside a Python thread, and beside a torch thread."""
    found = []
    for path in paths:
        found.append(path)
        if not path.reason:
            found += [path.besides(kind, device) for kind in (PYTHON, TORCH)]
    return found


def selected(paths: Sequence[Path], patterns: Sequence[str]) -> list[Path]:
    """The paths whose names match one of the patterns, as file names would."""
    return [path for path in paths if any(fnmatch.fnmatchcase(path.name, pattern) for pattern in patterns)]


@dataclass(frozen=True)
class JsonPart:
    """The first trajectories of a workload, as many as the slow JSON form is given to bring.

    Args:
        client: Brings them.
        shard_ids: Theirs.
        names: Of the tensors of one.
        nbytes: Of all of them.
    """

    client: JsonClient
    shard_ids: Sequence[str]
    names: Sequence[str]
    nbytes: int

    @property
    def num_trajectories(self) -> int:
        """How many they are."""
        return len(self.shard_ids) // len(self.names)

    @classmethod
    def of(cls, workload: Workload, client: JsonClient, shard_ids: Sequence[str], least_bytes: float) -> JsonPart:
        """As many as have `least_bytes`, or all."""
        number = nbytes = 0
        for length in workload.lengths:
            if nbytes >= least_bytes:
                break
            number, nbytes = number + 1, nbytes + sum(workload.trajectory_bytes(length))
        return cls(client, shard_ids[: number * len(workload.layout)], list(workload.layout), nbytes)

    def fetch(self, _: object = None) -> list[torch.Tensor]:
        """Their tensors, in order."""
        return self.client.fetch(self.shard_ids)

    def check(self, original: Original, path: str, tensors: Sequence[torch.Tensor]) -> None:
        """Raise `BenchError` unless the tensors are what was sent."""
        step = len(self.names)
        groups = [tensors[at : at + step] for at in range(0, len(tensors), step)]
        batch: list[Mapping[str, torch.Tensor]] = [dict(zip(self.names, group, strict=True)) for group in groups]
        original.check_batch(path, batch, self.num_trajectories)


@dataclass(frozen=True)
class Trainers:
    """Caches for one workload: as a user gets it, with everything preallocated, and that reads the owner's memory."""

    defaults: Trainer
    tuned: Trainer
    same_host: Trainer


@contextlib.contextmanager
def open_paths(
    workload: Workload, owner: Owner, trainers: Trainers, original: Original, json_bytes: float
) -> Iterator[tuple[list[Path], JsonPart]]:
    """All paths that every device has, and what the JSON one brings; connections go when the context is left."""
    offer = owner.offer
    raw, client = RawReceiver(offer.raw_location), JsonClient(offer.address)
    with contextlib.closing(raw), contextlib.closing(client):
        part = JsonPart.of(workload, client, offer.shard_ids, json_bytes)
        json = Path("json", part.fetch, partial(part.check, original), part.nbytes, len(part.shard_ids))
        socket, memory = _byte_paths(workload, raw, original)
        paths = [*variants([socket], trainers.tuned.device), memory, json]
        paths += variants(_handle_paths(DEFAULTS, workload, owner, trainers.defaults, original), trainers.tuned.device)
        cold, *others = selected(
            _handle_paths(TUNED, workload, owner, trainers.tuned, original), [f"{TUNED}/{name}" for name in _TUNED_ROWS]
        )
        whole, one = _same_host_paths(workload, trainers.same_host, original)
        yield [*paths, *variants([cold, whole], trainers.tuned.device), *others, one], part


def storing_path(workload: Workload, trainer: Trainer, original: Original) -> Path:
    """An owner's part: the batch stored in this process, a copy of each tensor."""
    batch = list(workload.trajectories())
    store = runtime.current().store

    def check(name: str, handles: Sequence[Mapping[str, RTensor]]) -> None:
        found = [{key: store[one.shard.shard_id] for key, one in of.items()} for of in handles]
        original.check_batch(name, found, len(batch))

    return Path(
        f"{DEFAULTS}/remotize",
        lambda _: RTensor.remotize(batch, _OWN_ADDRESS),
        check,
        workload.nbytes,
        workload.num_shards,
        trainer.select,
        store.clear,
        is_transfer=False,
        is_reading=False,
    )


def _byte_paths(workload: Workload, raw: RawReceiver, original: Original) -> list[Path]:
    """What a socket and the memory can do: all bytes at once, no shards."""
    received = torch.ones(workload.nbytes, dtype=torch.uint8)
    copied = torch.ones(workload.nbytes, dtype=torch.uint8)
    raw.receive(received.numpy().data)  # warm; and the check is to see bytes that came after it
    received.fill_(1)

    def receive(_: None) -> torch.Tensor:
        raw.receive(received.numpy().data)
        return received

    def path(name: str, run: Callable[[None], torch.Tensor]) -> Path:
        return Path(name, run, original.check_bytes, workload.nbytes, workload.num_shards)

    return [path("raw", receive), path("memcpy", lambda _: copied.copy_(original.joined))]


def _same_host_paths(workload: Workload, trainer: Trainer, original: Original) -> list[Path]:
    """A whole batch in one call, and small shards in a call each, from the owner's memory."""
    check = partial(original.check_batch, num_trajectories=len(workload.lengths))
    sizes = {"nbytes": workload.nbytes, "num_shards": workload.num_shards}
    smallest = sorted(workload.shard_bytes)[:NUM_SINGLE]

    def check_each(name: str, tensors: Sequence[torch.Tensor]) -> None:
        if (found := [tensor.nbytes for tensor in tensors]) != smallest:
            raise BenchError(f"{name}: {found} bytes, not {smallest}")

    return [
        Path(f"{SAME_HOST}/cold", RTensor.localize, check, prepare=trainer.uncached_handles, **sizes),
        Path(
            f"{SAME_HOST}/one",
            lambda handles: [RTensor.localize(handle) for handle in handles],
            check_each,
            workload.nbytes,
            NUM_SINGLE,
            trainer.small_uncached_handles,
            is_transfer=False,
            is_reading=False,
        ),
    ]


def _handle_paths(settings: str, workload: Workload, owner: Owner, trainer: Trainer, original: Original) -> list[Path]:
    """What users call."""
    check = partial(original.check_batch, num_trajectories=len(workload.lengths))

    def check_step(name: str, report: ClearReport) -> None:
        """The step has dropped what it read: look at what another one reads last."""
        trainer.check_cleared(name, report)
        owner.restore()
        (batch,) = deque(trainer.reads(trainer.step_handles()), maxlen=1)
        check(name, batch)

    def path(name: str, run: Callable[[Any], Any], prepare: Callable[[], Any], **more: Any) -> Path:
        sizes = {"nbytes": workload.nbytes, "num_shards": workload.num_shards}
        return Path(f"{settings}/{name}", run, prepare=prepare, **{"check": check, **sizes, **more})

    hot: dict[str, Any] = {"is_transfer": False}
    ends: dict[str, Any] = {"is_transfer": False, "is_reading": False, "finish": owner.restore}
    return [
        path("cold", RTensor.localize, trainer.uncached_handles),
        path("warm", RTensor.localize, trainer.cached_handles, **hot),
        path("localized", RTensor.localize, trainer.localized_handles, **hot),
        path("clear", trainer.clear, trainer.cached_handles, check=trainer.check_cleared, **ends),
        path("step", trainer.step, trainer.step_handles, check=check_step, **ends),
    ]
