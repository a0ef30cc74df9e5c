"""Streams on a real GPU: which the fence knows, and whom `ready` makes wait."""

from __future__ import annotations

import threading
from unittest import mock

import pytest
import torch

from gpu_cache.config import ReadyMode
from gpu_cache.device.cuda import CudaDevice
from gpu_cache.pool.completion import Completion
from tests.support.cuda_devices import in_thread
from tests.support.gpu_race import NEW, OLD, consumers, late_copy
from tests.support.gpu_scene import (
    GPU,
    LONG_CYCLES,
    SHARD_BYTES,
    allocate,
    fetch,
    is_all,
    keep_busy,
    load_kernels,
    small_cache,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("failures_stay_alone")]


def test_every_stream_that_torch_deals_out_is_fenced(device: CudaDevice) -> None:
    fence = {stream.cuda_stream for stream in device.fence_streams()}
    dealt = [torch.cuda.Stream(GPU, priority=priority) for priority in range(-8, 1) for _ in range(70)]
    dealt += in_thread(lambda: [torch.cuda.Stream(GPU) for _ in range(40)])
    assert {stream.cuda_stream for stream in dealt} < fence
    assert len(fence) == len(device.fence_streams()), "each once"


def test_the_streams_that_torch_takes_for_itself_are_fenced(device: CudaDevice) -> None:
    fence = {stream.stream_id for stream in device.fence_streams()}
    generic = torch.Stream(GPU)
    torch.cuda.graph(torch.cuda.CUDAGraph())
    for_graphs = torch.cuda.graph.default_capture_stream
    assert for_graphs is not None
    assert {generic.stream_id, for_graphs.stream_id, torch.cuda.current_stream(GPU).stream_id} <= fence


def test_a_device_asked_from_a_new_thread_fences_the_same_streams(device: CudaDevice) -> None:
    assert in_thread(lambda: {stream.cuda_stream for stream in CudaDevice(GPU.index).fence_streams()}) == {
        stream.cuda_stream for stream in device.fence_streams()
    }


@pytest.mark.parametrize("ready", ["stream", "host"])
def test_a_consumer_waits_for_a_copy_that_starts_late(ready: ReadyMode) -> None:
    load_kernels(*consumers())
    outcomes = [late_copy(small_cache(), stream, ready) for stream in consumers()]
    assert [outcome.is_reused for outcome in outcomes] == [True] * len(outcomes)
    assert not any(outcome.is_corrupt for outcome in outcomes)
    assert [outcome.has_waited for outcome in outcomes] == [ready == "host"] * len(outcomes)


def test_without_that_wait_a_consumer_reads_stale_bytes() -> None:
    load_kernels(*consumers())
    with mock.patch.object(Completion, "wait_on", return_value=None):
        assert any(late_copy(small_cache(), stream, "stream").is_corrupt for stream in consumers())


def test_each_consumers_stream_waits_for_itself() -> None:
    cache, streams = small_cache(), consumers()
    load_kernels(*streams)
    allocate(cache)
    keep_busy(cache._lazy.open().transfer.stream)
    seen = [torch.zeros(SHARD_BYTES, dtype=torch.uint8, device=GPU) for _ in streams]
    for stream, into in zip(streams, seen, strict=True):
        stream.wait_stream(torch.cuda.current_stream(GPU))
        with torch.cuda.stream(stream):
            into.copy_(fetch(cache, "a", NEW, ready="stream"))
    torch.cuda.synchronize(GPU)
    assert all(is_all(into, NEW) for into in seen)


def test_a_copy_that_the_host_saw_needs_no_wait_on_any_stream() -> None:
    cache = small_cache()
    tensor = fetch(cache, "a", NEW, ready="host")
    with mock.patch.object(CudaDevice, "wait", side_effect=AssertionError("waited")):
        for stream in consumers():
            with torch.cuda.stream(stream):
                again = cache.get("a")
                assert again is not None
                assert is_all(again, NEW)
    del tensor


def test_a_consumer_in_another_thread_is_not_held_up_by_a_busy_default_stream() -> None:
    cache = small_cache(**dict.fromkeys(("slab_bytes", "pool_bytes", "prealloc_bytes"), 2 * SHARD_BYTES))
    first = fetch(cache, "first", OLD)
    load_kernels()
    keep_busy(torch.cuda.default_stream(GPU), 5 * LONG_CYCLES)
    got: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: got.append(fetch(cache, "a", NEW)))
    thread.start()
    thread.join(60)
    assert not torch.cuda.default_stream(GPU).query(), "the copy waited for the trainer"
    assert is_all(got[0], NEW)
    assert is_all(first, OLD)


def test_the_copy_stream_is_none_that_torch_deals_out_by_default(device: CudaDevice) -> None:
    by_default = {torch.cuda.Stream(GPU, priority=priority).cuda_stream for priority in (0, -1) for _ in range(64)}
    assert device.new_stream().cuda_stream not in by_default


def test_the_fence_and_the_copies_are_raw_calls_of_the_runtime_that_torch_uses(device: CudaDevice) -> None:
    assert device._runtime.raw is not None
    (events,) = device.record_all(device.fence_streams())
    assert len(events) == len(device.fence_streams())
    device.synchronize(events)
    assert device.query(events)
    handles = set(events.handles)
    del events
    assert set(device.record_all(device.fence_streams())[0].handles) == handles, "used again"


def test_copies_that_lie_apart_arrive_and_the_next_kernel_meets_no_error(device: CudaDevice) -> None:
    torch.cuda.init()
    stream, arena, pinned = device.new_stream(), device.arena(1 << 20), device.pinned(1 << 20)
    pinned.tensor.copy_(torch.arange(1 << 20) % 251)
    for start in (0, 512):
        arena.tensor.zero_()
        torch.cuda.synchronize(GPU)
        pairs = [(arena.tensor[at : at + 512], pinned.tensor[at : at + 512]) for at in range(start, 1 << 20, 1024)]
        device.copy_all(pairs, stream)
        device.synchronize(device.record(stream))
        wanted = torch.zeros(1 << 20, dtype=torch.uint8).view(-1, 2, 512)
        wanted[:, start // 512] = pinned.tensor.view(-1, 2, 512)[:, start // 512]
        assert torch.equal(arena.tensor.cpu().view(-1, 2, 512), wanted)
    device.release_pinned(pinned)
    device.release_arena(arena)


def test_raw_queries_and_records_beside_a_capture_leave_it_intact(device: CudaDevice) -> None:
    torch.cuda.init()
    total, graph = torch.zeros(4, device=GPU), torch.cuda.CUDAGraph()
    total.add_(0)
    (before,) = device.record_all(device.fence_streams())
    torch.cuda.synchronize(GPU)
    with torch.cuda.graph(graph):
        total.add_(1)
        assert device.is_any_capturing(device.fence_streams())
        other = threading.Thread(target=lambda: (device.query(before), device.record(device.new_stream())))
        other.start()
        other.join(30)
    graph.replay()
    assert total.tolist() == [1.0] * 4
