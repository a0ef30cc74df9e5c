"""Ordering and accounting bugs, each one method of `gpu_cache` written wrongly."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from gpu_cache import block
from gpu_cache.block import Quarantine, Range
from gpu_cache.device import Event, Stream
from gpu_cache.entry import Entry, Landing
from gpu_cache.fence import StreamFence
from gpu_cache.index import ShardIndex
from gpu_cache.lease import Lease
from gpu_cache.slab import SlabPool
from gpu_cache.source import ShardReader
from gpu_cache.staging import Slot, StagingRing
from gpu_cache.transfer import Completion, Piece, Transfer


@dataclasses.dataclass(frozen=True)
class Mutant:
    """`owner.name` replaced by what `make` makes of it."""

    title: str
    owner: Any
    name: str
    make: Callable[[Any], Callable[..., Any]]

    def replacement(self, calls: list[None]) -> Callable[..., Any]:
        """The broken method; each call of it is noted."""
        broken = self.make(getattr(self.owner, self.name))

        def method(*args: Any, **kwargs: Any) -> Any:
            calls.append(None)
            return broken(*args, **kwargs)

        return method


MUTANTS: list[Mutant] = []


def _mutant(title: str, owner: Any, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function of the original method, and what that is called with."""

    def enter(broken: Callable[..., Any]) -> Callable[..., Any]:
        def make(original: Any) -> Callable[..., Any]:
            return lambda *args, **kwargs: broken(original, *args, **kwargs)

        MUTANTS.append(Mutant(title, owner, name, make))
        return broken

    return enter


@_mutant("no wait at hand-out, ready on the host", Completion, "wait_host")
def _no_wait_host(original: Any, self: Completion) -> None:
    pass


@_mutant("no wait at hand-out, ready on the stream", Completion, "wait_on")
def _no_wait_on(original: Any, self: Completion, stream: Stream) -> None:
    pass


@_mutant("ready remembered after a stream's wait", Completion, "wait_on")
def _remembered(original: Any, self: Completion, stream: Stream) -> None:
    original(self, stream)
    self._event = None


@_mutant("no quarantine", StreamFence, "record")
def _no_quarantine(original: Any, self: StreamFence) -> list[Event]:
    return []


@_mutant("a fence on the default stream only", StreamFence, "_streams")
def _one_stream(original: Any, self: StreamFence) -> list[Stream]:
    return original(self)[:1]


@_mutant("a fence without the noted streams", StreamFence, "note")
def _none_noted(original: Any, self: StreamFence, stream: Stream) -> None:
    pass


@_mutant("any event of a fence is enough", SlabPool, "drain")
def _any_event(original: Any, self: SlabPool) -> None:
    self._collect()
    self._settle([one for one in self._fenced() if any(map(self._device.query, one.events or ()))])


@_mutant("only the first event of a fence is waited for", SlabPool, "synchronize")
def _first_event(original: Any, self: SlabPool) -> None:
    self._collect()
    held = self._fenced()
    for one in held:
        for event in (one.events or ())[:1]:
            self._device.synchronize(event)
    self._settle(held)


@_mutant("events of the first drain guard later drops", SlabPool, "_fenced")
def _stale_events(original: Any, self: SlabPool) -> list[Quarantine]:
    held = original(self)
    for one in held:
        one.events = self.__dict__.setdefault("first_events", one.events)
    return held


@_mutant("an abandoned range skips quarantine", SlabPool, "abandon")
def _abandon(original: Any, self: SlabPool, taken: Range) -> None:
    if not (rest := taken.rest).nbytes:
        return
    with self._lock:
        self._pending_bytes -= rest.nbytes
        self._quarantine[Quarantine([rest], events=[])] = None
        self._quarantined_bytes += rest.nbytes
    self.drain()


@_mutant("the copies' event is recorded before them", Transfer, "_receive")
def _early_event(original: Any, self: Transfer, *args: Any) -> Completion:
    return _receive_marked(self, *args, before=0)


@_mutant("the copies' event is recorded behind the first", Transfer, "_receive")
def _first_copy(original: Any, self: Transfer, *args: Any) -> Completion:
    return _receive_marked(self, *args, before=1)


def _receive_marked(
    self: Transfer, reader: ShardReader, window: list[Piece], deadline: float, *, before: int
) -> Completion:
    """`_receive` as it is, but for the place of the event: before the copy of that number, at the latest at the end."""
    assert self._staging is not None
    slot = self._staging.acquire(max(0.0, deadline - time.monotonic()))
    try:
        staged = slot.pinned.view
        reader.read_into([v for piece in window for v in piece.buffers(staged[piece.at : piece.at + piece.nbytes])])
        slot.started = self._device.record(self.stream, timing=True)
        for number, piece in enumerate(window):
            if number == before:
                slot.guard = self._device.record(self.stream, timing=True)
            self._device.copy_async(piece.arena_bytes(), slot.pinned.tensor[piece.at :][: piece.nbytes], self.stream)
        slot.guard = guard = slot.guard or self._device.record(self.stream, timing=True)
    finally:
        self._staging.release(slot, num_copies=len(window))
    return Completion(self._device, guard)


@_mutant("copies on streams that no fence knows", Transfer, "_receive")
def _other_stream(original: Any, self: Transfer, reader: ShardReader, window: list[Piece], deadline: float) -> Any:
    completion = original(self, reader, window, deadline)
    self.stream = self._device.new_stream()
    return completion


@_mutant("a slot guarded by nothing", StagingRing, "acquire")
def _no_guard(original: Any, self: StagingRing, timeout_s: float) -> Slot:
    slot = self._reserve(timeout_s) or self._allocate()
    slot.guard = None
    return slot


@_mutant("publish without a look at the generation", ShardIndex, "publish")
def _any_generation(
    original: Any, self: ShardIndex, landings: Iterable[tuple[Entry, Landing]], node: str, completion: Any
) -> None:
    pairs = list(landings)
    with self._lock:
        for entry, _ in pairs:
            self._entries[entry.key] = entry
    original(self, pairs, node, completion)


@_mutant("a range given back twice", SlabPool, "_settle")
def _twice(original: Any, self: SlabPool, done: Sequence[Quarantine]) -> None:
    with self._lock:
        again = [freed for one in done if one in self._quarantine for freed in one.ranges]
    original(self, done)
    for freed in again:
        freed.slab.free.give(freed.offset, freed.nbytes)


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


@_mutant("a lease on the tensor of a plain slice", block, "carve")
def _plain_lease(
    original: Any,
    arena: torch.UntypedStorage,
    offset: int,
    nbytes: int,
    template: torch.Tensor,
    shape: tuple[int, ...],
    freed: deque[Lease],
) -> tuple[torch.Tensor, Lease]:
    whole = torch.empty(0, dtype=torch.uint8).set_(arena)
    tensor = whole[offset : offset + nbytes].view(template.dtype).view(shape)
    return tensor, Lease(tensor, freed.append)  # type: ignore[arg-type]
