"""The paths that are timed side by side: each a function, and what must be so before and after it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from areal.infra.rpc import RTensor
from bench.beside import Beside, busy_python, busy_torch
from bench.exactness import Original
from bench.json_client import JsonClient
from bench.owner import Owner
from bench.raw_socket import RawReceiver
from bench.trainer import Trainer
from bench.workloads import Workload

NUM_THREADS = 4


def _nothing(*_: object) -> None:
    pass


@dataclass(frozen=True)
class Path:
    """One way of bringing a batch, or of doing away with it.

    Attributes:
        name: Short, for tables.
        run: What is timed; takes what `prepare` returned.
        check: Raises if the result of `run` is wrong.
        nbytes: Of the batch, or of the part of it that `run` brings.
        num_shards: Likewise.
        prepare: Before `run`, untimed.
        finish: After `run`, untimed.
        is_transfer: Whether bytes move, so that bytes per second mean something.
        is_reading: Whether tensors or bytes are there afterwards, so that its speed can be compared with others'.
        beside: Work that another thread does meanwhile.
    """

    name: str
    run: Callable[[Any], Any]
    check: Callable[[Any], None]
    nbytes: int
    num_shards: int
    prepare: Callable[[], Any] = _nothing
    finish: Callable[[], None] = _nothing
    is_transfer: bool = True
    is_reading: bool = True
    beside: Beside | None = None


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

    def check(self, path: str, original: Original, tensors: Sequence[torch.Tensor]) -> None:
        """Raise `BenchError` unless the tensors are what was sent."""
        step = len(self.names)
        groups = [tensors[at : at + step] for at in range(0, len(tensors), step)]
        batch: list[Mapping[str, torch.Tensor]] = [dict(zip(self.names, group, strict=True)) for group in groups]
        original.check_batch(path, batch, self.num_trajectories)


@contextlib.contextmanager
def open_paths(
    workload: Workload, owner: Owner, trainer: Trainer, original: Original, json_bytes: float
) -> Iterator[tuple[list[Path], JsonPart]]:
    """All paths that every device has, and what the JSON one brings; connections go when the context is left."""
    offer = owner.offer
    raw, client = RawReceiver(offer.raw_location), JsonClient(offer.address)
    with contextlib.closing(raw), contextlib.closing(client), ThreadPoolExecutor(NUM_THREADS) as threads:
        part = JsonPart.of(workload, client, offer.shard_ids, json_bytes)
        json = Path("json", part.fetch, partial(part.check, "json", original), part.nbytes, len(part.shard_ids))
        handles = _handle_paths(workload, owner, trainer, original, threads)
        yield [*_byte_paths(workload, raw, original), json, *handles], part


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
        return Path(name, run, partial(original.check_bytes, name), workload.nbytes, workload.num_shards)

    return [path("raw", receive), path("memcpy", lambda _: copied.copy_(original.joined))]


def _handle_paths(
    workload: Workload, owner: Owner, trainer: Trainer, original: Original, threads: ThreadPoolExecutor
) -> list[Path]:
    """What users call."""
    all_of_it = (workload.nbytes, workload.num_shards)

    def path(name: str, run: Callable[[Any], Any], prepare: Callable[[], Any], **more: Any) -> Path:
        check = partial(original.check_batch, name, num_trajectories=len(workload.lengths))
        return Path(name, run, check, *all_of_it, prepare, **more)

    def cold(name: str, run: Callable[[Any], Any] = RTensor.localize, **more: Any) -> Path:
        return path(name, run, trainer.uncached_handles, **more)

    return [
        cold("cold"),
        cold("cold4", partial(trainer.localize_in_parts, threads, NUM_THREADS)),
        cold("prefetch", trainer.prefetch_and_localize),
        path("warm", RTensor.localize, trainer.cached_handles, is_transfer=False),
        path("localized", RTensor.localize, trainer.localized_handles, is_transfer=False),
        Path(
            "clear",
            trainer.clear,
            trainer.check_cleared,
            *all_of_it,
            trainer.cached_handles,
            owner.restore,
            is_transfer=False,
            is_reading=False,
        ),
        cold("cold_busy_python", beside=busy_python()),
        cold("cold_busy_torch", beside=busy_torch(trainer.device)),
    ]
