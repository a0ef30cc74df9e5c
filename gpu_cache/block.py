"""Slabs, ranges and freed ranges: the records that the pool keeps, and how a range becomes shards."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence

import torch

from gpu_cache.config import aligned
from gpu_cache.device import Arena, Event
from gpu_cache.entry import Landing
from gpu_cache.freelist import FreeList
from gpu_cache.lease import Lease, carve, plain_tensors
from gpu_cache.source import ShardSpec


@dataclasses.dataclass(slots=True, eq=False)
class Slab:
    """One arena cut into blocks. Fields are guarded by the slab lock."""

    arena: Arena
    free: FreeList
    is_overflow: bool = False  # beyond the pool's cap: holds one run and is released with it
    leases: dict[int, Lease] = dataclasses.field(default_factory=dict)  # by offset, kept until they fire

    @property
    def nbytes(self) -> int:
        return self.free.capacity


@dataclasses.dataclass(slots=True, eq=False)
class Range:
    """Consecutive bytes of a slab. While PENDING they belong to the thread that receives into them."""

    slab: Slab
    offset: int
    nbytes: int


@dataclasses.dataclass(slots=True, eq=False)
class Quarantine:
    """Ranges freed together; reusable when every event is done."""

    ranges: Sequence[Range | Lease]
    events: list[Event] | None = None  # None: not yet recorded


def carve_shard(taken: Range, spec: ShardSpec, offset: int, freed: deque[Lease]) -> tuple[Landing, Lease]:
    """The tensor of one shard, `offset` bytes into its run's range, and the lease that gives its bytes back."""
    start = taken.offset + offset
    base, lease = carve(taken.slab.arena.tensor, start, spec.nbytes, spec.dtype, spec.shape, freed)
    lease.key, lease.slab, lease.offset, lease.nbytes = spec.key, taken.slab, start, aligned(spec.nbytes)
    return Landing(spec.key, base, lease, spec.nbytes), lease


def empty_landings(specs: Sequence[ShardSpec], device: torch.device) -> list[Landing]:
    """Tensors of shards without bytes; they take no room."""
    with plain_tensors():
        return [Landing(s.key, torch.empty(s.shape, dtype=s.dtype, device=device), None, 0) for s in specs]
