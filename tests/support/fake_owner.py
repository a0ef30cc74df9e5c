"""An owner of shards that notes what its server asks of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from gpu_cache.rpc.store import ShardStore


class FakeOwner:
    def __init__(self) -> None:
        self.store = ShardStore()
        self.evicted: list[str] = []
        self.own_addresses: set[str] = set()
        self.trims = False
        self.eviction_error: Exception | None = None

    def put(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep copies that lie side by side, as `remotize` does."""
        for key, copy in zip(tensors, self.store.copies(list(tensors.values())), strict=True):
            self.store.put(key, copy)

    def evict(self, shard_ids: Sequence[str]) -> int:
        if self.eviction_error is not None:
            raise self.eviction_error
        self.evicted += shard_ids
        return len(shard_ids)

    def trim(self) -> bool:
        return self.trims

    def add_own_address(self, address: str) -> None:
        self.own_addresses.add(address)

    def remove_own_address(self, address: str) -> None:
        self.own_addresses.discard(address)
