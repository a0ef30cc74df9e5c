"""Reader -> staging -> slab, run by run.

A run is consecutive shards, placed as one range and copied by one call. A window is what one read receives.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol, TypeAlias, cast

import torch

from gpu_cache.config import ALIGNMENT, CacheConfig
from gpu_cache.device.hostmem import copy_on_host
from gpu_cache.device.modes import COPY, FETCH, STAGE, plain_tensors, profiled
from gpu_cache.device.protocol import Device, Event, Stream
from gpu_cache.pool.block import Copy, Range, empty_copies
from gpu_cache.pool.completion import Completion
from gpu_cache.pool.slab import SlabPool
from gpu_cache.process import no_collections
from gpu_cache.source import LendingReader, LentMemory, ShardReader, ShardSpec, Stretch
from gpu_cache.throttle import Throttle
from gpu_cache.transfer.inflight import InflightBudget, Turn
from gpu_cache.transfer.runs import Backlog, Copies, Piece, Run, halves, joined, pack, smallest
from gpu_cache.transfer.staging import Slot, StagingRing

logger = logging.getLogger(__name__)

# The window where nothing is staged, in slots. Larger calls are faster: 0.73 of the raw socket's speed in calls of
# 16 MiB, 0.79 of 64, 0.83 of 256, our measurement over loopback. But a fault costs more.
_DIRECT_SLOTS = 2
# Bytes of lent memory that are copied before the reader confirms them, in slots. On the host they are one window: one
# copy gives the GIL away once, and beside a busy Python thread each time costs up to 5 ms.
_MOST_UNCONFIRMED = 8
# Staged windows that never wait keep the GIL: the short calls in them give it away for less than a waiting thread needs
# to wake up, and after each that thread waits for the interpreter's 5 ms once more. So a fetch thread that has kept the
# GIL for _KEPT_S pauses for _PAUSE_S. A step longer than _WAIT_S counts as a wait, in which other threads ran.
# Source: our measurement on a stand-in for a GPU; see docs/performance.md.
_KEPT_S, _PAUSE_S, _WAIT_S = 2.5e-3, 1e-4, 5e-4
_ATTEMPTS = 3  # to make room for a run: other threads take what they find


class Sink(Protocol):
    """Takes what a transfer moves. Called by the draining thread."""

    def expect(self, specs: Sequence[ShardSpec]) -> None:
        """Look at what the reader announces, before room is taken for it; raise to end the transfer."""

    def land(self, landings: list[Copy], completion: Completion | None, *, is_overflow: bool) -> None:
        """Take shards whose copies are enqueued, and done when `completion` is; None: they are done."""


class CopyMeter:
    """Counts copies to a pool, and the seconds that the device spent on them.

    Args:
        device: Copies.
    Thread-safety: any thread.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        # Guards every field below.
        self._lock = threading.Lock()
        self._timed: dict[tuple[Event, Event], None] = {}  # around copies not known to be done
        self._num_copies = self._nbytes = 0
        self._busy_s = 0.0

    def note(self, copies: Copies, started: Event, ended: Event) -> None:
        """Count copies that were enqueued between two timed events."""
        nbytes = sum(dst.numel() for dst, _ in copies)
        with self._lock:
            self._num_copies += len(copies)
            self._nbytes += nbytes
            self._timed[started, ended] = None
            is_due = len(self._timed) > 1  # earlier ones may be done
        if is_due:
            self.gather()

    def gather(self) -> None:
        """Count the seconds of copies that are done by now. Waits for none; not during CUDA graph capture.

        They end in the order in which they were enqueued: behind the first that is not done it asks no more.
        """
        with self._lock:
            timed = list(self._timed)
        for pair in timed:
            if not self._device.query(pair[1]):
                break
            busy_s = self._device.elapsed_s(*pair)
            with self._lock:
                if pair in self._timed:  # else another thread has counted it
                    del self._timed[pair]
                    self._busy_s += busy_s

    def stats(self, direction: str) -> dict[str, float]:
        """Its part of `BufferStats`, of copies in one direction: "h2d" or "d2h"."""
        with self._lock:
            found = {f"{direction}_bytes": self._nbytes, f"{direction}_busy_seconds": self._busy_s}
            return {**found, "copies": self._num_copies} if direction == "h2d" else found


