"""The trainer's side of the data plane: this process's cache, and the batch in handles."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from bench.exactness import BenchError
from bench.workloads import Workload
from gpu_cache import CacheConfig, TensorCache
from gpu_cache.config import ALIGNMENT
from gpu_cache.rpc import RTensor, deserialize_value, runtime
from gpu_cache.rpc.client.http import HttpRTensorBackend
from gpu_cache.rpc.rtensor import ClearReport, clear_fetch_buffer

_SLAB_BYTES = 256 << 20
_NUM_READS = 5  # of a batch in a step, as in the demo
_STAGING_WAIT_S = 60.0
NUM_SINGLE = 16  # shards that are read by a call each


class Trainer:
    """Reads one workload through a cache of its own.

    Args:
        workload: What will be read.
        handles: The batch in handles, as text.
        config: Settings of the cache.
        same_host: Whether the owner's memory is read; else shards come over HTTP.
    Attributes:
        cache: The cache.
    """

    def __init__(self, workload: Workload, handles: str, config: CacheConfig, *, same_host: bool = False) -> None:
        self._num_shards = workload.num_shards
        self._handles = handles
        self.cache = TensorCache(config)
        self._backend = HttpRTensorBackend(same_host=same_host)

    @classmethod
    def at_defaults(cls, workload: Workload, handles: str, *, same_host: bool = False) -> Trainer:
        """With the settings that a user gets, but for `same_host`; takes nothing before its first read."""
        return cls(workload, handles, CacheConfig(), same_host=same_host)

    @classmethod
    def tuned(cls, workload: Workload, handles: str, device: str) -> Trainer:
        """With everything preallocated.

        All slabs and staging buffers are taken and written once before anything is timed: page faults of fresh memory
        are in no figure.
        """
        num_slabs = _num_slabs(workload)
        pool_bytes = num_slabs * _SLAB_BYTES
        config = CacheConfig(device=device, slab_bytes=_SLAB_BYTES, prealloc_bytes=pool_bytes, pool_bytes=pool_bytes)
        trainer = cls(workload, handles, config)
        for number in range(num_slabs):
            trainer.cache.put(f"slab {number}", torch.ones(_SLAB_BYTES, dtype=torch.uint8))
        trainer.clear_cache()
        trainer._take_staging()
        return trainer

    @property
    def device(self) -> str:
        """Where the cache is: "cpu", "cuda:0"; "" before the first use."""
        return self.cache.device_name

    def select(self) -> None:
        """Make handles of this process use this trainer's cache and connections."""
        runtime.current().cache = self.cache
        runtime.current().set_backend(self._backend)

    def new_handles(self) -> Any:
        """The batch in handles, all of them remote; reads use this trainer's cache from now on."""
        self.select()
        return deserialize_value(json.loads(self._handles))

    def uncached_handles(self) -> Any:
        """The same, with nothing cached."""
        self.select()
        clear_fetch_buffer()
        return self.new_handles()

    def small_uncached_handles(self) -> list[RTensor]:
        """Some of the smallest of them, remote, with nothing cached."""
        handles = [handle for trajectory in self.uncached_handles() for handle in trajectory.values()]
        self.clear_cache()  # what an earlier path has cached is not given back amid this one
        return sorted(handles, key=lambda handle: handle.shape.numel() * handle.dtype.itemsize)[:NUM_SINGLE]

    def cached_handles(self) -> Any:
        """The same, with everything cached."""
        RTensor.localize(self.new_handles())
        return self.new_handles()

    def localized_handles(self) -> Any:
        """The batch in handles that have their tensors."""
        handles = self.new_handles()
        RTensor.localize(handles)
        return handles

    def step_handles(self) -> list[Any]:
        """The batch in handles for each read of a step; and once more, for its fetch and its clear."""
        self.clear_cache()
        return [self.new_handles() for _ in range(_NUM_READS + 1)]

    def step(self, handles: list[Any]) -> ClearReport:
        """One step as the demo has it: fetch, five reads, each of which drops the one before, and clear."""
        deque(self.reads(handles), maxlen=0)
        return self.clear(handles[0])

    @staticmethod
    def reads(handles: list[Any]) -> Iterator[Any]:
        """Fetch, and read five times; each read's handles are dropped."""
        RTensor.prefetch(handles[0]).result()
        while len(handles) > 1:
            yield RTensor.localize(handles.pop())

    @staticmethod
    def clear(handles: Any) -> ClearReport:
        """End a step: evict here, delete at the owner."""
        return asyncio.run(RTensor.clear_everywhere(handles))

    def clear_cache(self) -> None:
        """Leave nothing cached, and every byte free."""
        self.cache.clear()
        self.cache.synchronize()

    def stats(self) -> Mapping[str, Any]:
        """Figures of the cache."""
        return self.cache.buffer_stats()

    def check_cleared(self, path: str, report: ClearReport) -> None:
        """Raise `BenchError` if anything is left."""
        left = [owner["num_tensors"] for owner in report.owners.values()]
        if not report.is_complete or report.num_shards != self._num_shards or any(left) or len(self.cache):
            raise BenchError(f"{path}: left {len(self.cache)} shards here and {left} at the owner: {report.failures}")

    def check_pool(self) -> None:
        """Raise `BenchError` if the cache was too small: then something else was measured."""
        stats = self.stats()
        if stats["evictions"] or stats["overflows"] or stats["fetch_errors"]:
            raise BenchError(f"the cache was too small, or a fetch failed: {stats}")

    def close(self) -> None:
        """Give memory and connections back."""
        self.cache.close()
        self._backend.close()

    def _take_staging(self) -> None:
        """Take every staging buffer once: how many a fetch needs at a time depends on threads' luck."""
        engine = self.cache._engine
        if engine is not None and engine.staging is not None:
            slots = [engine.staging.acquire(_STAGING_WAIT_S) for _ in range(engine.config.staging_slots)]
            for slot in slots:
                engine.staging.release(slot)


def _num_slabs(workload: Workload) -> int:
    """Enough for the batch, whatever is left unused at the end of each slab, and one more."""
    padded = sum(-(-nbytes // ALIGNMENT) * ALIGNMENT for nbytes in workload.shard_bytes)
    return -(-padded // (_SLAB_BYTES - max(workload.shard_bytes))) + 1
