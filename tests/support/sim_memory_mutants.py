"""Mutants of ownership: ranges given back too early or twice, leases that die too soon, keys that come back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any
from unittest.mock import MagicMock

import torch

from gpu_cache.index.entry import Entry
from gpu_cache.index.index import ShardIndex
from gpu_cache.pool import block
from gpu_cache.pool.block import Copy, Quarantine, Range
from gpu_cache.pool.lease import Lease
from gpu_cache.pool.slab import SlabPool
from tests.support.sim_mutant import Mutants

MEMORY_MUTANTS = Mutants()
_mutant = MEMORY_MUTANTS.enter

# Ranges.


@_mutant("an abandoned range skips quarantine", SlabPool, "abandon")
def _abandon(original: Any, self: SlabPool, taken: Range) -> None:
    if not (rest := taken.rest).nbytes:
        return
    with self._lock:
        self._pending_bytes -= rest.nbytes
        self._quarantine[Quarantine([rest], events=[])] = None
        self._quarantined_bytes += rest.nbytes
    self.drain()


@_mutant("a range given back twice", SlabPool, "_settle")
def _twice(original: Any, self: SlabPool, done: Sequence[Quarantine]) -> None:
    with self._lock:
        again = [freed for one in done if one in self._quarantine for freed in one.ranges]
    original(self, done)
    for freed in again:
        freed.slab.free.give(freed.offset, freed.nbytes)


@_mutant("a run given back while a shard of it lives", SlabPool, "carve")
def _whole_run(original: Any, self: SlabPool, *args: Any) -> list[Copy]:
    """Its first shard's lease stands for all of it, and those of the others never fire."""
    landings = original(self, *args)
    first, *others = [landing.lease for landing in landings]
    for lease in others:
        first.nbytes += lease.nbytes
        del lease.slab.leases[lease.offset]
    for landing, lease in zip(landings[1:], others, strict=True):
        landing.lease = MagicMock(slab=lease.slab, offset=lease.offset, nbytes=lease.nbytes)
    return landings


@_mutant("a dead shard gives back its living neighbour", SlabPool, "_collect")
def _neighbour_too(original: Any, self: SlabPool) -> None:
    given = self.__dict__.setdefault("given", [])  # leases whose bytes went with a neighbour's
    dead = [self._freed.popleft() for _ in range(len(self._freed))]
    for lease in [one for one in dead if not any(one is other for other in given)]:
        after = lease.slab.leases.get(lease.offset + lease.nbytes)
        if after is not None and after() is not None:
            del lease.slab.leases[after.offset]
            lease.nbytes += after.nbytes
            given.append(after)
        self._freed.append(lease)
    original(self)


# Leases.


@_mutant("a lease on the tensor of a plain slice", block, "carve")
def _plain_lease(
    original: Any,
    arena: torch.UntypedStorage,
    offset: int,
    nbytes: int,
    template: torch.Tensor,
    shape: tuple[int, ...],
    fired: Callable[[Lease], None],
) -> tuple[torch.Tensor, None, Lease]:
    whole = torch.empty(0, dtype=torch.uint8).set_(arena)
    tensor = whole[offset : offset + nbytes].view(template.dtype).view(shape)
    return tensor, None, Lease(tensor, fired)  # type: ignore[arg-type]


@_mutant("a lease on the public storage", block, "carve", torch="2.9.")
def _public_lease(
    original: Any,
    arena: torch.UntypedStorage,
    offset: int,
    nbytes: int,
    template: torch.Tensor,
    shape: tuple[int, ...],
    fired: Callable[[Lease], None],
) -> tuple[torch.Tensor, None, Lease]:
    storage = arena[offset : offset + nbytes]
    tensor = template.new().set_(storage, 0, shape)
    return tensor, None, Lease(storage, fired)


# Keys.


@_mutant("publish without the generation check", ShardIndex, "publish")
def _any_generation(
    original: Any, self: ShardIndex, landings: Iterable[tuple[Entry, Copy]], *rest: Any, **options: Any
) -> None:
    pairs = list(landings)
    with self._lock:
        for entry, _ in pairs:
            self._entries[entry.key] = entry
    original(self, pairs, *rest, **options)
