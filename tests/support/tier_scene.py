"""Caches with a host tier on each kind of device, and runs of shards that fill them."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path

import torch

from gpu_cache import CacheConfig, TensorCache
from gpu_cache.device.host import HostDevice
from tests.support.cuda_devices import cuda_device
from tests.support.fake_cuda import FakeCuda
from tests.support.sim_device import SimDevice
from tests.support.sources import DictSource, GatedReader, same_bytes

KIB = 1 << 10
CONFIG = CacheConfig(
    slab_bytes=32 * KIB, pool_bytes=32 * KIB, prealloc_bytes=32 * KIB, host_tier_bytes=64 * KIB, staging_slots=2,
    staging_slot_bytes=16 * KIB, run_bytes=8 * KIB,
)  # fmt: skip
SHARDS: dict[Hashable, torch.Tensor] = {
    f"{run}{number}": torch.arange(ord(run) * number, ord(run) * number + 500, dtype=torch.int32)  # 2,000 bytes
    for run in "abcdefghijkl"
    for number in range(4)
}
KINDS = ["host", "staged host", "simulated", "fake cuda"]


def cache_on_fake(cuda: FakeCuda, tmp_path: Path, config: CacheConfig) -> Iterator[TensorCache]:
    """A cache on a fake GPU, for a fixture: says at the end what the fake found wrong."""
    device = cuda_device(cuda, tmp_path)
    cache = TensorCache(config, device=device)
    yield cache
    cache.close()
    device.fence_streams()
    assert not cuda.violations


def cache_on(kind: str, tmp_path: Path, config: CacheConfig) -> Iterator[TensorCache]:
    """A cache on one of `KINDS`, for a fixture: says at the end what the device found wrong."""
    if kind == "fake cuda":
        yield from cache_on_fake(FakeCuda(), tmp_path, config)
    elif kind == "simulated":
        simulated = SimDevice(seed=3)
        cache = TensorCache(config, device=simulated)
        yield cache
        cache.close()
        assert simulated.faults == []
    else:
        yield TensorCache(config, device=HostDevice(stages=kind == "staged host"))


def run_of(name: str) -> list[Hashable]:
    """The keys of a run, which takes 8 KiB."""
    return [f"{name}{number}" for number in range(4)]


def fill(cache: TensorCache, source: DictSource, names: str) -> None:
    """Get runs, one after the other, and drop them."""
    for name in names:
        got = cache.get_many(run_of(name), source)
        assert all(same_bytes(tensor, SHARDS[key]) for key, tensor in zip(run_of(name), got, strict=True))


def parked(cache: TensorCache) -> set[Hashable]:
    """The keys in the host tier."""
    below = cache._index.below
    assert below is not None
    return set(filter(below.has, cache.keys()))


def on_host(cache: TensorCache, source: DictSource, names: str, **options: object) -> list[torch.Tensor]:
    """Get runs on the host; bytes are right."""
    keys = [key for name in names for key in run_of(name)]
    got = cache.get_many(keys, source, prefer="host", **options)  # type: ignore[call-overload]
    assert all(same_bytes(tensor, SHARDS[key]) for key, tensor in zip(keys, got, strict=True))
    return list(got)


def is_in(pool_of: str, cache: TensorCache, tensors: Sequence[torch.Tensor]) -> bool:
    """Whether every tensor lies in the slabs of the device's pool ("device"), or of the tier's ("host")."""
    engine = cache._engine
    assert engine is not None
    assert engine.tier is not None
    pool = engine.pool if pool_of == "device" else engine.tier.pool
    begins = [(slab.arena.tensor.data_ptr(), slab.nbytes) for slab in pool._slabs]
    return all(any(0 <= one.data_ptr() - begin < nbytes for begin, nbytes in begins) for one in tensors)


def stands(readers: list[GatedReader], count: int) -> None:
    """Wait until so many readers were opened, and the last one stands at its gate."""
    while len(readers) < count:
        time.sleep(0.001)
    assert readers[count - 1].has_arrived.wait(30)


def wait_for_joins(cache: TensorCache, count: int) -> None:
    """Wait until so many look-ups joined a fetch of another call."""
    while cache.buffer_stats()["joined"] < count:
        time.sleep(0.001)
