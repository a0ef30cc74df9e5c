"""Makes room in a pool: asks the index who may go, the pool where that leaves consecutive bytes, and lets those go."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

import torch

from gpu_cache.index.entry import Candidate, Parked
from gpu_cache.index.index import ShardIndex
from gpu_cache.pool.eviction import Span, choose
from gpu_cache.pool.slab import SlabPool

_ATTEMPTS = 3  # a choice is outdated when somebody took, or took hold of, a block of it meanwhile

_FEW = 1024  # are looked at first: about twice the shards of a run, if these are small; 2 ms, our measurement


class RoomMaker:
    """Evicts from one pool.

    Args:
        index: Of the entries.
        pool: That their blocks are in.
        refuge: Copies victims to another tier; gives what it had room for, by key.
        parked: Whether the pool is the host tier's.
    Thread-safety: any thread. The choice is made outside of every lock, and checked under the index's.
    """

    def __init__(
        self,
        index: ShardIndex,
        pool: SlabPool,
        refuge: Callable[[Sequence[Candidate]], Mapping[Hashable, Parked]] = lambda victims: {},
        *,
        parked: bool = False,
    ) -> None:
        self._index, self._pool, self._refuge, self._parked = index, pool, refuge, parked

    def make(self, nbytes: int) -> int:
        """Evict what makes room for a run, when what was freed by then is reusable; or nothing, if that cannot be.

        Returns:
            The longest run that room was, or could be, made for: at least `nbytes` if it was.
        """
        if not self._pool.can_reuse:  # what is evicted now would stay out of use, nobody knows how long
            return self._pool.stats()["device_largest_free_bytes"]
        for _ in range(_ATTEMPTS):
            victims, most_bytes = self._choose(nbytes)
            if victims is None:
                return most_bytes
            if self._evict(victims):
                break
        return nbytes

    def _choose(self, nbytes: int) -> tuple[list[Candidate] | None, int]:
        """Victims among the oldest; among more, as long as these are not enough: the index is locked meanwhile."""
        most = _FEW
        while True:
            candidates = self._index.candidates(most, parked=self._parked)
            candidates.sort(key=_is_pending)  # the last to go are those whose copy is under way; the fence covers it
            plan = choose(nbytes, [_span_of(one) for one in candidates], self._pool.layout())
            if plan.victims is not None:
                return [candidates[number] for number in plan.victims], nbytes
            if len(candidates) < most:
                return None, plan.most_bytes
            most *= 8

    def empty(self) -> None:
        """Evict everything, also what is held: its bytes are free when the last alias is gone."""
        for _ in range(_ATTEMPTS):
            if self._evict(self._index.candidates(held=True), held=True):
                break

    def _evict(self, victims: list[Candidate], *, held: bool = False) -> bool:
        """Evict all of these, or none; the list is empty afterwards.

        A block that a reader wrote into, or may write into while it is copied, is no copy of its shard's bytes.
        """
        movable = [one for one in victims if not (one.entry.is_changed or one.is_held)]
        loans: list[torch.Tensor | None] = []
        if not self._index.evict(victims, self._refuge(movable), parked=self._parked, held=held, loans=loans):
            return False
        movable.clear()
        tensors = [one.base for one in victims] + [loan for loan in loans if loan is not None]
        loans.clear()
        victims.clear()  # with them the entries die
        self._pool.husks.strip(tensors)
        return True


def _span_of(one: Candidate) -> Span:
    return Span(one.lease.slab, one.lease.offset, one.lease.nbytes)


def _is_pending(one: Candidate) -> bool:
    return one.completion is not None and not one.completion.is_done
