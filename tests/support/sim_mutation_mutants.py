"""Mutants of refetches: comparisons that wait for too little, blocks let go too early, writes that nobody notices."""

from __future__ import annotations

from typing import Any

from gpu_cache.transfer.comparison import Comparison, Comparisons

from gpu_cache.device.protocol import Stream
from gpu_cache.index.entry import Entry
from gpu_cache.index.index import ShardIndex
from gpu_cache.pool.fence import StreamFence
from tests.support.sim_mutant import Mutants

MUTATION_MUTANTS = Mutants()
_mutant = MUTATION_MUTANTS.enter


class _HoledFence:
    """A fence without some streams."""

    def __init__(self, fence: StreamFence, left_out: list[Stream]) -> None:
        self._fence, self._left_out = fence, left_out

    def record(self) -> Any:
        events = self._fence.record()
        return None if events is None else [one for one in events if one.stream not in self._left_out]

    def note(self, stream: Stream) -> None:
        self._fence.note(stream)


def _enqueue_behind_less(original: Any, self: Comparisons, fresh: list[Comparison], left_out: list[Stream]) -> None:
    whole, self._fence = self._fence, _HoledFence(self._fence, left_out)  # type: ignore[assignment]
    try:
        original(self, fresh)
    finally:
        self._fence = whole


@_mutant("a comparison that waits for nothing", Comparisons, "_enqueue")
def _no_waits(original: Any, self: Comparisons, fresh: list[Comparison]) -> None:
    _enqueue_behind_less(original, self, fresh, self._fence._streams())


@_mutant("a comparison before the writes are done", Comparisons, "_enqueue")
def _before_writes(original: Any, self: Comparisons, fresh: list[Comparison]) -> None:
    _enqueue_behind_less(original, self, fresh, list(self._device.fence_streams()))


@_mutant("compared blocks let go, on a stream no fence knows", Comparisons, "_enqueue")
def _let_go(original: Any, self: Comparisons, fresh: list[Comparison]) -> None:
    original(self, fresh)
    self._fence._noted.pop(self._stream, None)
    for one in [one for one in fresh if one.differs is not None]:
        one.aliases.clear()
        one.entry = Entry(one.entry.key, 0)


@_mutant("what was written to is handed out", ShardIndex, "claim")
def _unseen(original: Any, self: ShardIndex, *args: Any, hands_out: bool = True, **options: Any) -> Any:
    return original(self, *args, hands_out=False, **options)
