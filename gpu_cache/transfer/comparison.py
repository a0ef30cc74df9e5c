"""Refetched shards beside what readers made of them: compared on the device, and told when the host sees the result."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Iterable

import torch

from gpu_cache.config import aligned
from gpu_cache.device.bitwise import differing
from gpu_cache.device.modes import plain_tensors
from gpu_cache.device.protocol import Device, Event, Stream
from gpu_cache.index.entry import Entry
from gpu_cache.pool.block import Range
from gpu_cache.pool.fence import StreamFence
from gpu_cache.pool.lease import aliases_of
from gpu_cache.pool.slab import SlabPool


@dataclasses.dataclass(slots=True, eq=False)
class Comparison:
    """Of one shard. Holds both blocks until it is over."""

    entry: Entry
    aliases: list[torch.Tensor]  # of the new block and the old one: held, so no victims
    are_parked: list[bool]  # those in the host tier
    tell: Callable[[Entry, Exception | None], None]
    event: Event | None = None  # behind it; None: not yet enqueued
    differs: Callable[[], bool] | None = None  # to be asked when `event` is done
    copies: list[Range] = dataclasses.field(default_factory=list)  # on the device, of those in the host tier


class Comparisons:
    """Compares on a stream of its own, behind everything that may still write into the blocks.

    The trainer waits for none of it: what a comparison finds is told by whoever looks next, at the latest the reaper.
    Two blocks of the host tier are compared by whoever that is.

    Args:
        device: Where the blocks are.
        fence: Knows the streams that may have written, and learns of this one, so that no block that is being compared
            is reused.
        pool: On the device. What is in the host tier is copied there, if the other block is there and there is room.
    Thread-safety: any thread; each comparison belongs to whoever took it out of the deque.
    """

    def __init__(self, device: Device, fence: StreamFence, pool: SlabPool) -> None:
        self._device, self._fence, self._pool = device, fence, pool
        self._pending: deque[Comparison] = deque()  # those that nobody looks at just now
        self._open: dict[Comparison, None] = {}  # those that were not told yet
        self._stream: Stream | None = None

    @property
    def is_busy(self) -> bool:
        """Whether anything is yet to be told."""
        return bool(self._open)

    def begin(self, pairs: Iterable[tuple[Entry, Entry]], tell: Callable[[Entry, Exception | None], None]) -> None:
        """Compare entries that arrived with those that they replaced; others are left out.

        Args:
            pairs: New and old ones.
            tell: Told each old one that differs; with an error, one that could not be compared. By any thread.
        """
        for new, old in pairs:
            base, before = new.place.base, old.place.base
            if base is None or before is None or base is before:
                continue
            if (base.dtype, base.shape) != (before.dtype, before.shape):
                tell(old, None)
            else:
                are_parked = [entry.parked is not None for entry in (new, old)]
                one = Comparison(old, aliases_of([base, before]), are_parked, tell)
                self._open[one] = None
                self._pending.append(one)
        self.look()

    def look(self) -> None:
        """Enqueue what could not be yet, and tell of what is done. Not during CUDA graph capture."""
        if not self._pending or self._device.is_capturing():
            return
        mine: list[Comparison] = []
        with contextlib.suppress(IndexError):  # another thread took the rest
            for _ in range(len(self._pending)):
                mine.append(self._pending.popleft())
        fresh = [one for one in mine if one.differs is None]
        try:
            self._enqueue(fresh)
        except RuntimeError as error:  # of the device
            self._give_up(fresh, error)
        mine = [one for one in mine if one in self._open]
        for one in mine:
            if self._is_over(one):
                self._end(one)
            else:
                self._pending.append(one)

    def finish(self) -> None:
        """Wait for what was enqueued, and tell of it. Not during CUDA graph capture."""
        self.look()
        for one in list(self._open):
            if one.event is not None:
                self._device.synchronize(one.event)
        self.look()

    def _enqueue(self, fresh: list[Comparison]) -> None:
        if not fresh or (events := self._fence.record()) is None:  # a stream is being captured: another time
            return
        if self._stream is None:
            self._stream = self._device.new_stream()
            self._fence.note(self._stream)
        for event in events:  # also those behind the copies, whose stream the fence knows
            self._device.wait(self._stream, event)
        with plain_tensors():
            for one in fresh:
                try:
                    one.event, one.differs = self._compare(one, self._stream)
                except RuntimeError as error:  # such as no memory for the result
                    self._give_up([one], error)

    def _compare(self, one: Comparison, stream: Stream) -> tuple[Event, Callable[[], bool]]:
        left, right = (alias.reshape(-1).view(torch.uint8) for alias in one.aliases)
        if all(one.are_parked):  # by the host, behind the writes: it takes nothing of the device
            return self._device.record(stream), lambda: bool(differing(left, right))
        if any(one.are_parked) and left.numel():
            left, right = (self._on_device(one, number, flat) for number, flat in enumerate((left, right)))
        differs = self._device.compare_async(left, right, stream)
        return self._device.record(stream), differs

    def _on_device(self, one: Comparison, number: int, flat: torch.Tensor) -> torch.Tensor:
        """The bytes of one of the two, copied to the device if they are not there."""
        if not one.are_parked[number]:
            return flat
        if (room := self._pool.take_free(aligned(flat.numel()))) is None:
            raise RuntimeError(f"the pool has no free range for {flat.numel():,} bytes to be compared in")
        one.copies.append(room)
        copied = room.slab.arena.tensor[room.offset :][: flat.numel()]
        self._device.copy_async(copied, flat, self._stream)
        return copied

    def _give_up(self, some: Iterable[Comparison], error: Exception) -> None:
        for one in [one for one in some if one in self._open]:
            one.tell(one.entry, error)
            self._end(one)

    def _end(self, one: Comparison) -> None:
        del self._open[one]
        for room in one.copies:  # behind the fence
            self._pool.abandon(room)

    def _is_over(self, one: Comparison) -> bool:
        """Whether its result is known, and was told."""
        try:
            if one.differs is None or not self._device.query(one.event):
                return False
            if one.differs():
                one.tell(one.entry, None)
        except RuntimeError as error:
            one.tell(one.entry, error)
        return True
