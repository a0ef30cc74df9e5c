"""Reader -> staging -> slab, run by run.

A run is consecutive shards, placed as one range and copied by one call. A window is what one read receives.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol, cast

import torch

from gpu_cache.config import ALIGNMENT, CacheConfig
from gpu_cache.device.modes import COPY, FETCH, STAGE, plain_tensors, profiled
from gpu_cache.device.protocol import Device, Event, Stream
from gpu_cache.errors import CacheFullError
from gpu_cache.pool.block import Copy, Range, aligned, empty_copies
from gpu_cache.pool.completion import Completion
from gpu_cache.pool.slab import Shortage, SlabPool, stretches
from gpu_cache.process import no_collections
from gpu_cache.source import LendingReader, LentMemory, ShardReader, ShardSpec, Stretch
from gpu_cache.throttle import Throttle
from gpu_cache.transfer.inflight import InflightBudget, Turn
from gpu_cache.transfer.staging import Slot, StagingRing


@dataclasses.dataclass(slots=True, eq=False)
class Run:
    """Consecutive shards of one node, each aligned, placed as one range."""

    specs: list[ShardSpec] = dataclasses.field(default_factory=list)
    offsets: list[int] = dataclasses.field(default_factory=list)
    nbytes: int = 0
    most_bytes: float = math.inf  # the longest run that room could be made for when this was last looked at
    range: Range = dataclasses.field(init=False)  # once it is placed


@dataclasses.dataclass(slots=True, eq=False)
class Piece:
    """A part of a run that is received and copied at once: all of it, or a stretch of one large shard."""

    run: Run
    start: int  # within the run
    nbytes: int
    at: int  # within the staging slot
    is_last: bool  # the run is complete with it

    def arena_bytes(self) -> torch.Tensor:
        """Where it goes: `(nbytes,)` uint8 on the device."""
        begin = self.run.range.offset + self.start
        return self.run.range.slab.arena.tensor[begin : begin + self.nbytes]

    def buffers(self, slot: memoryview | None) -> Iterator[memoryview]:
        """The shards' places in a staging slot, or, without one, in an arena in host memory; no alignment gaps."""
        arena = cast(Any, self.arena_bytes().numpy() if slot is None else None)
        room = memoryview(arena) if slot is None else slot[self.at : self.at + self.nbytes]
        first = self.start  # only a run of one large shard is cut into pieces
        for spec, offset in zip(self.run.specs, self.run.offsets, strict=True):
            yield room[offset : offset - first + spec.nbytes]

    def places(self) -> Iterator[tuple[int, int]]:
        """Of each shard, where it goes within the piece, and how many of its bytes."""
        for spec, offset in zip(self.run.specs, self.run.offsets, strict=True):
            begin = max(offset, self.start)
            yield begin - self.start, min(offset + spec.nbytes, self.start + self.nbytes) - begin


