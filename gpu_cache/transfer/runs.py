"""Runs, and the windows and copies that move them. A run is consecutive shards, placed as one range."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

import torch

from gpu_cache.config import ALIGNMENT
from gpu_cache.errors import CacheFullError
from gpu_cache.pool.block import Range, aligned
from gpu_cache.source import ShardSpec

Copies: TypeAlias = Sequence[tuple[torch.Tensor, torch.Tensor]]  # uint8 ranges, to and from


@dataclasses.dataclass(slots=True, eq=False)
class Run:
    """Consecutive shards of one node, each aligned, placed as one range."""

    specs: list[ShardSpec] = dataclasses.field(default_factory=list)
    offsets: list[int] = dataclasses.field(default_factory=list)
    nbytes: int = 0
    most_bytes: float = math.inf  # the longest run that room could be made for, at the last look
    range: Range = dataclasses.field(init=False)  # once it is placed


@dataclasses.dataclass(slots=True, eq=False)
class Piece:
    """A part of a run that is received and copied at once: all of it, or a stretch of one large shard."""

    run: Run
    start: int  # within the run
    nbytes: int
    at: int  # within the staging slot
    is_last: bool  # the last one of its run

    @property
    def place(self) -> tuple[torch.Tensor, int]:
        """The arena that it goes to, and where it begins there."""
        return self.run.range.slab.arena.tensor, self.run.range.offset + self.start

    def buffers(self, slot: memoryview | None) -> list[memoryview]:
        """The shards' places in a staging slot, or, without one, in an arena in host memory; no alignment gaps."""
        memory, begin = (self.run.range.slab.arena.view, self.place[1]) if slot is None else (slot, self.at)
        room = memory[begin : begin + self.nbytes]
        first, run = self.start, self.run
        return [room[at : at - first + spec.nbytes] for spec, at in zip(run.specs, run.offsets, strict=True)]

    def places(self) -> list[tuple[int, int]]:
        """Where each shard goes within the piece, and how many of its bytes."""
        run = self.run
        if len(run.specs) == 1:  # only such a run is cut into pieces
            return [(0, min(run.specs[0].nbytes - self.start, self.nbytes))]
        return list(zip(run.offsets, [spec.nbytes for spec in run.specs], strict=True))


def pack(specs: Sequence[ShardSpec], run_bytes: int) -> Iterator[Run]:
    """Group shards, in order, into runs of at most `run_bytes`; a larger shard is a run of its own."""
    run = Run()
    nbytes = 0  # the run's so far; one loop without calls, as there are thousands of shards
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
    """The runs of a part that are still to be received. It cuts them into windows, each for one slot and one read.

    Args:
        runs: In the order of their bytes.
        window_bytes: The most bytes of a window.
        place: Finds room for the first of the runs, or for a half of it that takes its place; returns that.
    """

    def __init__(self, runs: Iterable[Run], window_bytes: int, place: Callable[[deque[Run]], Run]) -> None:
        self.window_bytes = window_bytes
        self._runs, self._place = deque(runs), place
        self._start = 0  # the rest of the first run begins here
        self.nbytes = sum(run.nbytes for run in self._runs)

    def next_window(self) -> list[Piece]:
        """Place as many runs as fill a window. If one finds no room, the runs before it are a window first.

        Raises:
            CacheFullError: The first one finds none.
        """
        window: list[Piece] = []
        room = self.window_bytes
        while self._runs:
            try:
                run = self._place(self._runs)
            except CacheFullError:
                if not window:
                    raise
                break
            left = run.nbytes - self._start
            nbytes = min(left, self.window_bytes)
            if nbytes > room:
                break
            window.append(Piece(run, self._start, nbytes, self.window_bytes - room, nbytes == left))
            room -= nbytes
            self._start += nbytes
            if nbytes == left:
                self._runs.popleft()
                self._start = 0
        self.nbytes -= self.window_bytes - room
        return window


def joined(spans: Iterable[tuple[torch.Tensor, int, torch.Tensor, int, int]]) -> Copies:
    """The copies that fill places in arenas; one for neighbours on both sides, with the alignment gap between them.

    Args:
        spans: Arena, begin there, source, begin there, length; in stream order.
    """
    found: list[tuple[torch.Tensor, int, torch.Tensor, int, int]] = []
    for arena, to, source, begin, nbytes in spans:
        if found:
            other, other_to, other_source, other_begin, length = found[-1]
            gap = to - other_to
            is_beside = gap == begin - other_begin and 0 <= gap - length < ALIGNMENT
            if is_beside and other is arena and other_source is source:
                found[-1] = (arena, other_to, source, other_begin, gap + nbytes)
                continue
        found.append((arena, to, source, begin, nbytes))
    return [(arena[to : to + n], source[begin : begin + n]) for arena, to, source, begin, n in found]


def smallest(run: Run) -> int:
    """Bytes that a run of its smallest shard takes."""
    return aligned(min(spec.nbytes for spec in run.specs))


def halves(run: Run) -> list[Run]:
    """Two runs of half its shards each, or more where one of those is longer than the run was."""
    middle = len(run.specs) // 2
    found = [half for specs in (run.specs[:middle], run.specs[middle:]) for half in pack(specs, run.nbytes)]
    for half in found:
        half.most_bytes = run.most_bytes
    return found
