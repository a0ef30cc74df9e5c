"""Runs: consecutive shards placed as one range and copied by one call; windows: what one read receives."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from gpu_cache.config import aligned
from gpu_cache.errors import CacheFullError
from gpu_cache.pool.block import Range
from gpu_cache.source import ShardSpec


@dataclasses.dataclass(slots=True, eq=False)
class Run:
    """Consecutive shards of one node, each aligned, placed as one range."""

    specs: list[ShardSpec] = dataclasses.field(default_factory=list)
    offsets: list[int] = dataclasses.field(default_factory=list)
    nbytes: int = 0
    place: Range | None = None

    @property
    def range(self) -> Range:
        assert self.place is not None
        return self.place

    @property
    def smallest_bytes(self) -> int:
        return min(spec.nbytes for spec in self.specs)


@dataclasses.dataclass(slots=True, eq=False)
class Piece:
    """A part of a run that is received and copied at once: all of it, or a stretch of one large shard."""

    run: Run
    start: int  # within the run
    nbytes: int
    at: int  # within the staging slot

    @property
    def is_last(self) -> bool:
        """Whether the run is complete with it."""
        return self.start + self.nbytes == self.run.nbytes

    def arena_bytes(self) -> torch.Tensor:
        """Where it goes: `(nbytes,)` uint8 on the device."""
        begin = self.run.range.offset + self.start
        return self.run.range.slab.arena.tensor[begin : begin + self.nbytes]

    def arena_view(self) -> memoryview:
        """The same, of an arena in host memory."""
        return memoryview(self.arena_bytes().numpy())  # type: ignore[arg-type]

    def buffers(self, room: memoryview) -> Iterator[memoryview]:
        """The shards' places within `room`, which is as long as the piece; alignment gaps are left out."""
        first = self.start  # only a run of one large shard is cut into pieces
        for spec, offset in zip(self.run.specs, self.run.offsets, strict=True):
            yield room[offset : offset - first + spec.nbytes]


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
    for spec in specs:
        need = aligned(spec.nbytes)
        if run.specs and run.nbytes + need > run_bytes:
            yield run
            run = Run()
        run.specs.append(spec)
        run.offsets.append(run.nbytes)
        run.nbytes += need
    if run.specs:
        yield run


def windows(runs: Iterator[Run], slot_bytes: int) -> Iterator[list[Piece]]:
    """Cut runs into pieces and fill windows of `slot_bytes` with them: what one slot takes and one read fills.

    If the next run finds no room, there is a window of those before it first.
    """
    window: list[Piece] = []
    used = 0
    full: CacheFullError | None = None
    try:
        for run in runs:
            for start in range(0, run.nbytes, slot_bytes):
                nbytes = min(run.nbytes - start, slot_bytes)
                if used + nbytes > slot_bytes:
                    yield window
                    window, used = [], 0
                window.append(Piece(run, start, nbytes, used))
                used += nbytes
    except CacheFullError as error:
        full = error
    if window:
        yield window
    if full is not None:
        raise full
