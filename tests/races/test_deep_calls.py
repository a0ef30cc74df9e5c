"""Calls near the end of the stack: they raise RecursionError before they change anything, or they do not raise."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from concurrent.futures import wait

import pytest
import torch

from gpu_cache import CacheConfig, TensorCache
from gpu_cache.device.host import HostDevice
from tests.support.sources import DictSource, same_bytes

CONFIG = CacheConfig(
    slab_bytes="64KiB", pool_bytes="256KiB", prealloc_bytes=0, host_tier_bytes="64KiB", staging_slots=1,
    staging_slot_bytes="16KiB", run_bytes="8KiB", stats=False,
)  # fmt: skip
SHARDS = {name: torch.arange(100) + number for number, name in enumerate("abcd")}
MOST_FRAMES = 120  # more than any call needs


def scoped(cache: TensorCache, source: DictSource) -> None:
    with cache.scope():
        cache.get_many(["c"], source)


CALLS: dict[str, Callable[[TensorCache, DictSource], object]] = {
    "get_many": lambda cache, source: cache.get_many(["c", "d"], source),
    "get": lambda cache, source: cache.get("a"),
    "prefetch": lambda cache, source: wait([cache.prefetch(["c"], source)], 30),
    "put": lambda cache, source: cache.put("own", SHARDS["a"]),
    "clear": lambda cache, source: cache.clear(),
    "clear_node": lambda cache, source: cache.clear_node("node-a:1"),
    "scope": scoped,
    "offload": lambda cache, source: cache.offload(),
    "trim": lambda cache, source: cache.trim(),
    "synchronize": lambda cache, source: cache.synchronize(),
}


def descend(num_frames: int, then: Callable[[], object]) -> object:
    return descend(num_frames - 1, then) if num_frames else then()


def is_refused(left: int, call: Callable[[], object]) -> bool:
    """Whether a call raises RecursionError where about so many frames are left."""
    try:
        descend(sys.getrecursionlimit() - len(inspect.stack(0)) - left, call)
    except RecursionError:
        return True
    return False


@pytest.mark.parametrize("stages", [False, True], ids=["direct", "staged"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_call_deep_in_the_stack_leaves_a_cache_that_works(
    call: Callable[[TensorCache, DictSource], object], stages: bool
) -> None:
    source = DictSource(SHARDS)
    refused = []
    for left in range(5, MOST_FRAMES, 2):
        cache = TensorCache(CONFIG, device=HostDevice(stages=stages))
        cache.get_many(["a", "b"], source)
        refused.append(is_refused(left, lambda cache=cache: call(cache, source)))  # type: ignore[misc]
        got = cache.get_many(list(SHARDS), source, timeout_s=30)
        assert all(map(same_bytes, got, SHARDS.values()))
        del got
        cache.clear()
        cache.synchronize()
        assert cache.buffer_stats()["device_bytes"] == 0
        assert cache._index.is_empty
        cache.close()
    assert refused[0]
    assert not refused[-1]
