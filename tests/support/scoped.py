"""Shards that the tests of scopes fetch."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from gpu_cache import CacheConfig, TensorCache
from tests.support.sources import DictSource

CONFIG = CacheConfig(
    slab_bytes="2MiB", pool_bytes="8MiB", prealloc_bytes=0, staging_slots=2, staging_slot_bytes="256KiB",
    run_bytes="64KiB",
)  # fmt: skip
SOURCE = DictSource({name: torch.full((100,), number) for number, name in enumerate("abcdefgh")})  # of 800 bytes


def fetch(cache: TensorCache, keys: str, *, keep: bool = False) -> list[torch.Tensor]:
    return cache.get_many(list(keys), SOURCE, keep=keep)


def fetch_and_fail(cache: TensorCache) -> None:
    fetch(cache, "ab")
    raise ZeroDivisionError


def names(keys: list[Hashable]) -> str:
    return "".join(sorted(map(str, keys)))


def device_bytes(cache: TensorCache) -> int:
    cache.synchronize()
    return cache.buffer_stats()["device_bytes"]