class Transfer:
    """Moves what readers deliver into the pool of one level.

    Args:
        device: Copies.
        pool: Gives the ranges.
        staging: Buffers to receive into; None: the arena is host memory, and readers fill it directly.
        config: Resolved settings.
        make_room: See `RoomMaker.make`.
        inflight: The budget of bytes on their way.
    Attributes:
        copied: Counts its copies.
        stream: The stream of its copies.
    Thread-safety: any thread; each drains a reader of its own.
    """

    def __init__(
        self,
        device: Device,
        pool: SlabPool,
        staging: StagingRing | None,
        config: CacheConfig,
        make_room: Callable[[int], int],
        inflight: InflightBudget,
    ) -> None:
        self.device, self.pool, self.staging, self.make_room = device, pool, staging, make_room
        slot_bytes = config.staging_slot_bytes // ALIGNMENT * ALIGNMENT
        self.window_bytes = slot_bytes if staging else _DIRECT_SLOTS * slot_bytes
        self.lent_window_bytes = slot_bytes if staging else _MOST_UNCONFIRMED * slot_bytes
        self.run_bytes = config.run_bytes
        self.inflight = inflight
        self.copied = CopyMeter(device)
        self.stream: Stream = device.new_stream()
        self._overflow_warnings: dict[str, Throttle] = {}  # by kind of shortage

    def drain(
        self,
        reader: ShardReader,
        sink: Sink,
        deadline: float,
        *,
        may_overflow: bool = True,
        turn: Turn | None = None,
    ) -> None:
        """Receive everything a reader delivers; the sink gets each run as soon as its copy is enqueued.

        Args:
            reader: Read to its end; the caller closes it.
            sink: Where the shards go.
            deadline: By `time.monotonic()`; after it, nothing waits for a turn or a staging buffer.
            may_overflow: Whether shards that find no room may be placed outside the pool.
            turn: The reader's turn to receive, by which another thread can end the wait.
        Raises:
            CacheFullError: No room, and no overflow wanted or possible.
            FetchTimeoutError: It was not its turn in time.
            TransferError: No staging buffer came free in time.
            Exception: Whatever the reader raised. Runs that landed before stay; the others' ranges are given back.
        """
        delivery = Delivery(self, reader, sink, deadline, turn or Turn(reader.node), may_overflow=may_overflow)
        with plain_tensors():  # once, as entering costs as much as three shards
            delivery.run()

    def finish(self) -> None:
        """Give back what is unused, and allocate no staging buffer any more; waits for copies under way."""
        self.inflight.close()
        self.pool.trim()
        if self.staging is not None:
            self.staging.close()

    def enqueue(self, copies: Copies) -> Event:
        """Enqueue copies, and return an event behind them. If it raises, some may be under way."""
        started = self.device.record(self.stream, timing=True)
        with profiled(COPY):
            self.device.copy_all(copies, self.stream)
        ended = self.device.record(self.stream, timing=True)
        self.copied.note(copies, started, ended)
        return ended

    def warn_of_overflow(self, nbytes: int) -> None:
        """Warn that a run of `nbytes` goes outside the pool; one line a minute for each kind of shortage."""
        shortage = self.pool.shortage(nbytes)
        if self._overflow_warnings.setdefault(shortage.kind, Throttle()).opens():
            logger.warning(
                "the %s of %s bytes %s: %s bytes are handed out uncached, and will be fetched again",
                self.pool.name, f"{self.pool.capacity:,}", shortage.words, f"{nbytes:,}",
            )  # fmt: skip


