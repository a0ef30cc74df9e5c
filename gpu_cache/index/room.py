"""Makes room in a pool. The index names entries that may go, the pool its free ranges; the choice is `eviction`'s."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

from gpu_cache.index.entry import Candidate
from gpu_cache.index.index import ShardIndex
from gpu_cache.pool.block import Copy
from gpu_cache.pool.eviction import Span, choose
from gpu_cache.pool.slab import SlabPool

_ATTEMPTS = 3  # a choice is outdated when another thread took, or a reader holds, a block of it meanwhile

_FEW = 1024  # are looked at first: about twice the shards of a run, if these are small; 2 ms, our measurement


class RoomMaker:
    """Evicts shards of one level.

    Args:
        index: The level's.
        pool: The level's.
        refuge: Copies victims to the level below, and returns the copies that had room, by key; None: there is none.
    Thread-safety: any thread. The choice is made outside of every lock, and checked under the index's.
    """

    def __init__(
        self,
        index: ShardIndex,
        pool: SlabPool,
        refuge: Callable[[Sequence[Candidate]], Mapping[Hashable, Copy]] | None = None,
    ) -> None:
        self._index, self._pool, self._refuge = index, pool, refuge

    def make(self, nbytes: int) -> int:
        """Evict shards so that a run has room once the freed bytes are reusable; or none, if that cannot be.

        Returns:
            The longest run that room could be made for; at least `nbytes` if room was made.
        """
        if not self._pool.can_reuse:  # evicted bytes would stay out of use for an unknown time
            return self._pool.stats()["device_largest_free_bytes"]
        for _ in range(_ATTEMPTS):
            victims, most_bytes = self._choose(nbytes)
            if victims is None:
                return most_bytes
            if self._evict(victims):
                break
        return nbytes

    def _choose(self, nbytes: int) -> tuple[list[Candidate] | None, int]:
        """Choose among the oldest entries; among more, if these are not enough: the index is locked meanwhile."""
        most = _FEW
        while True:
            candidates = self._index.candidates(most)
            candidates.sort(key=_is_pending)  # those whose copy is under way go last; the fence covers it
            plan = choose(nbytes, [_span_of(one) for one in candidates], self._pool.layout())
            if plan.victims is not None:
                return [candidates[number] for number in plan.victims], nbytes
            if len(candidates) < most:
                return None, plan.most_bytes
            most *= 8

    def empty(self) -> None:
        """Evict everything, also held shards. Their bytes are free when the last alias is gone."""
        self._evict(self._index.candidates(held=True), held=True)

    def _evict(self, victims: list[Candidate], *, held: bool = False) -> bool:
        """Evict all of these, or none; with `held` those that are still there. The list is empty afterwards.

        A block that a reader wrote into, or may write into during the copy, is not copied below.
        """
        movable = [one for one in victims if not (one.entry.is_changed or one.is_held)]
        if not self._index.evict(victims, self._refuge(movable) if self._refuge else {}, held=held):
            return False
        movable.clear()
        tensors = [tensor for one in victims for tensor in one.copy.tensors]
        victims.clear()  # the entries and their copies die with it; no call is about to hand one out
        self._pool.husks.strip(tensors)
        return True


def _span_of(one: Candidate) -> Span:
    lease = one.copy.lease
    assert lease is not None
    return Span(lease.slab, lease.offset, lease.nbytes)


def _is_pending(one: Candidate) -> bool:
    return one.copy.completion is not None and not one.copy.completion.is_done
