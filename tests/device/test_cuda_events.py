"""Raw calls of the runtime library: events that are used again, copies in one call, the number of calls."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_cache import CacheConfig, TensorCache, reaper
from gpu_cache.device.cuda import CudaDevice
from gpu_cache.device.protocol import Arena, Pinned, Stream
from gpu_cache.pool.fence import StreamFence
from tests.support.cuda_devices import cuda_device, in_thread
from tests.support.fake_cuda import MIB, FakeCuda
from tests.support.sources import DictSource

NUM_STREAMS = 1 + 4 * 32
CREATE, RECORD, QUERY = "cudaEventCreateWithFlags", "cudaEventRecord", "cudaEventQuery"
CAPTURING, COPY, BATCH = "cudaStreamIsCapturing", "cudaMemcpyAsync", "cudaMemcpyBatchAsync"


@pytest.fixture
def gpu(gpu: CudaDevice, cuda: FakeCuda) -> Iterator[CudaDevice]:
    yield gpu
    cuda.check_last_error()


def fence_of(gpu: CudaDevice) -> StreamFence:
    return StreamFence(gpu, "all")


def recorded(fence: StreamFence) -> list[Any]:
    events = fence.record()
    assert events is not None
    return events


def are_done(gpu: CudaDevice, events: Sequence[Any]) -> bool:
    return all(map(gpu.query, events))


# Events.


def test_events_are_used_again_when_they_are_done_and_unreferenced(gpu: CudaDevice, cuda: FakeCuda) -> None:
    fence, calls = fence_of(gpu), cuda.library.calls
    for _ in range(10):
        events = recorded(fence)
        assert not are_done(gpu, events)
        cuda.advance()
        assert are_done(gpu, events)
        del events
    assert (calls[CREATE], calls[RECORD]) == (NUM_STREAMS, 10 * NUM_STREAMS)


def test_events_that_are_done_and_still_referenced_are_not_used_again(gpu: CudaDevice, cuda: FakeCuda) -> None:
    fence = fence_of(gpu)
    first = recorded(fence)
    cuda.advance()
    assert are_done(gpu, first)
    second = recorded(fence)
    assert cuda.library.calls[CREATE] == 2 * NUM_STREAMS
    assert are_done(gpu, first)
    assert not are_done(gpu, second)


def test_events_that_are_let_go_before_they_are_done_wait_for_that(gpu: CudaDevice, cuda: FakeCuda) -> None:
    fence = fence_of(gpu)
    for _ in range(3):
        del [*recorded(fence)][:]
    assert cuda.library.calls[CREATE] == 3 * NUM_STREAMS
    cuda.advance()
    for _ in range(3):
        recorded(fence)
        cuda.advance()
    assert cuda.library.calls[CREATE] == 3 * NUM_STREAMS


def test_a_stream_that_stands_still_does_not_stop_events_from_being_used_again(gpu: CudaDevice, cuda: FakeCuda) -> None:
    fence, stuck = fence_of(gpu), list(gpu.fence_streams())[7]
    others = [stream for stream in gpu.fence_streams() if stream != stuck]
    for _ in range(20):
        del [*recorded(fence)][:]
        cuda.advance(*others)
    single = gpu.record(others[0])
    cuda.advance(*others)
    assert gpu.query(single)
    del single
    before = cuda.library.calls[CREATE]
    for _ in range(20):
        event = gpu.record(others[0])
        cuda.advance(*others)
        assert gpu.query(event)
        del event
    assert cuda.library.calls[CREATE] - before <= 1


def test_a_collection_amid_anything_gives_events_back(gpu: CudaDevice, cuda: FakeCuda) -> None:
    cycle: list[Any] = [gpu.record(gpu.new_stream())]
    cycle.append(cycle)
    cuda.advance()
    del cycle
    gc.collect()
    before = cuda.library.calls[CREATE]
    gpu.record(gpu.new_stream())
    assert cuda.library.calls[CREATE] == before


def test_timed_and_other_events_are_kept_apart(gpu: CudaDevice, cuda: FakeCuda) -> None:
    stream = gpu.new_stream()
    for timing in (False, True, False, True):
        start, end = gpu.record(stream, timing=timing), gpu.record(stream, timing=timing)
        cuda.advance()
        assert are_done(gpu, [start, end])
        if timing:
            assert gpu.elapsed_s(start, end) == pytest.approx(1e-3)
        del start, end
    assert cuda.library.calls[CREATE] == 4


def test_the_host_waits_only_for_streams_that_are_busy(gpu: CudaDevice, cuda: FakeCuda) -> None:
    fence, busy = fence_of(gpu), list(gpu.fence_streams())[9]
    (events,) = recorded(fence)
    cuda.advance(*(stream for stream in gpu.fence_streams() if stream != busy))
    gpu.synchronize(events)
    assert cuda.library.calls["cudaEventSynchronize"] == 1
    assert gpu.query(events)
    asked = cuda.library.calls[QUERY]
    assert gpu.query(events)
    assert cuda.library.calls[QUERY] == asked, "it was seen"


def test_a_done_event_is_not_asked_again(gpu: CudaDevice, cuda: FakeCuda) -> None:
    streams = list(gpu.fence_streams())
    (events,) = recorded(fence_of(gpu))
    cuda.advance(*streams[:100])
    assert not gpu.query(events)
    assert not gpu.query(events)
    assert cuda.library.calls[QUERY] == 101 + 1
    cuda.advance()
    assert gpu.query(events)
    assert cuda.library.calls[QUERY] == 101 + 1 + NUM_STREAMS - 100


def test_a_stream_waits_for_all_of_a_fence(gpu: CudaDevice, cuda: FakeCuda) -> None:
    stream, busy = gpu.new_stream(), list(gpu.fence_streams())[9]
    (events,) = recorded(fence_of(gpu))
    gpu.wait(stream, events)
    behind = gpu.record(stream)
    cuda.advance(*(one for one in gpu.fence_streams() if one != busy))
    assert not gpu.query(behind)
    cuda.advance()
    assert gpu.query(behind)


def test_events_of_a_call_that_failed_are_used_no_more(gpu: CudaDevice, cuda: FakeCuda) -> None:
    good, bad = gpu.new_stream(), gpu.new_stream()
    bad.cuda_stream += 1 << 40
    with pytest.raises(RuntimeError, match="cudaEventRecord: CUDA error 400"):
        gpu.record_all([good, bad])
    cuda.advance()
    num_made = cuda.library.calls["cudaEventCreateWithFlags"]
    gpu.record_all([good])
    assert cuda.library.calls["cudaEventCreateWithFlags"] == num_made + 1
    assert len(cuda.violations) == 1
    cuda.violations.clear()


def test_a_failed_call_is_told_and_leaves_no_error(gpu: CudaDevice, cuda: FakeCuda) -> None:
    stream = gpu.new_stream()
    stream.cuda_stream += 1 << 40
    with pytest.raises(RuntimeError, match="cudaEventRecord: CUDA error 400"):
        gpu.record(stream)
    with pytest.raises(RuntimeError, match="cudaStreamIsCapturing: CUDA error 400"):
        gpu.is_any_capturing([stream])
    assert len(cuda.violations) == 2
    cuda.violations.clear()


# Captures.


def test_a_capture_that_begins_while_events_are_recorded_takes_them_for_good(
    gpu: CudaDevice, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are never asked, nor used again."""
    fence, record_all = fence_of(gpu), gpu.record_all
    captured = list(gpu.fence_streams())[40]

    def late(streams: Sequence[Stream]) -> list[Any]:
        cuda.captures[captured] = 0
        return record_all(streams)

    with monkeypatch.context() as patched:
        patched.setattr(gpu, "record_all", late)
        assert fence.record() is None
    cuda.captures.clear()
    cuda.advance()
    for _ in range(3):
        events = recorded(fence)
        cuda.advance()
        assert are_done(gpu, events)
        del events
    assert cuda.library.calls[CREATE] == 2 * NUM_STREAMS


