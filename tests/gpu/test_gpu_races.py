"""Bytes are not reused while a kernel still reads them: on a real GPU, with and without what prevents it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from gpu_cache import TensorCache
from tests.support.gpu_consumers import Consumers
from tests.support.gpu_race import NEW, OLD, Outcome, Touch, consumers, late_reader, nothing, outside_stream, race
from tests.support.gpu_scene import GPU, LONG_CYCLES, MIB, fence_off, fetch, is_all, load_kernels, small_cache

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("failures_stay_alone")]


def check(outcomes: Sequence[Outcome], *, is_corrupt: bool) -> None:
    """All got the same bytes; none, or at least one of them, was read after it was overwritten."""
    assert all(outcome.is_reused for outcome in outcomes)
    assert any(outcome.is_corrupt for outcome in outcomes) == is_corrupt


def torchs_record_stream(block: torch.Tensor, stream: torch.cuda.Stream) -> None:
    block.record_stream(stream)


@pytest.mark.parametrize("touch", [nothing, torchs_record_stream])
def test_without_the_fence_a_late_reader_sees_the_next_shard(touch: Touch) -> None:
    cache = small_cache()
    with fence_off():
        check(race(cache, consumers(), touch), is_corrupt=True)


def test_with_the_fence_it_sees_its_own() -> None:
    check(race(small_cache(), consumers()), is_corrupt=False)


def test_the_noted_fence_does_not_know_a_stream_that_was_not_named() -> None:
    check(race(small_cache(reuse_fence="noted"), consumers()), is_corrupt=True)


def test_the_noted_fence_waits_for_a_stream_that_was_named() -> None:
    cache = small_cache(reuse_fence="noted")
    check(race(cache, consumers(), cache.record_stream), is_corrupt=False)


def test_the_noted_fence_knows_the_stream_that_asked() -> None:
    cache = small_cache(reuse_fence="noted")
    stream = torch.cuda.Stream(GPU)
    load_kernels(stream)
    with torch.cuda.stream(stream):
        outcomes = [late_reader(cache, stream, cycles=cycles) for cycles in (1, LONG_CYCLES)]
    check(outcomes, is_corrupt=False)


@pytest.mark.parametrize("is_named", [False, True])
def test_a_stream_made_outside_of_torch_has_to_be_named(is_named: bool) -> None:
    cache = small_cache()
    engine = cache._lazy.open()
    with outside_stream(engine.device) as stream:
        outcomes = race(cache, [stream] * 2, cache.record_stream if is_named else nothing)
        cache.close()
    check(outcomes, is_corrupt=not is_named)


class ReadLate(torch.autograd.Function):
    """Its backward reads what was saved for it with a kernel that runs long after the call."""

    @staticmethod
    def forward(ctx: Any, factor: torch.Tensor, shard: torch.Tensor, seen: torch.Tensor, cycles: int) -> torch.Tensor:
        ctx.save_for_backward(shard)
        ctx.seen, ctx.cycles = seen, cycles
        return factor * 2

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        torch.cuda._sleep(ctx.cycles)
        ctx.seen.copy_(ctx.saved_tensors[0])
        return grads[0] * 2, None, None, None


def read_late_in_backward(cache: TensorCache, stream: torch.cuda.Stream, cycles: int) -> Outcome:
    """As `late_reader`, where the last alias is the one that was saved for backward."""
    shard = fetch(cache, "old", OLD)
    address, seen = shard.data_ptr(), torch.zeros_like(shard)
    torch.cuda.synchronize(GPU)
    with torch.cuda.stream(stream):
        loss = ReadLate.apply(torch.ones(4, device=GPU, requires_grad=True), shard, seen, cycles).sum()
        del shard
        cache.clear()
        loss.backward()
    successor = fetch(cache, "new", NEW)
    is_reused = successor.data_ptr() == address
    torch.cuda.synchronize(GPU)
    cache.clear()
    return Outcome(is_reused, not is_all(seen, OLD))


@pytest.mark.parametrize("has_fence", [True, False])
def test_a_late_read_of_backward_on_a_side_stream_is_not_overwritten(has_fence: bool) -> None:
    cache, streams = small_cache(), consumers()
    load_kernels(*streams)
    with contextlib.nullcontext() if has_fence else fence_off():
        read_late_in_backward(cache, streams[0], 1)
        outcomes = [read_late_in_backward(cache, stream, LONG_CYCLES) for stream in streams]
    check(outcomes, is_corrupt=not has_fence)


def busy_cache() -> TensorCache:
    """Room for about half of what the consumers read."""
    return small_cache(
        slab_bytes=2 * MIB, pool_bytes=8 * MIB, prealloc_bytes=8 * MIB, run_bytes=MIB // 2, staging_slot_bytes=MIB
    )


def test_consumers_on_many_streams_and_threads_read_every_byte_right() -> None:
    readers = Consumers(busy_cache(), num_shards=48, seconds=4.0)
    readers.run(num_threads=4)
    assert readers.num_reads > 100
    assert readers.num_wrong == 0


def test_the_same_consumers_find_wrong_bytes_without_the_fence() -> None:
    readers = Consumers(busy_cache(), num_shards=48, seconds=2.0)
    with fence_off():
        for _ in range(5):
            readers.run(num_threads=4)
            if readers.num_wrong:
                break
        torch.cuda.synchronize(GPU)
    assert readers.num_wrong
