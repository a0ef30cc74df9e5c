"""Readers that write into what they got: the cache drops the shard, and others get the original bytes."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpu_cache import FetchError, MutatedError, TensorCache, TransferError
from gpu_cache.index.index import ShardIndex
from gpu_cache.index.mutation import Mutations
from gpu_cache.pool.block import Copy
from gpu_cache.transfer.fetch import Fetch
from tests.support.cuda_devices import cuda_device
from tests.support.fake_cuda import FakeCuda
from tests.support.interleave_stage import eventually
from tests.support.mutation_scene import CONFIG, UNSEEN, WRITES, figures, on_host
from tests.support.sources import DictSource, gated, same_bytes

DROPPED = "cached copies of {} were dropped, as a reader wrote into them: clone a tensor before writing into it"


# Fetched again.


def test_after_a_write_readers_get_the_original_in_a_block_of_its_own(
    cache: TensorCache, source: DictSource, caplog: pytest.LogCaptureFixture
) -> None:
    written, other = cache.get_many(["a", "b"], source)
    written.fill_(7)
    fresh, same = cache.get_many(["a", "b"], source)
    assert same_bytes(fresh, source.tensors["a"])
    assert torch.equal(written, torch.full((100,), 7.0)), "who holds the old block keeps it"
    assert (fresh.data_ptr() == written.data_ptr(), same.data_ptr() == other.data_ptr()) == (False, True)
    assert source.asked == [["a", "b"], ["a"]]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(
        "shard 'a' (400 bytes from node-a:1) was written to in place: it is no longer"
    )
    assert "GPU_CACHE_ON_MUTATION" in record.getMessage()
    written.add_(1)  # its block is not what others get any more
    assert cache.get_many(["a"], source)[0].data_ptr() == fresh.data_ptr()
    assert figures(cache, "mutations", "misses", "hits", "num_entries") == (1, 3, 2, 2)
    assert len(source.asked) == 2


def test_the_old_block_goes_when_its_last_alias_does(cache: TensorCache, source: DictSource) -> None:
    (written,) = cache.get_many(["a"], source)
    written.add_(1)
    fresh = cache.get_many(["a"], source)
    cache.synchronize()
    assert cache.buffer_stats()["device_bytes"] == 1024
    del written
    cache.synchronize()
    assert cache.buffer_stats()["device_bytes"] == 512
    assert same_bytes(fresh[0], source.tensors["a"])


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_of_any_counted_kind_is_seen(write: Callable[[torch.Tensor], object], source: DictSource) -> None:
    cache = on_host()
    write(cache.get_many(["a"], source)[0])
    assert same_bytes(cache.get_many(["a"], source)[0], source.tensors["a"])
    assert figures(cache, "mutations", "misses") == (1, 2)


@pytest.mark.parametrize("write", UNSEEN.values(), ids=UNSEEN)
def test_writes_that_torch_does_not_count_need_checksums_to_be_seen(
    write: Callable[[torch.Tensor], object], source: DictSource
) -> None:
    cache = on_host()
    write(cache.get_many(["a"], source)[0])
    assert not same_bytes(cache.get_many(["a"], source)[0], source.tensors["a"])
    assert figures(cache, "mutations", "misses") == (0, 1)


@pytest.mark.parametrize("shape", [(), (0, 3), (5,)])
def test_a_write_that_changes_nothing_costs_one_fetch(shape: tuple[int, ...]) -> None:
    cache, source = on_host(), DictSource({"a": torch.ones(shape)})
    cache.get_many(["a"], source)[0].mul_(1)
    for _ in range(3):
        assert same_bytes(cache.get_many(["a"], source)[0], source.tensors["a"])
    assert figures(cache, "mutations", "misses", "hits") == (1, 2, 2)


def test_gradients_from_a_shard_are_no_write(cache: TensorCache, source: DictSource) -> None:
    (tensor,) = cache.get_many(["a"], source)
    leaf = tensor.requires_grad_()
    loss = (leaf.exp() * leaf).sum()  # saved for backward
    again = cache.get_many(["a"], source)[0]
    loss.backward()
    assert leaf.grad is not None
    assert not again.requires_grad
    cache.get_many(["a"], source)
    assert figures(cache, "misses", "hits") == (1, 2)


def test_a_source_that_has_another_tensor_by_now_is_believed(cache: TensorCache, source: DictSource) -> None:
    cache.get_many(["a"], source)[0].add_(1)
    source.tensors = {"a": torch.arange(5)}
    assert same_bytes(cache.get_many(["a"], source)[0], torch.arange(5))


def test_a_shard_is_kept_if_the_call_that_fetches_it_again_says_so(cache: TensorCache, source: DictSource) -> None:
    for _ in range(2):
        cache.get_many(["a"], source, keep=True)[0].add_(1)
    cache.get_many(["a"], source, keep=True)
    for _ in range(3):
        cache.get_many(["b"], source)
        cache.clear(["b"])
    assert cache.entries()[0].clears_survived == 3
    assert figures(cache, "outlived_entries", "mutations") == (0, 2)


def test_a_prefetch_looks_at_no_versions(cache: TensorCache, source: DictSource) -> None:
    cache.get_many(["a"], source)[0].add_(1)
    assert cache.prefetch(["a"], source).result(30) == 0
    assert len(source.asked) == 1
    assert same_bytes(cache.get_many(["a"], source)[0], source.tensors["a"])


def test_a_full_pool_gives_the_original_all_the_same() -> None:
    tensors = {number: torch.randn(1 << 18) for number in range(8)}  # 8 MiB, as the pool
    cache, source = on_host(), DictSource(tensors)
    held = cache.get_many(list(tensors), source)
    held[0].zero_()
    held[5].zero_()
    assert all(map(same_bytes, cache.get_many(list(tensors), source), tensors.values()))
    assert figures(cache, "mutations", "overflows", "num_entries") == (2, 2, 6)


# Not to be had again.


def test_an_error_says_that_a_written_copy_was_dropped(cache: TensorCache, source: DictSource) -> None:
    (written,) = cache.get_many(["a"], source)
    original = source.tensors.pop("a")  # type: ignore[attr-defined]
    written.fill_(7)
    with pytest.raises(FetchError, match="shard a is not at node-a:1 .*" + DROPPED.format("'a'")) as caught:
        cache.get_many(["a", "b"], source)
    assert caught.value.failures.keys() == {"a"}
    with pytest.raises(FetchError, match=r"^shard a is not at node-a:1$"):
        cache.get_many(["a"], source)  # that was said
    assert cache.get_many(["a"], source, on_error="none") == [None]
    source.tensors["a"] = original  # type: ignore[index]
    assert same_bytes(cache.get_many(["a"], source)[0], original)
    assert figures(cache, "mutations", "fetch_errors", "misses", "hits") == (1, 3, 6, 0)
    assert figures(cache, "num_entries", "total_bytes") == (2, 800)


def test_a_written_shard_of_a_hanging_owner_fails_in_time(cache: TensorCache, source: DictSource) -> None:
    cache.get_many(["a"], source)[0].fill_(7)
    readers = gated(source)
    with pytest.raises(FetchError, match="not here within 0.05 s .*" + DROPPED.format("'a'")):
        cache.get_many(["a"], source, timeout_s=0.05)
    readers[0].gate.set()
    eventually(lambda: not cache._tasks)
    assert figures(cache, "mutations", "num_entries", "fetch_errors") == (1, 0, 1)


def test_a_written_shard_does_not_hide_the_failure_of_another(cache: TensorCache, source: DictSource) -> None:
    cache.get_many(["a"], source)[0].add_(1)
    with pytest.raises(FetchError, match=r"1 of 2 shards failed: 'z'; the others are cached]$"):
        cache.get_many(["a", "z"], source)
    assert same_bytes(cache.get_many(["a"], source)[0], source.tensors["a"])
    assert figures(cache, "mutations", "fetch_errors", "misses", "hits") == (1, 1, 3, 1)


def test_a_retry_drops_shards_written_meanwhile(
    cache: TensorCache, source: DictSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first look-up joins a fetch that fails; before its second one another call fetches that shard, and writes."""
    cache.get_many(["a"], source)[0].add_(1)
    readers = gated(source)
    failing = cache.prefetch(["b"], source)
    source.wrap = lambda reader: reader
    keep_arrived, wait = Fetch.keep_arrived, Fetch.wait

    def let_it_fail(fetch: Fetch) -> None:
        monkeypatch.setattr(Fetch, "wait", wait)
        readers[0].after_gate = lambda: (_ for _ in ()).throw(FetchError("the connection broke"))
        readers[0].gate.set()
        fetch.wait()

    def keep_and_write(fetch: Fetch) -> None:
        monkeypatch.setattr(Fetch, "keep_arrived", keep_arrived)
        fetch.keep_arrived()
        cache.get_many(["b"], source)[0].zero_()

    monkeypatch.setattr(Fetch, "wait", let_it_fail)
    monkeypatch.setattr(Fetch, "keep_arrived", keep_and_write)
    first, second = cache.get_many(["a", "b"], source)
    assert same_bytes(first, source.tensors["a"])
    assert same_bytes(second, source.tensors["b"])
    assert isinstance(failing.exception(30), FetchError)
    assert source.asked == [["a"], ["b"], ["a"], ["b"], ["b"]]
    assert figures(cache, "mutations", "joined", "misses", "num_entries") == (2, 1, 5, 2)


