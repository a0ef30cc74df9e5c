"""An owner of shards that notes what its server asks of it."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_cache.rpc.store import ShardStore


class FakeOwner:
    def __init__(self) -> None:
        self.store = ShardStore()
        self.evicted: list[str] = []
        self.own_addresses: set[str] = set()
        self.trims = False
        self.eviction_error: Exception | None = None

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