def copies_of(window: Sequence[Piece], slot: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What to copy (to, from), neighbours in one arena at once: mostly a whole window, as runs are placed in order.

    Args:
        window: Placed, and filled into `slot`.
        slot: `(nbytes,)` uint8, pinned.
    """
    spans: list[tuple[torch.Tensor, int, int, int]] = []  # arena, place in it, place in the slot, length
    for piece in window:
        arena, begin = piece.run.range.slab.arena.tensor, piece.run.range.offset + piece.start
        before = spans[-1] if spans else None
        if before and before[0] is arena and before[1] + before[3] == begin and before[2] + before[3] == piece.at:
            spans[-1] = (*before[:3], before[3] + piece.nbytes)
        else:
            spans.append((arena, begin, piece.at, piece.nbytes))
    return [(arena[to : to + nbytes], slot[at : at + nbytes]) for arena, to, at, nbytes in spans]


def pack(specs: Sequence[ShardSpec], run_bytes: int) -> Iterator[Run]:
    """Group shards, in order, into runs of at most `run_bytes`; a larger shard is a run of its own."""
    run = Run()
    nbytes = 0  # of the run so far; one loop without calls, as there are thousands
    for spec in specs:
        need = -(-spec.nbytes // ALIGNMENT) * ALIGNMENT
        if run.specs and nbytes + need > run_bytes:
            run.nbytes = nbytes
            yield run
            run, nbytes = Run(), 0
        run.specs.append(spec)
        run.offsets.append(nbytes)
        nbytes += need
    if run.specs:
        run.nbytes = nbytes
        yield run


class Backlog:
    """The runs of a part that have yet to be received, cut into windows: what one slot takes and one read fills.

    Args:
        runs: In the order of their bytes.
        window_bytes: The most bytes of a window.
        place: Finds room for the first of the runs, which it may cut in two, and returns it.
    """

    def __init__(self, runs: Iterable[Run], window_bytes: int, place: Callable[[deque[Run]], Run]) -> None:
        self._runs, self._window_bytes, self._place = deque(runs), window_bytes, place
        self._start = 0  # of what is left of the first run
        self.nbytes = sum(run.nbytes for run in self._runs)

    def next_window(self) -> list[Piece]:
        """Place as many runs as fill a window; if one finds no room, those before it are a window first."""
        window: list[Piece] = []
        room = self._window_bytes
        while self._runs:
            try:
                run = self._place(self._runs)
            except CacheFullError:
                if not window:
                    raise
                break
            left = run.nbytes - self._start
            nbytes = min(left, self._window_bytes)
            if nbytes > room:
                break
            window.append(Piece(run, self._start, nbytes, self._window_bytes - room, nbytes == left))
            room -= nbytes
            self._start += nbytes
            if nbytes == left:
                self._runs.popleft()
                self._start = 0
        self.nbytes -= self._window_bytes - room
        return window


logger = logging.getLogger(__name__)

# Received by one call where nothing is staged, in slots. Larger calls are faster (of the raw socket's speed: 0.73 in
# calls of 16 MiB, 0.79 of 64, 0.83 of 256, our measurement over loopback); what a fault costs grows with them.
_DIRECT_SLOTS = 2
_MOST_UNCONFIRMED = 8  # windows of lent memory that are copied before the reader is asked whether they were good
_ATTEMPTS = 3  # to make room for a run, of which others take what they find


class Sink(Protocol):
    """Takes what a transfer moves. Called by the draining thread."""

    def expect(self, specs: Sequence[ShardSpec]) -> None:
        """Look at what the reader announces, before room is taken for it; raise to end the transfer."""

    def land(self, landings: list[Copy], completion: Completion | None, *, is_overflow: bool) -> None:
        """Take the shards of a run, whose copy is enqueued and done when `completion` is; None: it is done."""


class CopyMeter:
    """Counts copies to a pool, and the seconds that the device was at them.

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

    def note(self, copies: Sequence[tuple[torch.Tensor, torch.Tensor]], started: Event, ended: Event) -> None:
        """Copies were enqueued between two events, timed."""
        with self._lock:
            self._num_copies += len(copies)
            self._nbytes += sum(dst.numel() for dst, _ in copies)
            self._timed[started, ended] = None
            is_due = len(self._timed) > 1  # earlier ones may be done
        if is_due:
            self.gather()

    def gather(self) -> None:
        """Count the seconds of copies that are done by now. Waits for none; not during CUDA graph capture."""
        with self._lock:
            timed = list(self._timed)
        for pair in timed:
            if self._device.query(pair[1]):
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
        staging: Buffers to receive into; None: the arena is host memory, received into directly.
        config: Resolved settings.
        make_room: Evicts for a run of so many bytes, or nothing; the longest run that room was, or could be, made for.
        inflight: The budget of bytes on their way.
        below: Of the level below.
    Attributes:
        copied: Counts its copies.
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
        below: Transfer | None = None,
    ) -> None:
        self._device, self._pool, self._staging, self._make_room = device, pool, staging, make_room
        slot_bytes = config.staging_slot_bytes // ALIGNMENT * ALIGNMENT
        self._window_bytes = slot_bytes if staging else _DIRECT_SLOTS * slot_bytes
        self._run_bytes = config.run_bytes
        self._overflow_warnings: dict[str, Throttle] = {}  # by kind of shortage
        self.inflight, self._below = inflight, below
        self.copied = CopyMeter(device)
        self.stream: Stream = device.new_stream()

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
            reader: Read to its end; closing it is the caller's.
            sink: Where the shards go.
            deadline: `time.monotonic()` after which neither a turn nor a staging buffer is waited for.
            may_overflow: Whether shards that find no room may be placed outside the pool.
            turn: The reader's turn to receive, by which another thread can end the wait.
        Raises:
            CacheFullError: No room, and no overflow wanted or possible.
            FetchTimeoutError: It was not its turn in time.
            TransferError: No staging buffer came free in time.
            Exception: Whatever the reader raised. Runs that landed before stay; the others' ranges are given back.
        """
        placed: dict[Run, None] = {}
        turn = turn or Turn(reader.node)
        place = partial(self._place, placed, may_overflow)
        resident = getattr(reader, "resident", None)
        try:
            with plain_tensors():  # once, as entering costs as much as three shards
                while (specs := _next_specs(reader)) is not None:
                    runs = self._expect(specs, sink)
                    if resident is not None:
                        self._copy_all(deque(runs), place, resident, sink, placed)
                        continue
                    left = Backlog(runs, self._window_bytes, place)
                    if getattr(reader, "is_lending", False):
                        self._move_lent(cast(LendingReader, reader), left, sink, turn, deadline, placed)
                        continue
                    while left.nbytes:  # room is taken when the bytes may be on their way
                        with self.inflight.granted(min(left.nbytes, self._window_bytes), turn, deadline):
                            self._move(reader, left.next_window(), sink, turn, deadline, placed)
        finally:
            for run in placed:
                self._pool.abandon(run.range)

    def finish(self) -> None:
        """Give back what is unused, and allocate no staging buffer any more; waits for copies under way."""
        self.inflight.close()
        self._pool.trim()
        if self._staging is not None:
            self._staging.close()
        if self._below is not None:
            self._below.finish()

    def _expect(self, specs: Sequence[ShardSpec], sink: Sink) -> list[Run]:
        """The runs of a part; shards without bytes land at once."""
        with no_collections:
            sink.expect(specs)
            full = [spec for spec in specs if spec.nbytes]
            if len(full) < len(specs):
                self._land_empty(specs, sink)
            return list(pack(full, self._run_bytes))

    def _move(
        self,
        reader: ShardReader,
        window: list[Piece],
        sink: Sink,
        turn: Turn,
        deadline: float,
        placed: dict[Run, None],
    ) -> None:
        """Receive a window, and land the runs that are complete with it. Tensors are built while bytes arrive."""
        carved = self._carve(window)
        self._land(carved, self._receive(reader, window, turn, deadline), sink, placed)

    def _carve(self, window: list[Piece]) -> list[tuple[Run, list[Copy]]]:
        """The tensors of the runs that are complete with a window."""
        with no_collections:
            complete = [piece.run for piece in window if piece.is_last]
            return [(run, self._pool.carve(run.range, run.specs, run.offsets)) for run in complete]

    def _land(
        self,
        carved: list[tuple[Run, list[Copy]]],
        completion: Completion | None,
        sink: Sink,
        placed: dict[Run, None],
    ) -> None:
        with no_collections:
            for is_overflow in (False, True):
                landed = [one for run, of in carved if run.range.slab.is_overflow == is_overflow for one in of]
                if landed:
                    sink.land(landed, completion, is_overflow=is_overflow)
            for run, _ in carved:
                del placed[run]

    def _move_lent(
        self,
        reader: LendingReader,
        left: Backlog,
        sink: Sink,
        turn: Turn,
        deadline: float,
        placed: dict[Run, None],
    ) -> None:
        """Copy windows from where a reader lends them; land them once it confirms that the bytes were good."""
        unconfirmed: list[tuple[list[tuple[Run, list[Copy]]], Completion | None]] = []
        try:
            while left.nbytes:
                with self.inflight.granted(min(left.nbytes, self._window_bytes), turn, deadline):
                    window = left.next_window()
                    carved = self._carve(window)
                    unconfirmed.append((carved, self._copy_lent(reader, window, turn, deadline)))
                    is_due = self._staging is None or len(unconfirmed) == _MOST_UNCONFIRMED or not left.nbytes
                    if is_due:
                        self._confirm(reader, unconfirmed, sink, placed)
        finally:
            for _, completion in unconfirmed:
                if completion is not None:
                    completion.wait_host()  # the memory is the reader's again after this

    def _confirm(
        self,
        reader: LendingReader,
        unconfirmed: list[tuple[list[tuple[Run, list[Copy]]], Completion | None]],
        sink: Sink,
        placed: dict[Run, None],
    ) -> None:
        for _, completion in unconfirmed:
            if completion is not None:
                completion.wait_host()
        reader.confirm()
        for carved, completion in unconfirmed:
            self._land(carved, completion, sink, placed)
        unconfirmed.clear()

    def _copy_lent(self, reader: LendingReader, window: list[Piece], turn: Turn, deadline: float) -> Completion | None:
        """Copy a window from lent memory: by the host into its own, else by the device, else through staging."""
        with profiled(FETCH):
            found = [(piece, reader.read_run(list(piece.places()))) for piece in window]
        if self._staging is not None and not all(self._reads(one.memory) for _, of in found for one in of):
            return self._stage(window, partial(_copy_to_slot, found), turn, deadline)
        copies = _lent_copies(found)
        if self._staging is None:
            for dst, src in copies:
                dst.copy_(src)
            return None
        started = self._device.record(self.stream, timing=True)
        try:
            with profiled(COPY):
                self._device.copy_all(copies, self.stream)
        except BaseException:  # some may be under way
            Completion(self._device, self._device.record(self.stream)).wait_host()
            raise
        ended = self._device.record(self.stream, timing=True)
        self.copied.note(copies, started, ended)
        return Completion(self._device, ended)

    def _reads(self, memory: LentMemory) -> bool:
        """Whether the device copies from it without staging."""
        return memory.is_lasting and self._device.reads(memory)

    def _copy_all(
        self,
        runs: deque[Run],
        place: Callable[[deque[Run]], Run],
        resident: Callable[[Sequence[ShardSpec]], list[Copy]],
        sink: Sink,
        placed: dict[Run, None],
    ) -> None:
        """Copy runs from another level, and land each when its copies are enqueued."""
        while runs:
            run = place(runs)
            landings = self._pool.carve(run.range, run.specs, run.offsets)
            completion = self._copy_run(run, resident(run.specs))
            sink.land(landings, completion, is_overflow=run.range.slab.is_overflow)
            del placed[runs.popleft()]

    def _copy_run(self, run: Run, origins: Sequence[Copy]) -> Completion:
        """Enqueue the copies of a run, one for each stretch that lies in one piece at the other level."""
        for completion in dict.fromkeys(one.completion for one in origins):
            if completion is not None:
                completion.wait_on(self.stream)
        started = self._device.record(self.stream, timing=True)
        copies, arena, begin = [], run.range.slab.arena.tensor, run.range.offset
        for slab, offset, nbytes in stretches(one.lease for one in origins if one.lease is not None):
            copies.append((arena[begin:][:nbytes], slab.arena.tensor[offset:][:nbytes]))
            begin += nbytes
        self._device.copy_all(copies, self.stream)
        self._copy_again(run, origins)
        ended = self._device.record(self.stream, timing=True)
        self.copied.note(copies, started, ended)
        return Completion(self._device, ended)

    def _copy_again(self, run: Run, origins: Sequence[Copy]) -> None:
        """Copy those whose block died, as by `share_memory_()`: others may have got its bytes before they were read.

        Of the others the fence, which is recorded when they die, is behind the copies.
        """
        begins = zip(run.specs, run.offsets, origins, strict=True)
        for spec, offset, origin in [one for one in begins if one[2].lease is not None and one[2].lease() is None]:
            place = run.range.slab.arena.tensor[run.range.offset + offset :][: spec.nbytes]
            self._device.copy_async(place, origin.base.reshape(-1).view(torch.uint8), self.stream)

    def _land_empty(self, specs: Sequence[ShardSpec], sink: Sink) -> None:
        """Land the shards without bytes, which take no room."""
        empty = [spec for spec in specs if not spec.nbytes]
        sink.land(empty_copies(empty, self._pool.torch_device), None, is_overflow=False)

    def _place(self, placed: dict[Run, None], may_overflow: bool, runs: deque[Run]) -> Run:
        """Find room for the first of some runs, else for its halves, which take its place.

        Args:
            placed: The runs that have room; those of their bytes that no shard took are given back at the end.
            may_overflow: Whether what fits nowhere goes outside the pool.
            runs: The first of them is returned, and stays.
        Raises:
            CacheFullError: There is no room.
        """
        while (run := runs[0]) not in placed:
            place = self._pool.take(run.nbytes) or self._reclaim(run)
            if place is None and len(run.specs) > 1 and run.most_bytes >= _smallest(run):
                runs.popleft()
                runs.extendleft(reversed(_halves(run)))
                continue
            if place is None:
                if not may_overflow:
                    raise self._pool.full(run.nbytes)
                self._warn_of_overflow(run.nbytes, self._pool.shortage(run.nbytes))
                place = self._pool.take_overflow(run.nbytes)
            run.range = place
            placed[run] = None
        return run

    def _reclaim(self, run: Run) -> Range | None:
        """Find room among what was freed, else by evicting.

        In this order, as evicted bytes pass the same quarantine behind what is there: once they are reusable so is all
        that was freed before, and what is cached would have gone for nothing. Evicting comes before halving: cutting
        runs to fill holes leaves smaller holes, and each part is a copy of its own.
        """
        run.most_bytes = min(run.most_bytes, self._pool.capacity)
        if run.nbytes > run.most_bytes:
            return None
        place = self._pool.take_freed(run.nbytes)
        for _ in range(_ATTEMPTS):
            if place is not None or (most_bytes := self._make_room(run.nbytes)) < run.nbytes:
                break
            place = self._pool.take_freed(run.nbytes)
        if place is None:
            run.most_bytes = most_bytes
        return place

    def _warn_of_overflow(self, nbytes: int, shortage: Shortage) -> None:
        if self._overflow_warnings.setdefault(shortage.kind, Throttle()).opens():
            logger.warning(
                "the %s of %s bytes %s: %s bytes are handed out uncached, and will be fetched again",
                self._pool.name, f"{self._pool.capacity:,}", shortage.words, f"{nbytes:,}",
            )  # fmt: skip

    def _receive(self, reader: ShardReader, window: list[Piece], turn: Turn, deadline: float) -> Completion | None:
        """Fill the places of a window's shards with one read and, where staged, enqueue their copies at once."""
        if self._staging is None:
            with profiled(FETCH):
                reader.read_into(_views(window, None))
            return None

        def fill(slot: Slot) -> None:
            reader.read_into(_views(window, slot.pinned.view))

        return self._stage(window, fill, turn, deadline)

    def _stage(self, window: list[Piece], fill: Callable[[Slot], object], turn: Turn, deadline: float) -> Completion:
        """Fill a staging buffer, and enqueue its copies."""
        assert self._staging is not None
        with profiled(STAGE):
            slot = self._staging.acquire(max(0.0, deadline - time.monotonic()), turn)
        copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        try:
            with profiled(FETCH):
                fill(slot)
            started = self._device.record(self.stream, timing=True)
            copies = copies_of(window, slot.pinned.tensor)
            with profiled(COPY):
                self._device.copy_all(copies, self.stream)
        finally:
            try:
                if copies:  # also behind those of a window that failed half-way
                    slot.guard = self._device.record(self.stream, timing=True)
                guard = slot.guard
            finally:
                self._staging.release(slot)
        self.copied.note(copies, started, guard)
        return Completion(self._device, guard)


