"""Shared by the tests on a real GPU: small caches, shards of one value, streams that are busy for a while."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import torch

from gpu_cache import CacheConfig, TensorCache
from gpu_cache.config import ReadyMode
from gpu_cache.device.cuda import CudaDevice
from gpu_cache.pool.fence import StreamFence
from tests.support.sources import DictSource

MIB = 1 << 20
GPU = torch.device("cuda:0")
# 0.1 s at an H100's fastest clock, 0.6 s at its slowest: far longer than the calls that race with it.
LONG_CYCLES = 200_000_000
# Free memory may move so far without us: kernels load at their first launch, the driver takes its own.
SLACK_BYTES = 16 * MIB
SHARD_BYTES = 4 * MIB
_REAPERS_ROUNDS_S = 0.1  # a few of them, in tests


def small_cache(**settings: Any) -> TensorCache:
    """A cache on the first GPU whose pool holds one shard and is kept while empty, unless `settings` say otherwise.

    A slab that goes back to the driver would hide a race, because that waits for the device.
    """
    torch.cuda.init()
    return TensorCache(small_config(**settings))


def small_config(**settings: Any) -> CacheConfig:
    """Settings of such a cache."""
    defaults = {
        "device": str(GPU),
        "slab_bytes": SHARD_BYTES,
        "pool_bytes": SHARD_BYTES,
        "prealloc_bytes": SHARD_BYTES,
        "run_bytes": SHARD_BYTES,
        "staging_slots": 3,
        "staging_slot_bytes": SHARD_BYTES,
        "fetch_timeout_s": 30.0,
    }
    return CacheConfig(**{**defaults, **settings})


def roomy_cache(**settings: Any) -> TensorCache:
    """A cache on the first GPU with slabs of 64 MiB, which memory figures show well; keeps none while empty."""
    defaults = {"slab_bytes": 64 * MIB, "pool_bytes": 512 * MIB, "prealloc_bytes": 0, "staging_slot_bytes": 16 * MIB}
    return small_cache(**{**defaults, **settings})


def filled(value: int, nbytes: int = SHARD_BYTES) -> torch.Tensor:
    """`(nbytes,)` uint8 on the host, each byte `value`."""
    return torch.full((nbytes,), value, dtype=torch.uint8)


def fetch(
    cache: TensorCache, key: Hashable, value: int, nbytes: int = SHARD_BYTES, ready: ReadyMode | None = None
) -> torch.Tensor:
    """Get one shard through the cache; `(nbytes,)` uint8 on the GPU, each byte `value`."""
    (tensor,) = cache.get_many([key], DictSource({key: filled(value, nbytes)}), ready=ready)
    return tensor


def allocate(cache: TensorCache) -> None:
    """Have the cache allocate what it needs for a shard: later, that may wait for a busy device."""
    fetch(cache, "first", 1)
    cache.clear()
    cache.synchronize()


def fetch_all(cache: TensorCache, sizes: dict[Hashable, int]) -> list[torch.Tensor]:
    """Get shards of so many bytes, with their number in `sizes`, modulo 256, as their value."""
    shards: dict[Hashable, torch.Tensor] = {key: filled(at % 256, sizes[key]) for at, key in enumerate(sizes)}
    return cache.get_many(list(shards), DictSource(shards))


def is_all(tensor: torch.Tensor, value: int) -> bool:
    """Whether each element is `value`; takes hardly any memory beside the tensor's."""
    least, most = torch.aminmax(tensor)
    return least.item() == most.item() == value


def keep_busy(stream: torch.cuda.Stream, cycles: int = LONG_CYCLES) -> None:
    """Enqueue a kernel that takes so many clock cycles, and touches no memory."""
    with torch.cuda.stream(stream):
        torch.cuda._sleep(cycles)


def load_kernels(*streams: torch.cuda.Stream) -> None:
    """Launch what scenes launch once before: a kernel is loaded at its first launch, which waits for a busy device.

    Source: CUDA C++ Programming Guide, "Lazy Loading", potential hazards.
    """
    for stream in (torch.cuda.default_stream(GPU), *streams):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1)
            some = torch.zeros(SHARD_BYTES, dtype=torch.uint8, device=GPU)
            assert is_all(torch.empty_like(some).copy_(some).add_(some), 0)
    torch.cuda.synchronize(GPU)


