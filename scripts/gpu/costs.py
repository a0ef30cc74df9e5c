"""What things cost on this machine. Only copies that are slower than pinned memory should make them fail a check."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping

import torch

from gpu.findings import Assumption
from gpu.lifetimes import carved
from gpu_cache.device import CudaDevice
from gpu_cache.fence import StreamFence
from gpu_cache.lease import Lease
from tests.support.gpu_scene import GPU, MIB, fetch_all, roomy_cache
from tests.support.sources import DictSource

_COPIED_BYTES = 256 * MIB
_ROUNDS = 5
# Microseconds of host time; an H100's machine, which runs Python slowly, needs about a third of them.
_MOST_FENCE_US, _MOST_CALL_US, _MOST_INSERT_US, _MOST_HIT_US = 1000.0, 50.0, 20.0, 10.0


def microseconds(work: Callable[[], object], repeats: int = 500) -> float:
    """Of host time for one call; the best of a few rounds."""
    work()
    rounds = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        rounds.append((time.perf_counter() - began) / repeats * 1e6)
        torch.cuda.synchronize(GPU)
    return min(rounds)


def look_at_bandwidth() -> tuple[bool, str]:
    """Copy to the device from our buffers, from torch's pinned memory and from pageable memory."""
    device = CudaDevice(0)
    arena, ours = device.arena(_COPIED_BYTES), device.pinned(_COPIED_BYTES)
    sources = {
        "ours": ours.tensor,
        "torch's pinned": torch.zeros(_COPIED_BYTES, dtype=torch.uint8).pin_memory(),
        "pageable": torch.zeros(_COPIED_BYTES, dtype=torch.uint8),
    }
    rates = {name: [_gigabytes_per_s(device, arena.tensor, source, piece) for piece in (16 * MIB, MIB, 64 << 10)]
             for name, source in sources.items()}  # fmt: skip
    device.release_pinned(ours)
    device.release_arena(arena)
    is_ok = rates["ours"][0] > 0.8 * rates["torch's pinned"][0] and rates["ours"][0] > rates["pageable"][0]
    return is_ok, "; ".join(f"{name} {' / '.join(f'{rate:.1f}' for rate in found)}" for name, found in rates.items())


def _gigabytes_per_s(device: CudaDevice, dst: torch.Tensor, src: torch.Tensor, piece_bytes: int) -> float:
    """The median rate of a few rounds that copy everything in pieces, by the device's own clock."""
    stream, rates = device.new_stream(), []
    for _ in range(_ROUNDS):
        start = device.record(stream, timing=True)
        for begin in range(0, dst.numel(), piece_bytes):
            device.copy_async(dst[begin : begin + piece_bytes], src[begin : begin + piece_bytes], stream)
        end = device.record(stream, timing=True)
        device.synchronize(end)
        rates.append(dst.numel() / device.elapsed_s(start, end) / 1e9)
    return statistics.median(rates)


def look_at_the_cache() -> tuple[bool, str]:
    """Read large and small shards of host memory through a cache."""
    cache = roomy_cache(prealloc_bytes=_COPIED_BYTES)
    rates = []
    for count, nbytes in ((4, 64 * MIB), (4000, 9216)):
        tensors: dict[Hashable, torch.Tensor] = {
            number: torch.zeros(nbytes, dtype=torch.uint8) for number in range(count)
        }
        source = DictSource(tensors)
        best_s = min(_read_s(cache.get_many, cache.clear, list(tensors), source) for _ in range(_ROUNDS))
        rates.append(f"{count} of {nbytes:,} bytes: {count * nbytes / best_s / 1e9:.2f} GB/s")
    stats = cache.buffer_stats()
    cache.close()
    return bool(stats["is_pinned"]), f"{'; '.join(rates)}; {stats['pinned_capacity_bytes'] // MIB} MiB pinned"


def _read_s(read: Callable[..., object], clear: Callable[[], object], *arguments: object) -> float:
    began = time.perf_counter()
    read(*arguments)
    ended = time.perf_counter()
    clear()
    return ended - began


def look_at_events() -> tuple[bool, str]:
    """Time what streams and events cost the host."""
    device = CudaDevice(0)
    stream, event = device.new_stream(), device.record(device.current_stream())
    costs = {
        "record": microseconds(lambda: device.record(stream)),
        "query": microseconds(lambda: device.query(event)),
        "wait": microseconds(lambda: device.wait(stream, event)),
        "current stream": microseconds(device.current_stream),
        "is capturing": microseconds(lambda: device.is_capturing(stream)),
    }
    return is_cheap(costs), ", ".join(f"{name} {cost:.1f}" for name, cost in costs.items())


def is_cheap(costs: Mapping[str, float]) -> bool:
    """Whether no call costs the host much more than it should."""
    return max(costs.values()) < _MOST_CALL_US


def look_at_the_fence() -> tuple[bool, str]:
    """Time one set of events, which every drain with something to free records, and its queries."""
    device = CudaDevice(0)
    found = []
    worst_us = 0.0
    for mode in ("all", "noted"):
        fence = StreamFence(device, mode)
        events = fence.record() or []
        record_us = microseconds(fence.record, 20)
        query_us = microseconds(lambda events=events: all(map(device.query, events)), 20)
        worst_us = max(worst_us, record_us, query_us)
        found.append(f"{mode}: {sum(map(len, events))} events, record {record_us:.0f}, query {query_us:.0f}")
    return worst_us < _MOST_FENCE_US, "; ".join(found)


def look_at_blocks() -> tuple[bool, str]:
    """Time making a block, and handing out shards that are cached."""
    device = CudaDevice(0)
    arena = device.arena(MIB)
    freed: deque[Lease] = deque()

    def insert() -> None:
        carved(arena, torch.uint8, (4096,), freed)
        freed.clear()

    insert_us = microseconds(insert)
    device.release_arena(arena)
    cache = roomy_cache()
    sizes: dict[Hashable, int] = dict.fromkeys(range(1000), 9216)
    fetch_all(cache, sizes)
    keys, source = list(sizes), DictSource({})
    hit_us = microseconds(lambda: cache.get_many(keys, source), 3) / len(keys)
    empty_us = microseconds(lambda: torch.empty(4096, dtype=torch.uint8, device=GPU))
    cache.close()
    found = f"insert {insert_us:.1f}, hit {hit_us:.2f} a shard, torch.empty {empty_us:.1f}"
    return insert_us < _MOST_INSERT_US and hit_us < _MOST_HIT_US, found


ASSUMPTIONS = [
    Assumption("bandwidth", "GB/s in pieces of 16 MiB / 1 MiB / 64 KiB: ours as torch's pinned, pageable slower",
               look_at_bandwidth),
    Assumption("cache throughput", "as the link, for large shards", look_at_the_cache),
    Assumption("event costs", "microseconds of host time: a few each, none over 50", look_at_events),
    Assumption("fence costs", "microseconds of host time: under 1,000 for all streams", look_at_the_fence),
    Assumption("block costs", "microseconds of host time: insert under 20, hit under 10", look_at_blocks),
]  # fmt: skip
