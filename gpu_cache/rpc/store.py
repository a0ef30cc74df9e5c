"""The owner's tensors, by shard id."""

from __future__ import annotations

import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, MutableMapping
from typing import TypeVar

import torch

from gpu_cache.rpc.wire.frame import OwnedShard

KeyT = TypeVar("KeyT", bound=Hashable)


class ShardStore(MutableMapping[Hashable, torch.Tensor]):
    """Tensors kept for remote readers until they are removed.

    A mapping, so that code which knows upstream's plain dict finds what it expects; the operations named below are
    each atomic, and what `MutableMapping` builds from them (`setdefault`, `popitem`) is not.

    Args:
        now: Seconds, monotonic; shards are dated by it.
    Thread-safety: any thread.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        # Guards _entries, _total_bytes.
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, OwnedShard] = OrderedDict()  # in the order of their dates
        self._total_bytes = 0
        self._numbers = itertools.count(1)

    def put(self, shard_id: Hashable, tensor: torch.Tensor) -> None:
        """Keep a tensor as it is, without a copy; replaces what the id named before."""
        entry = OwnedShard(tensor)
        entry.number(next(self._numbers))
        with self._lock:
            previous = self._entries.pop(shard_id, None)
            entry.stored_at = self._now()
            self._entries[shard_id] = entry
            self._total_bytes += entry.nbytes - (previous.nbytes if previous else 0)
        # `previous` may be the last reference; it dies here, outside the lock.

    def get_many(self, shard_ids: Iterable[KeyT]) -> tuple[list[tuple[KeyT, OwnedShard]], list[KeyT]]:
        """Look up several shards at one moment: either all are from before a concurrent `remove`, or all from after.

        Args:
            shard_ids: Repeats are answered repeatedly.

        Returns:
            The pairs found and the ids missing, each in the order asked for.
        """
        wanted = list(shard_ids)
        with self._lock:
            entries = [self._entries.get(shard_id) for shard_id in wanted]
        found = [(shard_id, entry) for shard_id, entry in zip(wanted, entries, strict=True) if entry]
        missing = [shard_id for shard_id, entry in zip(wanted, entries, strict=True) if entry is None]
        return found, missing

    def remove(self, shard_ids: Iterable[object]) -> int:
        """Forget shards.

        Args:
            shard_ids: Unknown ids, and things that cannot be ids, are passed over.

        Returns:
            The number of shards that were there.
        """
        unwanted = list(shard_ids)
        removed = []
        with self._lock:
            for shard_id in unwanted:
                try:
                    entry = self._entries.pop(shard_id, None)
                except TypeError:  # unhashable
                    continue
                if entry is not None:
                    removed.append(entry)
                    self._total_bytes -= entry.nbytes
        return len(removed)

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
        return [(shard_id, entry.nbytes) for shard_id, entry in removed]

    def stats(self) -> dict[str, int]:
        """`num_tensors` and `total_bytes`, of one moment. Kept as they change: asking costs nothing."""
        with self._lock:
            return {"num_tensors": len(self._entries), "total_bytes": self._total_bytes}

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            dropped, self._entries, self._total_bytes = self._entries, OrderedDict(), 0
        dropped.clear()

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


def _not_found(shard_id: object) -> KeyError:
    return KeyError(f"Shard {shard_id} not found in storage")
