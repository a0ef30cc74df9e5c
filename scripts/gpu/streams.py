"""Assumptions about the order of streams."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from unittest import mock

from gpu.findings import Assumption, Figures, at_least, exactly
from gpu_cache.pool.completion import Completion
from tests.support.gpu_race import Outcome, Touch, late_copy, nothing, race
from tests.support.gpu_scene import Rig, fence_off

_MOST_DEALT = 100  # more than torch has for a priority
_LEAST_PRIORITY = -8  # beyond any that torch has


def look_at_the_pools(rig: Rig) -> Figures:
    """Ask torch for many streams and look for them among those that the fence knows."""
    cuda, device = rig.cuda, rig.device.torch_device
    fence = {stream.cuda_stream for stream in rig.device.fence_streams()}
    with cuda.device(device):
        least, greatest = cuda.Stream.priority_range()
        dealt = {
            cuda.Stream(device=device, priority=priority).cuda_stream
            for priority in range(_LEAST_PRIORITY, 1)
            for _ in range(_MOST_DEALT)
        }
    return {
        "missed": len(dealt - fence), "dealt": len(dealt), "fenced": len(fence), "priorities": [least, greatest]
    }  # fmt: skip


def look_at_reuse(rig: Rig) -> Figures:
    """Let a block be reused while a kernel is to read it, without the fence and with it."""
    with fence_off():
        without = _race(rig)
    return {"corrupt without the fence": without, "corrupt with it": _race(rig)}


def look_at_record_stream(rig: Rig) -> Figures:
    """The same without the fence, for a tensor that was told of its reader."""
    with fence_off():
        return {"corrupt all the same": _race(rig, rig.record_stream)}


def look_at_ready(rig: Rig) -> Figures:
    """Read a shard whose copy starts late, with the consumer's wait and without it."""
    rig.load_kernels(rig.consumers())
    waiting = _read_early(rig)
    with mock.patch.object(Completion, "wait_on", return_value=None):
        careless = _read_early(rig)
    return {
        "stale": _num_corrupt(waiting),
        "stale without the wait": _num_corrupt(careless),
        "waits of the host": sum(one.has_waited for one in waiting),
    }


def _read_early(rig: Rig) -> list[Outcome]:
    return [late_copy(rig.small_cache(), stream, "stream", rig) for stream in rig.consumers()]


def _race(rig: Rig, touch: Touch = nothing) -> int:
    with contextlib.closing(rig.small_cache()) as cache:
        return _num_corrupt(race(cache, rig.consumers(), touch, rig))


def _num_corrupt(outcomes: Sequence[Outcome]) -> int:
    if not all(outcome.is_reused for outcome in outcomes):
        raise RuntimeError("the bytes were not reused")
    return sum(outcome.is_corrupt for outcome in outcomes)


# Source: an H100 80GB HBM3, torch 2.11: 129 streams; corrupt on 4 of 4 streams without the fence, on none with it.
ASSUMPTIONS = [
    Assumption("streams enumerated", "each stream that torch deals out is fenced", look_at_the_pools,
               {"missed": exactly(0)}),
    Assumption("reuse race", "of 4 streams, corrupt without the fence, intact with it", look_at_reuse,
               {"corrupt without the fence": at_least(1), "corrupt with it": exactly(0)}),
    Assumption("Tensor.record_stream", "of 4 streams: it does not help", look_at_record_stream,
               {"corrupt all the same": at_least(1)}),
    Assumption("ready=stream", "of 4 streams: the consumer's stream waits, the host does not", look_at_ready,
               {"stale": exactly(0), "stale without the wait": at_least(1), "waits of the host": exactly(0)}),
]  # fmt: skip