Carved: TypeAlias = list[tuple[Run, list[Copy]]]  # runs that are complete with a window, and their tensors
Lent: TypeAlias = Sequence[tuple[Piece, Sequence[Stretch]]]  # where a window's bytes are in lent memory


class LentWindow(NamedTuple):
    """A window that is copied from lent memory, and not confirmed yet.

    Attributes:
        carved: Its runs.
        completion: Its copies'; None: they are done.
        reads_lent: Whether they read the lent memory; else they read a staging buffer.
    """

    carved: Carved
    completion: Completion | None
    reads_lent: bool


class Delivery:
    """One reader's shards on their way into the pool. Used by the thread that drains the reader.

    Args:
        transfer: Has the pool, the staging ring and the stream.
        reader: See `Transfer.drain`, also for the others.
    """

    def __init__(
        self, transfer: Transfer, reader: ShardReader, sink: Sink, deadline: float, turn: Turn, *, may_overflow: bool
    ) -> None:
        self._transfer, self._reader, self._sink = transfer, reader, sink
        self._device, self._pool, self._staging = transfer.device, transfer.pool, transfer.staging
        self._deadline, self._turn, self._may_overflow = deadline, turn, may_overflow
        self._placed: dict[Run, None] = {}  # runs that have room, and did not land yet
        self._kept_since = time.monotonic()  # when other threads last had a chance to run Python

    def run(self) -> None:
        """Receive, or copy, part after part. At the end, give back the ranges of runs that did not land."""
        try:
            while (runs := self._next_runs()) is not None:
                self._move(runs)
        finally:
            for run in self._placed:
                self._pool.abandon(run.range)

    def _move(self, runs: list[Run]) -> None:
        """Receive, or copy, the runs of a part."""
        if (resident := getattr(self._reader, "resident", None)) is not None:
            self._copy_resident(deque(runs), resident)
            return
        if getattr(self._reader, "is_lending", False):
            self._move_lent(Backlog(runs, self._transfer.lent_window_bytes, self._place))
            return
        left = Backlog(runs, self._transfer.window_bytes, self._place)
        while left.nbytes:  # room is taken when the bytes may be on their way
            with self._granted(left):
                window = left.next_window()
                carved = self._carve(window)  # tensors are built while bytes arrive
                self._land(carved, self._receive(window))
            self._let_others_run(left)

    def _let_others_run(self, left: Backlog) -> None:
        """Pause before the next window, if those that did not wait have kept other threads from Python for long."""
        if self._staging is not None and left.nbytes and time.monotonic() > self._kept_since + _KEPT_S:
            time.sleep(_PAUSE_S)
            self._kept_since = time.monotonic()

    def _note_wait(self, began: float) -> None:
        """Note that other threads ran Python, if what was begun then has taken so long that it was a wait."""
        if (now := time.monotonic()) > began + _WAIT_S:
            self._kept_since = now

    def _next_runs(self) -> list[Run] | None:
        """Ask for the next part, and pack it; None: there is none. Shards without bytes take no room, and land now."""
        began = time.monotonic()
        with profiled(FETCH):
            specs = self._reader.next_specs()
        self._note_wait(began)
        if specs is None:
            return None
        self._sink.expect(specs)
        if empty := [spec for spec in specs if not spec.nbytes]:
            self._sink.land(empty_copies(empty, self._pool.torch_device), None, is_overflow=False)
        with no_collections:
            return list(pack([spec for spec in specs if spec.nbytes], self._transfer.run_bytes))

    def _granted(self, left: Backlog) -> contextlib.AbstractContextManager[None]:
        """The budget for the next window."""
        nbytes = min(left.nbytes, left.window_bytes)
        return self._transfer.inflight.granted(nbytes, self._turn, self._deadline)

    def _carve(self, window: list[Piece]) -> Carved:
        """Build the tensors of the runs that are complete with a window."""
        with no_collections:
            complete = [piece.run for piece in window if piece.is_last]
            return [(run, self._pool.carve(run.range, run.specs, run.offsets)) for run in complete]

    def _land(self, carved: Carved, completion: Completion | None) -> None:
        for is_overflow in (False, True):
            landed = [one for run, of in carved if run.range.slab.is_overflow == is_overflow for one in of]
            if landed:
                self._sink.land(landed, completion, is_overflow=is_overflow)
        for run, _ in carved:
            del self._placed[run]

    def _receive(self, window: list[Piece]) -> Completion | None:
        """Fill the places of a window's shards with one read and, where staged, enqueue their copies at once."""
        if self._staging is None:
            with profiled(FETCH):
                self._reader.read_into(_views(window, None))
            return None
        return self._stage(window, lambda slot: self._reader.read_into(_views(window, slot.pinned.view)))

    def _stage(self, window: list[Piece], fill: Callable[[Slot], object]) -> Completion:
        """Fill a staging buffer, and enqueue its copies: mostly one, as runs are placed in order."""
        assert self._staging is not None
        began = time.monotonic()
        with profiled(STAGE):
            slot = self._staging.acquire(max(0.0, self._deadline - time.monotonic()), self._turn)
        try:
            with profiled(FETCH):
                fill(slot)
            self._note_wait(began)
            source = slot.pinned.tensor
            copies = joined((*piece.place, source, piece.at, piece.nbytes) for piece in window)
            try:
                guard = slot.guard = self._transfer.enqueue(copies)
            except BaseException:  # some may be under way
                slot.guard = self._device.record(self._transfer.stream)
                raise
        finally:
            self._staging.release(slot)
        return Completion(self._device, guard)

    def _move_lent(self, left: Backlog) -> None:
        """Copy windows from where the reader lends them; land them once it confirms that the bytes were good."""
        unconfirmed: list[LentWindow] = []
        try:
            while left.nbytes:
                with self._granted(left):
                    window = left.next_window()
                    carved = self._carve(window)
                    unconfirmed.append(LentWindow(carved, *self._copy_lent(window)))
                    if self._staging is None or len(unconfirmed) == _MOST_UNCONFIRMED or not left.nbytes:
                        self._confirm(unconfirmed)
                self._let_others_run(left)
        finally:
            _wait_for(unconfirmed)  # the memory is the reader's again after this

    def _confirm(self, unconfirmed: list[LentWindow]) -> None:
        began = time.monotonic()
        _wait_for(unconfirmed)
        cast(LendingReader, self._reader).confirm()
        self._note_wait(began)
        for one in unconfirmed:
            self._land(one.carved, one.completion)
        unconfirmed.clear()

    def _copy_lent(self, window: list[Piece]) -> tuple[Completion | None, bool]:
        """Copy a window from lent memory: by the host into its own, else by the device, else through staging.

        Returns:
            The completion of its copies, and whether they read the lent memory until then.
        """
        with profiled(FETCH):
            reader = cast(LendingReader, self._reader)
            lent = [(piece, reader.read_run(list(piece.places()))) for piece in window]
        if self._staging is not None and not all(self._reads(one.memory) for _, of in lent for one in of):
            return self._stage(window, lambda slot: copy_on_host(_lent_copies(lent, slot.pinned.tensor))), False
        copies = _lent_copies(lent, None)
        if self._staging is None:
            copy_on_host(copies)
            return None, False
        try:
            return Completion(self._device, self._transfer.enqueue(copies)), True
        except BaseException:  # some may be under way
            Completion(self._device, self._device.record(self._transfer.stream)).wait_host()
            raise

    def _reads(self, memory: LentMemory) -> bool:
        """Whether the device copies from it without staging."""
        return memory.is_lasting and self._device.reads(memory)

    def _copy_resident(self, runs: deque[Run], resident: Callable[[Sequence[ShardSpec]], list[Copy]]) -> None:
        """Copy runs from another level, and land each when its copies are enqueued."""
        while runs:
            run = self._place(runs)
            landings = self._pool.carve(run.range, run.specs, run.offsets)
            self._land([(run, landings)], self._copy_run(run, resident(run.specs)))
            runs.popleft()

    def _copy_run(self, run: Run, origins: Sequence[Copy]) -> Completion:
        """Enqueue the copies of a run, one for each stretch that lies in one piece at the other level."""
        stream = self._transfer.stream
        for completion in dict.fromkeys(one.completion for one in origins):
            if completion is not None:
                completion.wait_on(stream)
        arena, begin = run.range.slab.arena.tensor, run.range.offset
        spans = [(begin + at, one.lease) for at, one in zip(run.offsets, origins, strict=True)]
        copies = joined((arena, to, of.slab.arena.tensor, of.offset, of.nbytes) for to, of in spans if of is not None)
        guard = self._transfer.enqueue(copies)
        # A block that died, as by `share_memory_()`, may have held another shard's bytes by the time of the copy. Later
        # deaths do no harm: the fence, recorded at the death, is behind the copies.
        again = [
            (arena[begin + at :][: spec.nbytes], one.base.reshape(-1).view(torch.uint8))
            for spec, at, one in zip(run.specs, run.offsets, origins, strict=True)
            if one.lease is not None and one.lease() is None
        ]
        return Completion(self._device, self._transfer.enqueue(again) if again else guard)

    def _place(self, runs: deque[Run]) -> Run:
        """Find room for the first of some runs, else for its halves, which take its place; return the first, placed.

        Raises:
            CacheFullError: There is no room.
        """
        while (run := runs[0]) not in self._placed:
            place = self._pool.take(run.nbytes) or self._reclaim(run)
            if place is None and len(run.specs) > 1 and run.most_bytes >= smallest(run):
                runs.popleft()
                runs.extendleft(reversed(halves(run)))
                continue
            if place is None:
                if not (self._may_overflow and self._pool.may_overflow):
                    raise self._pool.full(run.nbytes)
                self._transfer.warn_of_overflow(run.nbytes)
                place = self._pool.take_overflow(run.nbytes)
            run.range = place
            self._placed[run] = None
        return run

    def _reclaim(self, run: Run) -> Range | None:
        """Find room among what was freed, else by evicting.

        In this order: evicted bytes queue behind those in the quarantine, so to evict first would drop cached shards
        for nothing. Evicting comes before halving: cut runs leave smaller holes, and each half is a copy of its own.
        """
        run.most_bytes = min(run.most_bytes, self._pool.capacity)
        if run.nbytes > run.most_bytes:
            return None
        place = self._pool.take_freed(run.nbytes)
        for _ in range(_ATTEMPTS):
            if place is not None or (most_bytes := self._transfer.make_room(run.nbytes)) < run.nbytes:
                break
            place = self._pool.take_freed(run.nbytes)
        if place is None:
            run.most_bytes = most_bytes
        return place


def _views(window: Sequence[Piece], slot: memoryview | None) -> list[memoryview]:
    """The places of a window's shards in a staging slot, or, without one, in arenas in host memory."""
    views: list[memoryview] = []
    with no_collections:
        for piece in window:
            views += piece.buffers(slot)
    return views


def _lent_copies(lent: Lent, slot: torch.Tensor | None) -> Copies:
    """The copies from lent memory into a staging slot, or, without one, into arenas."""
    spans = []
    for piece, found in lent:
        target, start = piece.place if slot is None else (slot, piece.at)
        spans += [(target, start + at, memory.tensor, begin, nbytes) for at, memory, begin, nbytes in found]
    return joined(spans)


def _wait_for(windows: Iterable[LentWindow]) -> None:
    """Wait until no copy reads lent memory any more."""
    with contextlib.ExitStack() as stack:  # for each, also behind one that raises
        for one in windows:
            if one.completion is not None and one.reads_lent:
                stack.callback(one.completion.wait_host)
