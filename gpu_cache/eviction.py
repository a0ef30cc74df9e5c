"""Makes room in a pool: asks the index who may go, the pool where that leaves consecutive bytes, and lets those go."""

from __future__ import annotations

from typing import cast

from gpu_cache.block import TrimReport
from gpu_cache.entry import Entry
from gpu_cache.index import ShardIndex
from gpu_cache.lease import Lease
from gpu_cache.slab import SlabPool
from gpu_cache.victims import Span, choose

_ATTEMPTS = 3  # a choice is outdated when somebody took, or took hold of, a block of it meanwhile


class Evictor:
    """Evicts from one pool.

    Args:
        index: Of the entries.
        pool: That their blocks are in.
    Thread-safety: any thread. The choice is made outside of every lock, and checked under the index's.
    """

    def __init__(self, index: ShardIndex, pool: SlabPool) -> None:
        self._index, self._pool = index, pool

    def make_room(self, nbytes: int) -> int:
        """Evict what makes room for a run, when what was freed by then is reusable; or nothing, if that cannot be.

        Returns:
            The longest run that room was, or could be, made for: at least `nbytes` if it was.
        """
        if not self._pool.can_reuse:  # what is evicted now would stay out of use, nobody knows how long
            return self._pool.stats()["device_largest_free_bytes"]
        for _ in range(_ATTEMPTS):
            candidates = self._index.candidates()
            candidates.sort(key=_is_pending)  # the last to go are those whose copy is under way; the fence covers it
            plan = choose(nbytes, [_span_of(entry) for entry in candidates], self._pool.layout())
            if plan.victims is None:
                return plan.most_bytes
            victims = [candidates[number] for number in plan.victims]
            candidates.clear()
            if self._index.evict(victims):
                victims.clear()  # here, where no lock is held, their blocks die
                break
        return nbytes

    def offload(self) -> TrimReport:
        """Evict everything, and give back every slab that nobody holds."""
        self._index.evict_all().clear()
        return self._pool.trim()


def _span_of(entry: Entry) -> Span:
    lease = cast(Lease, entry.lease)
    return Span(lease.slab, lease.offset, lease.nbytes)


def _is_pending(entry: Entry) -> bool:
    return entry.completion is not None and not entry.completion.is_done
