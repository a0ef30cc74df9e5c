"""Handles as text, the form in which they cross process borders, and batches read through them."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Container, Sequence
from typing import Any, cast

from demo.trajectory import Trajectory
from gpu_cache.rpc import deserialize_value, serialize_value
from gpu_cache.rpc.rtensor import RTensor, clear_fetch_buffer, flatten_shard_ids


def to_text(handles: Any) -> str:
    """JSON of containers of handles, as an RPC would carry it."""
    return json.dumps(serialize_value(handles))


def from_text(text: str) -> Any:
    """New handles, all of them remote: whoever reads through them relies on the cache alone."""
    return deserialize_value(json.loads(text))


class RemoteBatch:
    """One step's trajectories, as the text that the workers sent. One thread.

    Args:
        texts: One for each worker: a list of trajectories of handles. Also an attribute, without what was dropped.
        is_cached: False: forget before each read what the last one brought, so that every read goes over the wire.
    Attributes:
        handles: The batch in handles that are never localized, for prefetching and clearing.
        shard_ids: Ids of all their tensors.
        nbytes: Bytes of the tensors that a read asks for, as the handles describe them.
        read_bytes: Bytes that the reads so far asked for.
        wait_s: Seconds that the reads waited for tensors; making handles of text is not counted.
    """

    def __init__(self, texts: Sequence[str], *, is_cached: bool) -> None:
        self.texts = list(texts)
        self.is_cached = is_cached
        self.handles = self._new_handles()
        self.shard_ids: list[Any] = flatten_shard_ids(self.handles)
        self.nbytes = _nbytes(self.handles)
        self.read_bytes = 0
        self.wait_s = 0.0

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to read."""
        return not self.texts

    def owners_of(self, shard_ids: Container[Any]) -> Counter[str]:
        """At how many of these shards each owner's address is."""
        shards = (tensor.shard for trajectory in self.handles for tensor in trajectory.values())
        return Counter(shard.node_addr for shard in shards if shard.shard_id in shard_ids)

    def drop_owner(self, address: str) -> int:
        """Read nothing of one owner's any more; returns its trajectories. They stay in `handles`, to be cleared."""
        by_text = {text: from_text(text) for text in self.texts}
        dropped = {text for text, owned in by_text.items() if next(iter(owned[0].values())).shard.node_addr == address}
        self.texts = [text for text in self.texts if text not in dropped]
        self.nbytes = _nbytes(self._new_handles())
        return sum(len(by_text[text]) for text in dropped)

    def read(self) -> list[Trajectory]:
        """The batch in tensors on the trainer's device, through handles of this read's own."""
        handles = self._new_handles()
        if not self.is_cached:
            clear_fetch_buffer(self.shard_ids)
        start = time.perf_counter()
        tensors = RTensor.localize(handles)
        self.wait_s += time.perf_counter() - start
        self.read_bytes += self.nbytes
        return cast(list[Trajectory], tensors)

    def _new_handles(self) -> list[dict[str, RTensor]]:
        return [trajectory for text in self.texts for trajectory in from_text(text)]


def _nbytes(handles: Sequence[dict[str, RTensor]]) -> int:
    return sum(tensor.data.nbytes for trajectory in handles for tensor in trajectory.values())