def test_a_written_put_shard_is_fetched_from_the_calls_source(
    cache: TensorCache, source: DictSource, caplog: pytest.LogCaptureFixture
) -> None:
    for key in "ap":
        cache.put(key, torch.arange(5))
        cache.get_many([key], source)[0].add_(1)
    assert same_bytes(cache.get_many(["a"], source)[0], source.tensors["a"])
    with pytest.raises(FetchError, match="^shard p is not at node-a:1; " + DROPPED.format("'p'")):
        cache.get_many(["p"], source)
    assert cache.put("p", torch.arange(5))
    assert same_bytes(cache.get_many(["p"], source)[0], torch.arange(5))
    assert figures(cache, "mutations", "misses", "hits") == (2, 2, 3)
    (record,) = caplog.records
    assert "shard 'a' (40 bytes from this process)" in record.getMessage()


def test_get_of_a_written_shard_is_a_miss(
    cache: TensorCache, source: DictSource, caplog: pytest.LogCaptureFixture
) -> None:
    cache.put("p", torch.arange(5))
    got = cache.get("p")
    assert got is not None
    got.add_(1)
    assert cache.get("p") is None
    assert "p" not in cache
    assert "shard 'p'" in caplog.text
    assert cache.put("p", torch.arange(5)), "it may be put again"
    assert figures(cache, "mutations", "misses", "requested") == (1, 0, 0)


