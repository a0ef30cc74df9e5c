"""Read shards, first and again, and print the profiler's names of the device's work as JSON.

Run as a module of its own: the profiler stays attached to its process.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from gpu_cache import TensorCache
from tests.support.gpu_scene import GPU, fetch_all, small_cache

_SIZES = {f"shard-{number}": 100_000 + number for number in range(20)}


def main() -> None:
    """Print a list of names for each of two reads, of which the first fetches."""
    cache = small_cache()
    _read(small_cache())
    print(json.dumps({name: _device_events(lambda: _read(cache)) for name in ("first", "again")}))


def _read(cache: TensorCache) -> None:
    """Get every shard, and read it with a kernel."""
    for tensor in fetch_all(cache, dict(_SIZES)):
        tensor.sum()


def _device_events(work: Callable[[], object]) -> list[str]:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize(GPU)
    events = profiler.events() or []
    return [event.name for event in events if event.device_type == torch.autograd.DeviceType.CUDA]


if __name__ == "__main__":
    main()
