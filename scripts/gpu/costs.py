"""What things cost on this machine, held against what they cost on another one.

Source of the bounds: one NVIDIA H100 80GB HBM3, PCIe Gen5 x16, driver 580, torch 2.11, Python 3.12, on a host that runs
Python at about half the speed of a quiet workstation. Each bound says below which figure it is of. Where a figure has
no bound, nothing was measured that it could be held against.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from bench.gpu_paths import InstantSource

from gpu.findings import Assumption, Figures, at_least, at_most, exactly
from gpu_cache import ShardSpec, TensorCache
from gpu_cache.device.modes import plain_tensors
from gpu_cache.device.protocol import Arena, Event
from gpu_cache.pool.fence import StreamFence
from gpu_cache.pool.lease import Lease, carve
from tests.support.gpu_scene import MIB, Rig, fetch_all
from tests.support.sources import DictSource

_COPIED = 256  # of the rig's MiB
_PIECES = (16, 1, 1 / 16)  # likewise
_MOST_PIECES = 256  # copied in a round
_LARGE = (
    11,
    64,
)  # number of shards, and of the rig's MiB in each: as many bytes as a batch of the benchmark's workload vision
_SMALL = (3072, 9216)  # the same in bytes: its workload rollout
_ROUNDS = 5
_NUM_STREAMS = 129  # that torch deals out, and the default one

# Pinned memory of ours was as fast as torch's, 54.3 GB/s; that a tenth less will do was chosen, not measured.
_LEAST_OF_PINNED = 0.9
# Pageable memory was slower, 6.4 GB/s; where it is not, pinning gains nothing.
_LEAST_OF_PAGEABLE = 1.0
# Of the pinned peak, from a source that takes no time: an H200 gave 0.95 at today's defaults.
_LEAST_OF_PEAK = 0.85
# The worst that a small shard took from the same source, once blocks were built without `new`.
_MOST_SMALL_US = 19.0
# What torch's own events and streams took, which raw calls replaced: 6.1 ms to record on all streams, 1.4 ms to query.
_MOST_RECORD_US, _MOST_QUERY_US = 6100 / _NUM_STREAMS, 1400 / _NUM_STREAMS
_MOST_CAPTURING_US, _MOST_CURRENT_US = 12.0, 3.9
# Raw calls on all streams took 73 us to record, 50 to ask for captures, which is done twice, and 52 to query. The
# factor, for the Python around them, was chosen, not measured.
_SLACK = 2.0
_MOST_FENCE_US, _MOST_FENCE_QUERY_US = _SLACK * (73 + 2 * 50), _SLACK * 52
# What `carve` took with `new`, which was replaced.
_MOST_INSERT_US = 6.9
# A hit took 1.0 on two cores without a GPU: twice that at half the speed. An H200's machine took 0.73.
_MOST_HIT_US = 2.0


def microseconds(rig: Rig, work: Callable[[Any], object], repeats: int, prepare: Callable[[], Any] = object) -> float:
    """Of host time for one call on what `prepare` makes, untimed; the best of a few rounds."""
    number, rounds = rig.times(repeats), []
    for _ in range(rig.times(_ROUNDS)):
        prepared = [prepare() for _ in range(number)]
        rig.synchronize()
        began = time.perf_counter()
        for one in prepared:
            work(one)
        rounds.append((time.perf_counter() - began) / number * 1e6)
    return min(rounds)


def look_at_bandwidth(rig: Rig) -> Figures:
    """Copy to the device from our buffers, from torch's pinned memory and from pageable memory."""
    nbytes = _COPIED * rig.mib
    arena, ours = rig.device.arena(nbytes), rig.device.pinned(nbytes)
    sources = {
        "ours": ours.tensor,
        "torch's": rig.pinned_by_torch(nbytes),
        "pageable": torch.zeros(nbytes, dtype=torch.uint8),
    }
    rates = {
        name: [_bytes_per_s(rig, arena.tensor, source, int(piece * rig.mib)) for piece in _PIECES]
        for name, source in sources.items()
    }
    rig.device.release_pinned(ours)
    rig.device.release_arena(arena)
    return {
        "of torch's pinned": rates["ours"][0] / rates["torch's"][0],
        "of pageable": rates["ours"][0] / rates["pageable"][0],
        **{name: " / ".join(f"{rate / 1e9:.1f}" for rate in found) for name, found in rates.items()},
    }


def _bytes_per_s(rig: Rig, dst: torch.Tensor, src: torch.Tensor, piece_bytes: int) -> float:
    """The median rate of a few rounds that copy in pieces, by the device's own clock."""
    device, rates = rig.device, []
    stream, nbytes = device.new_stream(), min(dst.numel(), _MOST_PIECES * piece_bytes)
    for _ in range(rig.times(_ROUNDS)):
        start = device.record(stream, timing=True)
        for begin in range(0, nbytes, piece_bytes):
            device.copy_all([(dst[begin : begin + piece_bytes], src[begin : begin + piece_bytes])], stream)
        end = device.record(stream, timing=True)
        device.synchronize(end)
        rates.append(nbytes / device.elapsed_s(start, end))
    return statistics.median(rates)


