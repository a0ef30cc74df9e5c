"""The trainer's side of the data plane: this process's cache, and the batch in handles."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from concurrent.futures import Executor
from typing import Any

import torch

from areal.infra.rpc import RTensor, deserialize_value, runtime
from areal.infra.rpc.rtensor import ClearReport, clear_fetch_buffer
from bench.exactness import BenchError
from bench.workloads import Workload
from gpu_cache.config import ALIGNMENT

_SLAB_BYTES = 256 << 20


class Trainer:
    """Reads one workload through a cache that is made for it.

    All slabs are taken and written once before anything is timed: page faults of fresh memory are in no figure.

    Args:
        workload: What will be read.
        handles: The batch in handles, as text.
        device: Where to cache.
    Attributes:
        cache: The cache.
        device: Where it is: "cpu", "cuda:0".
    """

    def __init__(self, workload: Workload, handles: str, device: str) -> None:
        self._num_shards = workload.num_shards
        self._handles = handles
        num_slabs = _num_slabs(workload)
        pool_bytes = num_slabs * _SLAB_BYTES
        self.cache = runtime.configure(
            device=device, slab_bytes=_SLAB_BYTES, prealloc_bytes=pool_bytes, pool_bytes=pool_bytes
        ).cache
        for number in range(num_slabs):
            self.cache.put(f"slab {number}", torch.ones(_SLAB_BYTES, dtype=torch.uint8))
        self.device = self.cache.device_name
        self.clear_cache()

    def new_handles(self) -> Any:
        """The batch in handles, all of them remote."""
        return deserialize_value(json.loads(self._handles))

    def uncached_handles(self) -> Any:
        """The same, with nothing cached."""
        clear_fetch_buffer()
        return self.new_handles()

    def cached_handles(self) -> Any:
        """The same, with everything cached."""
        RTensor.localize(self.new_handles())
        return self.new_handles()

    def localized_handles(self) -> Any:
        """The batch in handles that have their tensors."""
        handles = self.new_handles()
        RTensor.localize(handles)
        return handles

    @staticmethod
    def prefetch_and_localize(handles: Any) -> Any:
        """Fetch in the background, wait, and then read."""
        RTensor.prefetch(handles).result()
        return RTensor.localize(handles)

    @staticmethod
    def localize_in_parts(threads: Executor, num_parts: int, handles: Any) -> list[Any]:
        """Read the trajectories on several threads at once, each thread its share of them."""
        parts = list(threads.map(RTensor.localize, [handles[start::num_parts] for start in range(num_parts)]))
        return [parts[number % num_parts][number // num_parts] for number in range(len(handles))]

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

    def check_cleared(self, report: ClearReport) -> None:
        """Raise `BenchError` if anything is left."""
        left = [owner["num_tensors"] for owner in report.owners.values()]
        if not report.is_complete or report.num_shards != self._num_shards or any(left) or len(self.cache):
            raise BenchError(f"clear: left {len(self.cache)} shards here and {left} at the owner: {report.failures}")

    def check_pool(self) -> None:
        """Raise `BenchError` if the cache was too small: then something else was measured."""
        stats = self.stats()
        if stats["evictions"] or stats["overflows"] or stats["fetch_errors"]:
            raise BenchError(f"the cache was too small, or a fetch failed: {stats}")

    def close(self) -> None:
        """Give the memory back."""
        self.cache.close()


def _num_slabs(workload: Workload) -> int:
    """Enough for the batch, whatever is left unused at the end of each slab, and one more."""
    padded = sum(-(-nbytes // ALIGNMENT) * ALIGNMENT for nbytes in workload.shard_bytes)
    return -(-padded // (_SLAB_BYTES - max(workload.shard_bytes))) + 1
