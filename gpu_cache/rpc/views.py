"""Mappings that show this process's cache and store under upstream's private names. They hold no state."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, MutableMapping
from typing import Any

import torch

from gpu_cache.device.modes import plain_tensors
from gpu_cache.rpc import runtime
from gpu_cache.rpc.wire.serialization import check_stored


class FetchBufferView(MutableMapping[Hashable, torch.Tensor]):
    """The cache of `runtime.current()` as a mapping from shard id to tensor.

    Thread-safety: any thread; what `MutableMapping` builds from several calls (`setdefault`, `popitem`) is not atomic.
    """

    def __getitem__(self, key: Hashable) -> torch.Tensor:
        tensor = runtime.current().cache.get(key)
        if tensor is None:
            raise KeyError(key)
        return tensor

    def __setitem__(self, key: Hashable, tensor: torch.Tensor) -> None:
        cache = runtime.current().cache
        cache.clear([key])
        with plain_tensors():
            cache.put(key, tensor.detach().cpu())

    def __delitem__(self, key: Hashable) -> None:
        if not runtime.current().cache.clear([key]):
            raise KeyError(key)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, Hashable) and key in runtime.current().cache

    def __iter__(self) -> Iterator[Hashable]:
        return iter(runtime.current().cache.keys())

    def __len__(self) -> int:
        return len(runtime.current().cache)

    def pop(self, key: Hashable, *default: Any) -> Any:
        """As of a dict, also where another thread evicts the shard meanwhile."""
        tensor = runtime.current().cache.get(key)
        if tensor is not None:
            runtime.current().cache.clear([key])
        elif not default:
            raise KeyError(key)
        return default[0] if tensor is None else tensor

    def clear(self) -> None:
        """Flush the cache."""
        runtime.current().cache.clear()

    def __repr__(self) -> str:
        return f"FetchBufferView({len(self)} shards)"


class StorageView(MutableMapping[Hashable, torch.Tensor]):
    """The store of `runtime.current()` as a mapping from shard id to tensor. Thread-safety: as `ShardStore`."""

    def __getitem__(self, key: Hashable) -> torch.Tensor:
        return runtime.current().store[key]

    def __setitem__(self, key: Hashable, tensor: torch.Tensor) -> None:
        check_stored(tensor)
        runtime.current().store[key] = tensor

    def __delitem__(self, key: Hashable) -> None:
        del runtime.current().store[key]

    def __contains__(self, key: object) -> bool:
        return key in runtime.current().store

    def __iter__(self) -> Iterator[Hashable]:
        return iter(runtime.current().store)

    def __len__(self) -> int:
        return len(runtime.current().store)

    def clear(self) -> None:
        """Forget everything that this process owns."""
        runtime.current().store.clear()

    def __repr__(self) -> str:
        return f"StorageView({len(self)} shards)"


class StorageStatsView(Mapping[Hashable, int]):
    """The bytes of each shard of the store, by id. Thread-safety: as `ShardStore`."""

    def __getitem__(self, key: Hashable) -> int:
        return runtime.current().store[key].nbytes

    def __iter__(self) -> Iterator[Hashable]:
        return iter(runtime.current().store)

    def __len__(self) -> int:
        return len(runtime.current().store)

    def clear(self) -> None:
        """Nothing: upstream's tests clear it beside the store, whose figures it shows."""

    def __repr__(self) -> str:
        return f"StorageStatsView({len(self)} shards)"
