"""The owner's tensors, by shard id."""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, MutableMapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from gpu_cache.errors import several
from gpu_cache.process import no_interrupts
from gpu_cache.rpc.segments import Segments
from gpu_cache.rpc.wire.frame import OwnedShard
from gpu_cache.rpc.wire.records import record_of
from gpu_cache.rpc.wire.serialization import bytes_for_now, is_dense

KeyT = TypeVar("KeyT", bound=Hashable)

_SHORT_BYTES = 256 << 10  # copied within 0.1 ms


class ShardStore(MutableMapping[Hashable, torch.Tensor]):
    """Tensors kept for remote readers until they are removed.

    A mapping, as code that knows upstream's plain dict expects. The operations named below are each atomic; those that
    `MutableMapping` builds from them (`setdefault`, `popitem`) are not.

    Args:
        now: Seconds, monotonic; shards are dated by it.
        segments: Where copies are made, so that other processes of this host can map them.
    Attributes:
        num_removals: Calls of `remove` and `clear` that found a shard. Shards that got too old are not counted: they
            were due to be cleared long before.
    Thread-safety: any thread.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic, segments: Segments | None = None) -> None:
        self._now = now
        self.segments = Segments() if segments is None else segments
        # Guards _entries, _total_bytes, num_removals.
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, OwnedShard] = OrderedDict()  # in the order of their dates
        self._total_bytes = self.num_removals = 0
        self._numbers = itertools.count(1)

    def put(self, shard_id: Hashable, tensor: torch.Tensor) -> None:
        """Keep a tensor as it is, without a copy; replaces what the id named before."""
        self._put_all([shard_id], [OwnedShard(tensor)])

    def put_copies(self, shard_ids: Iterable[Hashable], tensors: Sequence[torch.Tensor]) -> None:
        """Keep dense copies in host memory, all or none. A caller may change the originals afterwards.

        The copies lie side by side where other processes of this host can map them, as far as there is such memory.

        Args:
            shard_ids: One for each; replaces what it named before.
            tensors: Of dtypes that travel.
        """
        self._put_all(shard_ids, self._copied(tensors))

    def copies(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Make the copies of `put_copies` for a caller that puts them here itself."""
        return [shard.tensor for shard in self._copied(tensors)]

    def _copied(self, tensors: Sequence[torch.Tensor]) -> list[OwnedShard]:
        memories = iter(self.segments.take([tensor.nbytes for tensor in tensors if tensor.nbytes]))
        return [copied(tensor, next(memories) if tensor.nbytes else None) for tensor in tensors]

    def _put_all(self, shard_ids: Iterable[Hashable], shards: Sequence[OwnedShard]) -> None:
        for shard in shards:
            shard.number(next(self._numbers))
            self._describe(shard)
        replaced = []
        with no_interrupts, self._lock:
            now = self._now()
            for shard_id, shard in zip(shard_ids, shards, strict=True):
                if (previous := self._entries.pop(shard_id, None)) is not None:
                    self._total_bytes -= previous.nbytes
                    replaced.append(previous)
                shard.stored_at = now
                self._entries[shard_id] = shard
                self._total_bytes += shard.nbytes
        # Those replaced may have had their last reference here; they die outside the lock.

    def find(self, shard_ids: Iterable[Hashable]) -> list[OwnedShard | None]:
        """Look up several shards at one moment, as `get_many`; None for each that is not here."""
        with self._lock:
            return list(map(self._entries.get, shard_ids))

    def get_many(self, shard_ids: Iterable[KeyT]) -> tuple[list[tuple[KeyT, OwnedShard]], list[KeyT]]:
        """Look up several shards at one moment: either all are from before a concurrent `remove`, or all from after.

        Args:
            shard_ids: Repeats are answered repeatedly.

        Returns:
            The pairs found and the ids missing, each in the order asked for.
        """
        wanted = list(shard_ids)
        pairs = list(zip(wanted, self.find(wanted), strict=True))
        return [(key, one) for key, one in pairs if one], [key for key, one in pairs if one is None]

    def remove(self, shard_ids: Iterable[object]) -> int:
        """Forget shards.

        Args:
            shard_ids: Unknown ids, and things that cannot be ids, are passed over.

        Returns:
            The number of shards that were there.
        """
        unwanted = several(shard_ids)
        removed = []
        with no_interrupts, self._lock:
            for shard_id in unwanted:
                try:
                    entry = self._entries.pop(shard_id, None)
                except TypeError:  # unhashable
                    continue
                if entry is not None:
                    removed.append(entry)
                    self._total_bytes -= entry.nbytes
            self.num_removals += bool(removed)
        entry, num_removed = None, len(removed)
        removed.clear()  # their memory is free when it is looked at
        self.segments.settle(ends_step=num_removed > 0)
        return num_removed

    def remove_stored_before(self, moment: float) -> list[tuple[Hashable, int]]:
        """Forget what was stored before a moment of this store's clock; returns ids and bytes, oldest first.

        Looks at what it removes, and at one more.
        """
        removed: list[tuple[Hashable, OwnedShard]] = []
        with self._lock:
            while self._entries and (oldest := next(iter(self._entries.items())))[1].stored_at < moment:
                removed.append(oldest)
                del self._entries[oldest[0]]
                self._total_bytes -= oldest[1].nbytes
        sizes = [(shard_id, entry.nbytes) for shard_id, entry in removed]
        removed.clear()
        self.segments.settle(ends_step=bool(sizes))
        return sizes

    def stats(self) -> dict[str, int]:
        """`num_tensors` and `total_bytes`, of one moment. Kept as they change: asking costs nothing."""
        with self._lock:
            return {"num_tensors": len(self._entries), "total_bytes": self._total_bytes}

    def clear(self) -> None:
        """Forget everything."""
        with no_interrupts, self._lock:
            dropped, self._entries, self._total_bytes = self._entries, OrderedDict(), 0
            self.num_removals += bool(dropped)
        dropped.clear()
        self.segments.settle(ends_step=True)

    def _describe(self, entry: OwnedShard) -> None:
        """Say where it is, if other processes can map it."""
        if entry.memory is None:
            return
        place = self.segments.locate(_address(entry.memory), entry.nbytes) if entry.nbytes else (0, 0)
        if place is not None:
            entry.record = record_of(entry.dtype, entry.shape, *place)

    def __getitem__(self, shard_id: Hashable) -> torch.Tensor:
        with self._lock:
            entry = self._entries.get(shard_id)
        if entry is None:
            raise _not_found(shard_id)
        return entry.tensor

    def __setitem__(self, shard_id: Hashable, tensor: torch.Tensor) -> None:
        self.put(shard_id, tensor)

    def __delitem__(self, shard_id: Hashable) -> None:
        if not self.remove([shard_id]):
            raise _not_found(shard_id)

    def __contains__(self, shard_id: object) -> bool:
        with self._lock:
            return shard_id in self._entries

    def __iter__(self) -> Iterator[Hashable]:
        """Over the ids of this moment; storing meanwhile is fine."""
        with self._lock:
            return iter(list(self._entries))

    def __len__(self) -> int:
        with self._lock:
            return len(self._entries)

    def __repr__(self) -> str:
        return "ShardStore(num_tensors={num_tensors:,}, total_bytes={total_bytes:,})".format(**self.stats())


def copied(tensor: torch.Tensor, memory: Any = None) -> OwnedShard:
    """A dense copy in host memory: in the array given, of as many bytes, or else in one of its own."""
    target = (np.empty(tensor.nbytes, np.uint8) if memory is None else memory).data
    shard = OwnedShard.over(target, tensor.dtype, tuple(tensor.shape))
    if tensor.nbytes <= _SHORT_BYTES and is_dense(tensor):
        target[:] = bytes_for_now(tensor)  # keeps the GIL: another thread may not give it back for 5 ms
    else:
        shard.tensor.copy_(tensor.detach())
    return shard


def _address(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _not_found(shard_id: object) -> KeyError:
    return KeyError(f"Shard {shard_id} not found in storage")
