"""Assumptions about the order of streams."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from unittest import mock

import torch

from gpu.findings import Assumption
from gpu_cache.completion import Completion
from gpu_cache.device import CudaDevice
from tests.support.gpu_race import Outcome, Touch, consumers, late_copy, nothing, race
from tests.support.gpu_scene import GPU, fence_off, load_kernels, small_cache


def look_at_the_pools() -> tuple[bool, str]:
    """Ask torch for many streams and look for them among those that the fence knows."""
    fence = {stream.cuda_stream for stream in CudaDevice(0).fence_streams()}
    dealt = {torch.cuda.Stream(GPU, priority=priority).cuda_stream for priority in range(-8, 1) for _ in range(100)}
    least, greatest = torch.cuda.Stream.priority_range()
    missed = len(dealt - fence)
    return not missed, f"{len(fence)} streams fenced, {missed} missed of {len(dealt)}; priorities {least} to {greatest}"


def look_at_reuse() -> tuple[bool, str]:
    """Let a block be reused while a kernel is to read it, without the fence and with it."""
    with fence_off():
        without = _race()
    fenced = _race()
    return without > 0 and not fenced, f"corrupt on {without} of 4 streams without the fence, on {fenced} with it"


def look_at_record_stream() -> tuple[bool, str]:
    """The same without the fence, for a tensor that was told of its reader."""
    with fence_off():
        count = _race(lambda block, stream: block.record_stream(stream))
    return count > 0, f"corrupt on {count} of 4 streams all the same"


def look_at_ready() -> tuple[bool, str]:
    """Read a shard whose copy starts late, with the consumer's wait and without it."""
    load_kernels(*consumers())
    waiting = [late_copy(small_cache(), stream, "stream") for stream in consumers()]
    with mock.patch.object(Completion, "wait_on", return_value=None):
        careless = [late_copy(small_cache(), stream, "stream") for stream in consumers()]
    stale, expected_stale, held_up = _corrupt(waiting), _corrupt(careless), sum(one.has_waited for one in waiting)
    return not stale and expected_stale > 0 and not held_up, (
        f"stale on {stale} of 4 streams, without the wait on {expected_stale}; the host waited {held_up} times"
    )


def _race(touch: Touch = nothing) -> int:
    with contextlib.closing(small_cache()) as cache:
        return _corrupt(race(cache, consumers(), touch))


def _corrupt(outcomes: Sequence[Outcome]) -> int:
    assert all(outcome.is_reused for outcome in outcomes), "the bytes were not reused"
    return sum(outcome.is_corrupt for outcome in outcomes)


ASSUMPTIONS = [
    Assumption("streams enumerated", "each stream that torch deals out is fenced", look_at_the_pools),
    Assumption("reuse race", "corrupt without the fence, intact with it", look_at_reuse),
    Assumption("Tensor.record_stream", "does not help", look_at_record_stream),
    Assumption("ready=stream", "the consumer's stream waits, the host does not", look_at_ready),
]