def test_put_takes_the_place_of_a_written_shard(cache: TensorCache, caplog: pytest.LogCaptureFixture) -> None:
    cache.put("p", torch.arange(5))
    got = cache.get("p")
    assert got is not None
    got.add_(1)
    assert cache.put("p", torch.arange(7))
    found = cache.get("p")
    assert found is not None
    assert same_bytes(found, torch.arange(7))
    assert same_bytes(got, torch.arange(1, 6))
    assert "shard 'p'" in caplog.text
    assert figures(cache, "mutations", "num_entries") == (1, 1)


def test_put_on_a_written_shard_is_an_error_where_that_is_the_policy() -> None:
    cache = on_host(on_mutation="error")
    cache.put("p", torch.arange(5))
    got = cache.get("p")
    assert got is not None
    got.add_(1)
    with pytest.raises(MutatedError, match="'p'"):
        cache.put("p", torch.arange(5))
    cache.clear(["p"])
    assert cache.put("p", torch.arange(5))


def test_a_capture_fails_for_a_written_shard(tmp_path: Path, source: DictSource) -> None:
    cuda = FakeCuda()
    device = cuda_device(cuda, tmp_path)
    cache = TensorCache(CONFIG, device=device)
    written, other = cache.get_many(["a", "b"], source)
    written.add_(1)
    other.add_(1)
    with cuda.capture(device.new_stream()):
        with pytest.raises(
            TransferError, match=r"cannot fetch 'a' \(it was written to in place since it came\) \(2 in"
        ):
            cache.get_many(["a", "b"], source)
        assert cache.keys() == ["a", "b"], "a refused call drops nothing"
        assert cache.get("b") is None
    assert same_bytes(cache.get_many(["a"], source)[0], source.tensors["a"])
    assert figures(cache, "mutations", "misses") == (2, 3)
    cache.close()


# Leftovers.


@pytest.mark.parametrize("claims", [True, False])
def test_a_dropped_block_dies_outside_the_lock(claims: bool) -> None:
    index = ShardIndex(lambda base, num_loans: False, mutations=Mutations("refetch"))
    entry = index.reserve("a")
    assert entry is not None
    base = torch.zeros(4)
    index.publish([(entry, Copy("a", base, None, 16))], "n:1", None)
    base.add_(1)
    deaths: list[bool] = []
    weakref.finalize(base, lambda: deaths.append(index._lock.locked()))
    del base, entry
    _ = index.claim(["a"]) if claims else index.find("a")
    assert deaths == [False]


def test_an_error_that_is_kept_keeps_no_block(source: DictSource) -> None:
    cache = on_host(on_mutation="error")
    cache.get_many(["a"], source)[0].fill_(7)
    caught = []
    gc.disable()
    try:
        for ask in (lambda: cache.get_many(["a"], source), lambda: cache.get("a")):
            with pytest.raises(MutatedError) as info:
                ask()
            caught.append(info.value)
        cache.clear()
        cache.synchronize()
        assert cache.buffer_stats()["device_bytes"] == 0
    finally:
        gc.enable()
    assert len(caught) == 2