def free_bytes() -> int:
    """Free device memory, when nothing is under way."""
    torch.cuda.synchronize(GPU)
    return int(torch.cuda.mem_get_info(GPU)[0])


def steady_free_bytes() -> int:
    """The same, once it stays the same: reapers give back what died, a little later."""
    found, before = free_bytes(), -1
    while found != before:
        time.sleep(_REAPERS_ROUNDS_S)
        found, before = free_bytes(), found
    return found


def is_about(found: int, expected: int, slack_bytes: int = SLACK_BYTES) -> bool:
    """Whether two byte counts of the driver agree."""
    return abs(found - expected) <= slack_bytes


def fence_off() -> AbstractContextManager[Any]:
    """Reuse freed bytes at once, whatever still reads them."""
    return mock.patch.object(StreamFence, "record", return_value=[])


class Rig:
    """The first GPU as scenes and checks use it. Makes no CUDA call before one is asked for.

    Tests of the scenes put a fake or a simulated device in its place.

    Attributes:
        where: The device of tensors that torch makes there.
        cuda: Torch's CUDA module.
        mib: Bytes that large sizes are multiples of; smaller on a fake.
        hurry: Divides how often something is repeated to be timed.
    """

    where: torch.device = GPU
    cuda: Any = torch.cuda
    mib = MIB
    hurry = 1

    @functools.cached_property
    def device(self) -> Any:
        """Ours."""
        return CudaDevice(0)

    def small_cache(self) -> TensorCache:
        """See `small_cache`."""
        return small_cache()

    def default_cache(self) -> TensorCache:
        """As a user gets it."""
        return TensorCache(CacheConfig(device=str(GPU)))

    def synchronize(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize(GPU)

    def times(self, number: int) -> int:
        """How often to repeat what is timed so many times on a GPU."""
        return max(1, number // self.hurry)

    def empty(self, nbytes: int) -> torch.Tensor:
        """`(nbytes,)` uint8 from torch's allocator."""
        return torch.empty(nbytes, dtype=torch.uint8, device=GPU)

    def free_bytes(self) -> int:
        """Free device memory, when nothing is under way."""
        self.synchronize()
        return int(self.device.memory_info()[0])

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether a host tensor is page-locked."""
        return tensor.is_pinned()

    def pinned_by_torch(self, nbytes: int) -> torch.Tensor:
        """`(nbytes,)` uint8 in torch's own pinned memory."""
        return torch.zeros(nbytes, dtype=torch.uint8).pin_memory()

    def launch(self) -> None:
        """Run a kernel and wait for it; raises what it reports."""
        float(torch.ones(4, device=GPU).sum())

    def apart(self, run: Callable[[], str], _here: Callable[[], str]) -> str:
        """Do something in a process of its own; a fake does the same here."""
        return run()

    @contextmanager
    def capturing(self) -> Iterator[Any]:
        """Capture a graph; gives it, to be replayed later."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            yield graph

    # A consumer's steps.

    def consumers(self) -> Sequence[Any]:
        """Streams as consumers have them."""
        return [torch.cuda.Stream(GPU, priority=priority) for priority in (0, 0, 0, -1)]

    def load_kernels(self, streams: Sequence[Any]) -> None:
        """See `load_kernels`."""
        load_kernels(*streams)

    def keep_busy(self, stream: Any, cycles: int = LONG_CYCLES) -> None:
        """See `keep_busy`."""
        keep_busy(stream, cycles)

    def current(self, stream: Any) -> AbstractContextManager[Any]:
        """Make a stream the calling thread's current one."""
        return torch.cuda.stream(stream)

    def is_idle(self, stream: Any) -> bool:
        """Whether everything on it is done."""
        return bool(stream.query())

    def blank(self, nbytes: int) -> torch.Tensor:
        """`(nbytes,)` uint8 on the device, for a consumer to write to."""
        return torch.zeros(nbytes, dtype=torch.uint8, device=GPU)

    def read(self, block: torch.Tensor, seen: torch.Tensor, stream: Any) -> None:
        """Enqueue a kernel that copies a block."""
        with torch.cuda.stream(stream):
            seen.copy_(block)

    def record_stream(self, block: torch.Tensor, stream: Any) -> None:
        """Tell torch's allocator that a stream uses a block."""
        block.record_stream(stream)


REAL = Rig()
