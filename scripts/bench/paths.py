"""The paths that are timed side by side: each a function, and what must be so before and after it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from areal.infra.rpc import RTensor
from bench.exactness import check_batch, check_bytes
from bench.json_client import JsonClient
from bench.owner import Owner
from bench.raw_socket import RawReceiver
from bench.trainer import Trainer
from bench.workloads import Workload

# The JSON form is slow: so many bytes of a workload are fetched, and the seconds scaled.
_JSON_BYTES = 28_000_000


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
    """

    name: str
    run: Callable[[Any], Any]
    check: Callable[[Any], None]
    nbytes: int
    num_shards: int
    prepare: Callable[[], Any] = _nothing
    finish: Callable[[], None] = _nothing
    is_transfer: bool = True


@contextlib.contextmanager
def open_paths(workload: Workload, owner: Owner, device: str) -> Iterator[list[Path]]:
    """All paths of a workload; memory and connections go when the context is left."""
    trainer = Trainer(workload, owner.offer.handles, device)
    raw, client = RawReceiver(owner.offer.raw_location), JsonClient(owner.offer.address)
    with contextlib.closing(trainer), contextlib.closing(raw), contextlib.closing(client):
        yield [
            *_byte_paths(workload, raw),
            _json_path(workload, client, owner.offer.shard_ids),
            *_handle_paths(workload, owner, trainer),
        ]
        trainer.check_pool()


def _byte_paths(workload: Workload, raw: RawReceiver) -> list[Path]:
    """What a socket and the memory can do: all bytes at once, no shards."""
    received = torch.ones(workload.nbytes, dtype=torch.uint8)
    copied = torch.ones(workload.nbytes, dtype=torch.uint8)
    raw.receive(received.numpy().data)

    def receive(_: None) -> torch.Tensor:
        raw.receive(received.numpy().data)
        return received

    def path(name: str, run: Callable[[None], torch.Tensor]) -> Path:
        return Path(name, run, partial(check_bytes, name, workload), workload.nbytes, workload.num_shards)

    return [path("raw", receive), path("memcpy", lambda _: copied.copy_(received))]


def _json_path(workload: Workload, client: JsonClient, shard_ids: list[str]) -> Path:
    """As many trajectories as `_JSON_BYTES` allow, at least one."""
    per_trajectory = len(workload.layout)
    num_trajectories = nbytes = 0
    for length in workload.lengths:
        if nbytes >= _JSON_BYTES:
            break
        num_trajectories, nbytes = num_trajectories + 1, nbytes + sum(workload.trajectory_bytes(length))
    wanted = shard_ids[: num_trajectories * per_trajectory]

    def check(tensors: list[torch.Tensor]) -> None:
        groups = (tensors[at : at + per_trajectory] for at in range(0, len(tensors), per_trajectory))
        check_batch("json", workload, (dict(zip(workload.layout, group, strict=True)) for group in groups))

    return Path("json", lambda _: client.fetch(wanted), check, nbytes, len(wanted))


def _handle_paths(workload: Workload, owner: Owner, trainer: Trainer) -> list[Path]:
    """What users call."""

    def path(name: str, run: Callable[[Any], Any], prepare: Callable[[], Any], *, is_transfer: bool = False) -> Path:
        check = partial(check_batch, name, workload)
        return Path(name, run, check, workload.nbytes, workload.num_shards, prepare, is_transfer=is_transfer)

    return [
        path("cold", RTensor.localize, trainer.uncached_handles, is_transfer=True),
        path("prefetch", trainer.prefetch_and_localize, trainer.uncached_handles, is_transfer=True),
        path("warm", RTensor.localize, trainer.cached_handles),
        path("localized", RTensor.localize, trainer.localized_handles),
        Path(
            "clear",
            trainer.clear,
            trainer.check_cleared,
            workload.nbytes,
            workload.num_shards,
            trainer.cached_handles,
            owner.restore,
            is_transfer=False,
        ),
    ]
