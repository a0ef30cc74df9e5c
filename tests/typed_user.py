"""A user's program, for `make check`: mypy accepts what is right, and finds a misspelt name."""

import torch

import gpu_cache
from gpu_cache import CacheConfig, ShardSource, TensorCache
from gpu_cache.rpc import RTensor, TensorShardInfo

cache = TensorCache(CacheConfig(pool_bytes="4GiB", slab_bytes=1 << 28, device="cpu"))
found: torch.Tensor | None = cache.get("a")
num_hits: int = cache.buffer_stats()["hits"]
grown: dict[str, float] = gpu_cache.stats_delta(cache.buffer_stats(), cache.buffer_stats())
handle = RTensor(TensorShardInfo("a", "host:1"), torch.empty(3, device="meta"))
local: torch.Tensor = handle.to_local(timeout_s=1.5)


def read(source: ShardSource) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    cache.get_many(["a"], source, on_error="skip")  # type: ignore[call-overload]
    return cache.get_many(["a"], source), cache.get_many(["a"], source, on_error="none")


# Each of these is an error; mypy would complain about an `ignore` that it does not need.
gpu_cache.TensorCash  # type: ignore[attr-defined]
from gpu_cache import CacheConfg  # type: ignore[attr-defined]
from gpu_cache.rpc import RTensr  # type: ignore[attr-defined]

CacheConfig(pool_byte="4GiB")  # type: ignore[call-arg]
CacheConfig(pool_bytes=4.5)  # type: ignore[arg-type]

# `localize` keeps static types.
one: torch.Tensor = RTensor.localize(handle)
many: list[torch.Tensor] = RTensor.localize([handle])
batch: dict[str, torch.Tensor] = RTensor.localize({"a": handle}, keep=True)
same: torch.Tensor = RTensor.localize(torch.ones(3))
RTensor.localize([handle]).shape  # type: ignore[attr-defined]
nested: int = RTensor.localize({"a": [handle]})  # any type: containers of containers are not followed
lacking: list[torch.Tensor | None] = RTensor.localize([handle], on_error="none")