def test_no_event_is_recorded_while_the_default_stream_would_wait_for_a_capture(
    gpu: CudaDevice, cuda: FakeCuda
) -> None:
    cuda.implicit_capture = True
    assert fence_of(gpu).record() is None
    assert cuda.library.calls[RECORD] == 0
    cuda.check_last_error()


def test_whether_a_thread_captures_costs_no_call_on_the_default_stream(gpu: CudaDevice, cuda: FakeCuda) -> None:
    assert not gpu.is_capturing()
    assert not in_thread(gpu.is_capturing)
    assert not cuda.library.calls
    with cuda.capture(gpu.new_stream()):
        assert gpu.is_capturing()


# Copies.


def memory(gpu: CudaDevice) -> tuple[Arena, Pinned, Stream]:
    arena, pinned = gpu.arena(MIB), gpu.pinned(8192)
    arena.tensor.zero_()
    pinned.tensor.copy_(torch.arange(8192) % 251)
    return arena, pinned, gpu.new_stream()


def three(arena: Arena, pinned: Pinned) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Copies that lie apart."""
    return [(arena.tensor[to:][:512], pinned.tensor[at:][:512]) for to, at in ((0, 1024), (4096, 0), (9216, 7680))]


def check_three(arena: Arena) -> None:
    wanted = torch.zeros(MIB, dtype=torch.uint8)
    for to, at in ((0, 1024), (4096, 0), (9216, 7680)):
        wanted[to : to + 512] = torch.arange(at, at + 512) % 251
    assert bytes(arena.tensor.numpy().data) == bytes(wanted.numpy().data)


@pytest.mark.parametrize(
    ("library", "calls"),
    [
        ({"version": 12_040}, {COPY: 3}),
        ({"version": 12_080}, {BATCH: 1}),
        ({"version": 12_090}, {BATCH: 1}),
        ({"version": 13_000}, {BATCH: 1}),
        ({"version": 13_020}, {BATCH: 1}),
        ({"version": 13_000, "missing": (BATCH,)}, {COPY: 3}),
        ({"version": 12_090, "batches": False}, {BATCH: 1, COPY: 3}),
        ({"version": 13_000, "batches": False}, {BATCH: 1, COPY: 3}),
    ],
)
def test_scattered_copies_are_one_call_where_the_runtime_has_it(
    library: dict[str, Any], calls: dict[str, int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cuda = FakeCuda(**library)
    gpu = cuda_device(cuda, tmp_path)
    arena, pinned, stream = memory(gpu)
    with caplog.at_level(logging.INFO, "gpu_cache"):
        gpu.copy_all(three(arena, pinned), stream)
    check_three(arena)
    assert {name: count for name, count in cuda.library.calls.items() if "Memcpy" in name} == calls
    assert cuda.copies == [stream] * 3
    assert ("CUDA error 36" in caplog.text) == (library.get("batches") is False)
    arena.tensor.zero_()
    gpu.copy_all(three(arena, pinned), stream)
    check_three(arena)
    assert cuda.library.calls[BATCH] == (2 if calls == {BATCH: 1} else calls.get(BATCH, 0)), "refused, it is not tried"
    cuda.check_last_error()
    assert not cuda.violations


def test_one_copy_is_no_batch_and_enters_no_stream(gpu: CudaDevice, cuda: FakeCuda) -> None:
    arena, pinned, stream = memory(gpu)
    before = cuda.calls["stream"]
    gpu.copy_all([(arena.tensor[512:1024], pinned.tensor[512:1024])], stream)
    assert cuda.library.calls[COPY] == 1
    assert cuda.calls["stream"] == before
    gpu.release_arena(arena)


def test_a_buffer_that_is_not_pinned_is_copied_by_torch_which_lets_go_of_the_gil(tmp_path: Path) -> None:
    cuda = FakeCuda(pin_limit_bytes=0)
    gpu = cuda_device(cuda, tmp_path)
    arena, pinned, stream = memory(gpu)
    before = cuda.calls["stream"]
    gpu.copy_all(three(arena, pinned), stream)
    check_three(arena)
    assert cuda.calls["copy_"] == 3
    assert cuda.calls["stream"] == before + 1, "the stream is entered once"
    assert cuda.library.calls[COPY] == 0


def test_memory_that_was_given_back_is_known_no_more(gpu: CudaDevice) -> None:
    arena, pinned, _ = memory(gpu)
    assert len(gpu._copyable) == 2
    gpu.release_arena(arena)
    gpu.release_pinned(pinned)
    assert not gpu._copyable


def test_a_captured_stream_takes_none_of_several_copies(gpu: CudaDevice, cuda: FakeCuda) -> None:
    arena, pinned, stream = memory(gpu)
    with cuda.capture(stream), pytest.raises(RuntimeError, match="a part of that graph"):
        in_thread(lambda: gpu.copy_all(three(arena, pinned), stream))
    assert not cuda.copies
    gpu.release_arena(arena)


# Calls.

CONFIG = CacheConfig(
    slab_bytes=MIB,
    pool_bytes=4 * MIB,
    prealloc_bytes=MIB,
    staging_slots=2,
    staging_slot_bytes="64KiB",
    run_bytes="16KiB",
)  # fmt: skip
SHARDS = {number: torch.full((100,), number) for number in range(30)}


@pytest.fixture
def cache(gpu: CudaDevice, monkeypatch: pytest.MonkeyPatch) -> Iterator[TensorCache]:
    monkeypatch.setattr(reaper, "PERIOD_S", 3600.0)
    cache = TensorCache(CONFIG, device=gpu)
    yield cache
    cache.close()


def test_a_fetch_and_a_clear_take_four_calls_a_stream_and_few_more(cache: TensorCache, cuda: FakeCuda) -> None:
    """Steady, that is from the second step on: the first one makes events, a stream and a buffer."""
    calls: dict[str, int] = {}
    for _ in range(4):
        cuda.library.calls.clear()
        cuda.calls.clear()
        found = cache.get_many(list(SHARDS), DictSource(SHARDS))
        del found
        cache.clear()
        cuda.advance()
        calls = {**cuda.library.calls, **cuda.calls}
    assert calls.pop(CAPTURING) <= 2 * NUM_STREAMS + 2
    assert calls.pop(RECORD) <= NUM_STREAMS + 2
    assert calls.pop(QUERY) <= NUM_STREAMS + 6
    assert calls.pop(COPY) == 1
    assert calls.pop("device") <= 12
    assert calls.pop("cudaThreadExchangeStreamCaptureMode") <= 24
    assert calls.pop("cudaEventElapsedTime", 0) <= 1
    assert sum(calls.values()) <= 4, calls


def test_a_hit_takes_no_call_at_all(cache: TensorCache, cuda: FakeCuda) -> None:
    cache.get_many(list(SHARDS), DictSource(SHARDS))
    cuda.advance()
    cuda.library.calls.clear()
    cuda.calls.clear()
    cache.get_many(list(SHARDS), DictSource({}))
    assert not cuda.library.calls
    assert not cuda.calls


def test_runs_that_lie_one_after_another_are_one_copy(cache: TensorCache, cuda: FakeCuda) -> None:
    shards = {number: torch.full((4096,), number, dtype=torch.uint8) for number in range(12)}  # three runs, one window
    got = cache.get_many(list(shards), DictSource(shards))
    assert all(bool((one == number).all()) for number, one in enumerate(got))
    assert cache.buffer_stats()["copies"] == cuda.library.calls[COPY] == 1


def test_runs_in_the_holes_of_a_pool_are_one_call(cache: TensorCache, cuda: FakeCuda) -> None:
    held = cache.get_many(range(256), DictSource({n: torch.full((4096,), n, dtype=torch.uint8) for n in range(256)}))
    cache.clear(range(0, 256, 2))
    del held[::2]
    cuda.advance()
    cache.synchronize()
    cache.trim()  # no further slab
    cache._lazy.open().pool.capacity = MIB
    cuda.library.calls.clear()
    more = {f"more-{n}": torch.full((4096,), n, dtype=torch.uint8) for n in range(16)}
    got = cache.get_many(list(more), DictSource(more))
    assert all(bool((one == number).all()) for number, one in enumerate(got))
    assert (cuda.library.calls[BATCH], cuda.library.calls[COPY]) == (1, 0)
    assert cache.buffer_stats()["overflows"] == 0
    del held
