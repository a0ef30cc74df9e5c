"""Mutants of order: waits that are missing, events in the wrong place, fences with holes."""

from __future__ import annotations

import time
from typing import Any

from gpu_cache.config import ReadyMode
from gpu_cache.device.protocol import Event, Stream
from gpu_cache.pool.block import Quarantine
from gpu_cache.pool.completion import Completion
from gpu_cache.pool.fence import StreamFence
from gpu_cache.pool.slab import SlabPool
from gpu_cache.transfer.engine import Engine
from gpu_cache.transfer.inflight import Turn
from gpu_cache.transfer.runs import Piece
from gpu_cache.transfer.staging import Slot, StagingRing
from gpu_cache.transfer.transfer import Delivery
from tests.support.sim_mutant import Mutants

ORDER_MUTANTS = Mutants()
_mutant = ORDER_MUTANTS.enter

# Hand-out.


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


# Release.


@_mutant("no quarantine", StreamFence, "record")
def _no_quarantine(original: Any, self: StreamFence) -> list[Event]:
    return []


@_mutant("release events recorded at hand-out", Engine, "settle")
def _at_hand_out(original: Any, self: Engine, completions: Any, ready: ReadyMode) -> None:
    original(self, completions, ready)
    events = None if self.device.is_capturing() else StreamFence.record(self.fence)
    if events is not None:
        self.fence.record = lambda: events  # type: ignore[method-assign]


@_mutant("a release event on the default stream only", StreamFence, "_streams")
def _default_stream(original: Any, self: StreamFence) -> list[Stream]:
    return original(self)[:1]


@_mutant("a release event on one of two streams that read", StreamFence, "_streams")
def _one_of_two(original: Any, self: StreamFence) -> list[Stream]:
    reading = [stream for stream in self._device.fence_streams() if stream.queue]
    return [stream for stream in original(self) if stream not in reading[1:2]]


@_mutant("a release event on the wrong stream", StreamFence, "record")
def _wrong_stream(original: Any, self: StreamFence) -> list[Event]:
    return [self._device.record(self._device.current_stream())]


@_mutant("a release event on the stream of the copies", StreamFence, "_streams")
def _copy_stream(original: Any, self: StreamFence) -> list[Stream]:
    return list(self._noted)[:1]


@_mutant("a fence without the noted streams", StreamFence, "note")
def _none_noted(original: Any, self: StreamFence, stream: Stream) -> None:
    pass


@_mutant("a fence that skips a stream under capture", StreamFence, "record")
def _skips_captured(original: Any, self: StreamFence) -> list[Event]:
    return [self._device.record(one) for one in self._streams() if not self._device.is_any_capturing([one])]


@_mutant("release events recorded and queried under capture", SlabPool, "drain")
def _drains_in_capture(original: Any, self: SlabPool) -> None:
    self._settle([one for one in self._fenced() if all(map(self._device.query, one.events or ()))])


@_mutant("any release event instead of all", SlabPool, "drain")
def _any_event(original: Any, self: SlabPool) -> None:
    if not self._device.is_capturing():
        self._settle([one for one in self._fenced() if any(map(self._device.query, one.events or ()))])


@_mutant("only the first release event is waited for", SlabPool, "_wait_for")
def _first_event(original: Any, self: SlabPool, one: Quarantine) -> None:
    for event in (one.events or ())[:1]:
        self._device.synchronize(event)


@_mutant("events of the first drain guard later drops", SlabPool, "_fenced")
def _stale_events(original: Any, self: SlabPool) -> list[Quarantine]:
    held = original(self)
    for one in held:
        one.events = self.__dict__.setdefault("first_events", one.events)
    return held


# Copies.


@_mutant("the copies' event recorded before them", Delivery, "_receive")
def _early_event(original: Any, self: Delivery, *args: Any) -> Completion:
    return _receive_marked(self, *args, before=0)


@_mutant("the copies' event recorded behind the first", Delivery, "_receive")
def _first_copy(original: Any, self: Delivery, *args: Any) -> Completion:
    return _receive_marked(self, *args, before=1)


def _receive_marked(self: Delivery, window: list[Piece], *, before: int) -> Completion:
    """`_receive` as it is, but for the place of the event: before the copy of that number, at the latest at the end."""
    assert self._staging is not None
    stream = self._transfer.stream
    slot = self._staging.acquire(max(0.0, self._deadline - time.monotonic()), self._turn)
    try:
        self._reader.read_into([view for piece in window for view in piece.buffers(slot.pinned.view)])
        for number, piece in enumerate(window):
            if number == before:
                slot.guard = self._device.record(stream, timing=True)
            arena, begin = piece.place
            pair = arena[begin:][: piece.nbytes], slot.pinned.tensor[piece.at :][: piece.nbytes]
            self._device.copy_all([pair], stream)
        slot.guard = guard = slot.guard or self._device.record(stream, timing=True)
    finally:
        self._staging.release(slot)
    return Completion(self._device, guard)


@_mutant("copies on streams that no fence knows", Delivery, "_receive")
def _other_stream(original: Any, self: Delivery, *args: Any) -> Any:
    completion = original(self, *args)
    self._transfer.stream = self._device.new_stream()
    return completion


# Staging.


@_mutant("a slot guarded by nothing", StagingRing, "acquire")
def _no_guard(original: Any, self: StagingRing, timeout_s: float, turn: Turn) -> Slot:
    slot = self._reserve(timeout_s, turn) or self._allocate()
    slot.guard = None
    return slot


@_mutant("a slot guarded by its previous copy", StagingRing, "release")
def _previous_copy(original: Any, self: StagingRing, slot: Slot) -> None:
    if slot.guard is not None:
        slot.guard, self.__dict__[slot] = self.__dict__.get(slot), slot.guard
    original(self, slot)


@_mutant("a slot guarded by the previous slot's copy", StagingRing, "release")
def _other_copy(original: Any, self: StagingRing, slot: Slot) -> None:
    if slot.guard is not None:
        slot.guard, self.__dict__["copy"] = self.__dict__.get("copy"), slot.guard
    original(self, slot)