def look_at_the_cache(rig: Rig) -> Figures:
    """Bring large and small shards through a cache at its defaults, from a source that takes no time."""
    peak = _pinned_peak(rig)
    cache = rig.default_cache()
    number, large = _LARGE
    large_s, small_s = (_bring_s(rig, cache, *sizes) for sizes in ((number, large * rig.mib), _SMALL))
    stats = cache.buffer_stats()
    cache.close()
    return {
        "of the pinned peak": number * large * rig.mib / large_s / peak,
        "us a small shard": small_s / _SMALL[0] * 1e6,
        "is pinned": bool(stats["is_pinned"]),
        "peak GB/s": peak / 1e9,
        "MiB pinned": stats["pinned_capacity_bytes"] / MIB,
    }


def _pinned_peak(rig: Rig) -> float:
    """Bytes per second of one long copy from torch's pinned memory."""
    arena, source = rig.device.arena(_COPIED * rig.mib), rig.pinned_by_torch(_COPIED * rig.mib)
    peak = _bytes_per_s(rig, arena.tensor, source, arena.nbytes)
    rig.device.release_arena(arena)
    return peak


def _bring_s(rig: Rig, cache: TensorCache, number: int, nbytes: int) -> float:
    """Median seconds until shards of so many bytes are there; the first round, which allocates, does not count."""
    specs = [ShardSpec((nbytes, at), torch.uint8, (nbytes,)) for at in range(number)]
    keys, source = [spec.key for spec in specs], InstantSource(specs)
    rounds = []
    for _ in range(1 + rig.times(_ROUNDS)):
        began = time.perf_counter()
        cache.get_many(keys, source, ready="host")
        rounds.append(time.perf_counter() - began)
        cache.clear()
        cache.synchronize()
    return statistics.median(rounds[1:])


def look_at_events(rig: Rig) -> Figures:
    """Time what streams and events cost the host."""
    device = rig.device
    stream = device.new_stream()
    event = partial(device.record, device.current_stream())
    return {
        "record": microseconds(rig, lambda _: device.record(stream), 500),
        "query": microseconds(rig, device.query, 500, event),
        "is capturing": microseconds(rig, lambda _: device.is_any_capturing([stream]), 500),
        "current stream": microseconds(rig, lambda _: device.current_stream(), 500),
        "wait": microseconds(rig, partial(device.wait, stream), 500, event),
    }


def look_at_the_fence(rig: Rig) -> Figures:
    """Time one set of events, which every drain with something to free records, and its queries."""
    device, found = rig.device, {}

    def query(events: list[Event]) -> None:
        if not all(map(device.query, events)):
            raise RuntimeError("events of an idle device are not done")

    for mode in ("all", "noted"):
        fence = StreamFence(device, mode)
        found[f"{mode}, record"] = microseconds(rig, lambda _, fence=fence: fence.record(), 20)
        found[f"{mode}, query"] = microseconds(rig, query, 20, lambda fence=fence: fence.record() or [])
        found[f"{mode}, events"] = sum(map(len, fence.record() or []))
    return found


def look_at_blocks(rig: Rig) -> Figures:
    """Time making a block, and handing out shards that are cached."""
    arena = rig.device.arena(MIB)
    insert_us = _insert_us(rig, arena)
    rig.device.release_arena(arena)
    cache = rig.default_cache()
    sizes: dict[Hashable, int] = dict.fromkeys(range(1000), 9216)
    fetch_all(cache, sizes)
    keys, source = list(sizes), DictSource({})
    hit_us = microseconds(rig, lambda _: cache.get_many(keys, source), 3) / len(keys)
    empty_us = microseconds(rig, lambda _: torch.empty(4096, dtype=torch.uint8, device=rig.where), 500)
    cache.close()
    return {"insert": insert_us, "hit, a shard": hit_us, "torch.empty": empty_us}


def _insert_us(rig: Rig, arena: Arena) -> float:
    """Time carving a block and dropping it."""
    with plain_tensors():
        template, freed = torch.empty(0, dtype=torch.uint8, device=rig.where), deque[Lease]()
        carved = partial(carve, arena.tensor.untyped_storage(), 4096, 4096, template, (4096,))
        return microseconds(rig, lambda _: carved(freed.append), 500)


_HOST_TIME = "microseconds of host time"

ASSUMPTIONS = [
    Assumption("bandwidth", "ours as torch's pinned, pageable slower; GB/s in pieces of 16 MiB / 1 MiB / 64 KiB",
               look_at_bandwidth,
               {"of torch's pinned": at_least(_LEAST_OF_PINNED), "of pageable": at_least(_LEAST_OF_PAGEABLE)}),
    Assumption("cache throughput", "as the link, at defaults, from a source that takes no time", look_at_the_cache,
               {"of the pinned peak": at_least(_LEAST_OF_PEAK), "us a small shard": at_most(_MOST_SMALL_US),
                "is pinned": exactly(True)}),
    Assumption("event costs", f"{_HOST_TIME}: less than torch's own", look_at_events,
               {"record": at_most(_MOST_RECORD_US), "query": at_most(_MOST_QUERY_US),
                "is capturing": at_most(_MOST_CAPTURING_US), "current stream": at_most(_MOST_CURRENT_US)}),
    Assumption("fence costs", f"{_HOST_TIME} for all streams: little more than the raw calls", look_at_the_fence,
               {"all, record": at_most(_MOST_FENCE_US), "all, query": at_most(_MOST_FENCE_QUERY_US)}),
    Assumption("block costs", _HOST_TIME, look_at_blocks,
               {"insert": at_most(_MOST_INSERT_US), "hit, a shard": at_most(_MOST_HIT_US)}),
]  # fmt: skip
