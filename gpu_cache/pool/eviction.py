"""Chooses blocks to evict: the least recently used that leave consecutive bytes. No torch, no lock."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Hashable, Mapping, Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """Consecutive bytes of a slab."""

    slab: Hashable
    start: int
    nbytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """The room of a pool besides the blocks in use.

    Attributes:
        slab_bytes: Bytes of each slab.
        free: Ranges that are free, or will be when the work that was enqueued before is done.
        growth_bytes: What new slabs may take.
    """

    slab_bytes: Mapping[Hashable, int]
    free: Sequence[Span]
    growth_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """The victims that make room, or none.

    Attributes:
        victims: Positions in the sequence of blocks; None: not even all of them make room.
        most_bytes: The longest run that room could be made for.
    """

    victims: list[int] | None
    most_bytes: int


def choose(nbytes: int, blocks: Sequence[Span], layout: Layout) -> Plan:
    """Choose blocks to evict so that `nbytes` fit in one piece; none if they cannot.

    It gives blocks back in thought, the first ones first, until a range is long enough. Only blocks in that range
    go, as few bytes as make room. So a run whose shards are used together goes as a whole. No block goes that
    would leave a hole which no run fits.

    Args:
        nbytes: Bytes of the run.
        blocks: The blocks that may go, the least recently used first.
        layout: The pool's.
    Source: ours; the recency of the youngest victim is that of plain LRU in a pool without fragmentation.
    """
    spans, empty, empty_bytes = _Spans(), set[Hashable](), layout.growth_bytes
    for number, span in [*((None, span) for span in layout.free), *enumerate(blocks)]:
        start, length = spans.add(span, number)
        if length >= nbytes:
            return Plan(spans.cheapest(span.slab, start, nbytes), nbytes)
        if length == layout.slab_bytes.get(span.slab):
            empty.add(span.slab)
            empty_bytes += length
            if empty_bytes >= nbytes:  # longer than any slab: whole ones make way for one of its own
                until = 0 if number is None else number + 1
                return Plan([at for at, block in enumerate(blocks[:until]) if block.slab in empty], nbytes)
    return Plan(None, max(spans.longest, empty_bytes))


class _Spans:
    """Spans of slabs, neighbours taken together."""

    def __init__(self) -> None:
        self.longest = 0
        self._end_of: dict[tuple[Hashable, int], int] = {}  # a joined span's end, by its start
        self._start_of: dict[tuple[Hashable, int], int] = {}
        self._parts: dict[tuple[Hashable, int], _Part] = {}  # by their starts

    def add(self, span: Span, number: int | None = None) -> tuple[int, int]:
        """Add a span, a block if it has a number; return begin and length of the joined span around it."""
        slab, start, end = span.slab, span.start, span.start + span.nbytes
        self._parts[slab, start] = _Part(start, end, number)
        if (further := self._end_of.pop((slab, end), None)) is not None:
            end = further
        if (before := self._start_of.pop((slab, start), None)) is not None:
            start = before
        self._end_of[slab, start], self._start_of[slab, end] = end, start
        self.longest = max(self.longest, end - start)
        return start, end - start

    def cheapest(self, slab: Hashable, start: int, nbytes: int) -> list[int]:
        """The blocks with the fewest bytes that make room for `nbytes`, among the neighbours from `start` on."""
        parts: deque[_Part] = deque()
        best: list[_Part] = []
        cost, best_cost = 0, -1
        while (part := self._parts.get((slab, start))) is not None:
            parts.append(part)
            start, cost = part.end, cost + part.cost
            while part.end - parts[0].end >= nbytes:  # there is room without the first one
                cost -= parts.popleft().cost
            if part.end - parts[0].start >= nbytes and not 0 <= best_cost <= cost:
                best, best_cost = list(parts), cost
        return [part.number for part in best if part.number is not None]


@dataclasses.dataclass(frozen=True, slots=True)
class _Part:
    start: int
    end: int
    number: int | None  # the block's; None: it is free

    @property
    def cost(self) -> int:
        return 0 if self.number is None else self.end - self.start