def _views(window: Sequence[Piece], slot: memoryview | None) -> list[memoryview]:
    """The places of a window's shards in a staging slot, or, without one, in arenas in host memory."""
    with no_collections:
        return [view for piece in window for view in piece.buffers(slot)]


Found = Sequence[tuple[Piece, Sequence[Stretch]]]


def _lent_copies(found: Found) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What to copy (to, from) into arenas, neighbours on both sides at once."""
    spans: list[tuple[torch.Tensor, int, LentMemory, int, int]] = []  # arena, place, memory, place there, length
    for piece, lent in found:
        arena, start = piece.run.range.slab.arena.tensor, piece.run.range.offset + piece.start
        for at, memory, begin, nbytes in lent:
            to = start + at
            if spans:
                other, other_to, source, source_begin, length = spans[-1]
                gap = to - other_to
                if (
                    other is arena
                    and source is memory
                    and gap == begin - source_begin
                    and 0 <= gap - length < ALIGNMENT
                ):
                    spans[-1] = (arena, other_to, memory, source_begin, gap + nbytes)
                    continue
            spans.append((arena, to, memory, begin, nbytes))
    return [(arena[to : to + n], memory.tensor[begin : begin + n]) for arena, to, memory, begin, n in spans]


def _copy_to_slot(found: Found, slot: Slot) -> None:
    for piece, lent in found:
        for at, memory, begin, nbytes in lent:
            slot.pinned.tensor[piece.at + at :][:nbytes].copy_(memory.tensor[begin : begin + nbytes])


def _next_specs(reader: ShardReader) -> Sequence[ShardSpec] | None:
    with profiled(FETCH):
        return reader.next_specs()


def _smallest(run: Run) -> int:
    """Bytes that a run of its smallest shard takes."""
    return aligned(min(spec.nbytes for spec in run.specs))


def _halves(run: Run) -> list[Run]:
    """Two runs of half its shards each, or more where one of those is longer than the run was."""
    middle = len(run.specs) // 2
    halves = [half for specs in (run.specs[:middle], run.specs[middle:]) for half in pack(specs, run.nbytes)]
    for half in halves:
        half.most_bytes = run.most_bytes
    return halves
