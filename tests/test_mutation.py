"""Readers that write into what they got: others get the original bytes, or what is there if that is all there is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from gpu_cache import FetchError, TensorCache, TransferError
from gpu_cache.device.host import HostDevice
from tests.support.cuda_devices import cuda_device
from tests.support.fake_cuda import FakeCuda
from tests.support.interleave_stage import eventually
from tests.support.mutation_scene import CONFIG, UNSEEN, WRITES, figures, on_host, settle
from tests.support.sources import DictSource, gated, same_bytes


@pytest.fixture(params=["host", "staged host", "fake cuda"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TensorCache]:
    if request.param == "fake cuda":
        device = cuda_device(FakeCuda(), tmp_path)
        cache = TensorCache(CONFIG, device=device)
        yield cache
        settle(cache)
        cache.close()
        assert not device._cuda.violations
    else:
        yield TensorCache(CONFIG, device=HostDevice(stages=request.param == "staged host"))


@pytest.fixture
def source() -> DictSource:
    return DictSource({name: torch.randn(100) for name in "abc"})


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
    settle(cache)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(
        "shard 'a' (400 bytes from node-a:1) was written to in place: its bytes are no"
    )
    assert "GPU_CACHE_ON_MUTATION" in record.getMessage()
    assert cache.get_many(["a"], source)[0].data_ptr() == fresh.data_ptr()
    assert figures(cache, "mutations", "misses", "hits", "num_entries") == (1, 3, 2, 2)
    assert len(source.asked) == 2


def test_the_old_block_goes_when_its_last_alias_does(cache: TensorCache, source: DictSource) -> None:
    (written,) = cache.get_many(["a"], source)
    written.add_(1)
    fresh = cache.get_many(["a"], source)
    settle(cache)
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
def test_what_torch_does_not_count_is_not_seen_without_checksums(
    write: Callable[[torch.Tensor], object], source: DictSource
) -> None:
    cache = on_host()
    write(cache.get_many(["a"], source)[0])
    assert not same_bytes(cache.get_many(["a"], source)[0], source.tensors["a"])
    assert figures(cache, "mutations", "misses") == (0, 1)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.int64], ids=str
)
@pytest.mark.parametrize("shape", [(), (3,), (5, 7), (1001,)])
def test_any_dtype_and_shape_is_compared(cache: TensorCache, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    source = DictSource({"a": torch.zeros(shape).to(dtype), "b": torch.zeros(shape).to(dtype)})
    first, second = cache.get_many(["a", "b"], source)
    first.view(-1)[-1:].view(torch.uint8)[-1] = 1
    second.copy_(second.clone())
    for got in cache.get_many(["a", "b"], source):
        assert same_bytes(got, source.tensors["a"])
    assert figures(cache, "mutations", "misses") == (1, 4)


def test_bits_are_compared_not_numbers(cache: TensorCache, caplog: pytest.LogCaptureFixture) -> None:
    source = DictSource({"nan": torch.full((9,), torch.nan), "zero": torch.zeros(9)})
    nan, zero = cache.get_many(["nan", "zero"], source)
    nan.view(torch.int32).add_(0)
    zero.neg_()
    cache.get_many(["nan", "zero"], source)
    assert figures(cache, "mutations") == (1,)
    assert [record.args[0] for record in caplog.records] == ["zero"]  # type: ignore[index]


def test_an_empty_shard_has_nothing_to_change() -> None:
    cache, source = on_host(), DictSource({"a": torch.empty(0, 3)})
    cache.get_many(["a"], source)[0].add_(1)
    assert cache.get_many(["a"], source)[0].shape == (0, 3)
    assert figures(cache, "mutations") == (0,)


def test_a_write_that_changes_nothing_costs_one_fetch_and_no_warning(
    cache: TensorCache, source: DictSource, caplog: pytest.LogCaptureFixture
) -> None:
    (tensor,) = cache.get_many(["a"], source)
    tensor.add_(0)
    for _ in range(3):
        assert same_bytes(cache.get_many(["a"], source)[0], source.tensors["a"])
    tensor.add_(0)  # its block is not what others get any more
    cache.get_many(["a"], source)
    assert figures(cache, "mutations", "misses", "hits") == (0, 2, 3)
    assert not caplog.records


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
    assert figures(cache, "mutations") == (1,)


def test_what_is_kept_stays_kept(cache: TensorCache, source: DictSource) -> None:
    cache.get_many(["a"], source, keep=True)[0].add_(1)
    cache.get_many(["a"], source)
    del source.tensors["a"]
    cache.get_many(["a"], source)[0].add_(1)
    cache.get_many(["a"], source)  # in vain
    for _ in range(3):
        cache.get_many(["b"], source)
        cache.clear(["b"])
    assert cache.entries()[0].clears_survived == 3
    assert figures(cache, "outlived_entries") == (0,)


def test_a_prefetch_looks_at_no_versions(cache: TensorCache, source: DictSource) -> None:
    cache.get_many(["a"], source)[0].add_(1)
    assert cache.prefetch(["a"], source).result(5) == 0
    assert len(source.asked) == 1
    assert same_bytes(cache.get_many(["a"], source)[0], source.tensors["a"])


def test_a_full_pool_gives_the_original_all_the_same() -> None:
    tensors = {number: torch.randn(1 << 18) for number in range(8)}  # 8 MiB, as the pool
    cache, source = on_host(), DictSource(tensors)
    held = cache.get_many(list(tensors), source)
    held[0].zero_()
    held[5].zero_()
    assert all(map(same_bytes, cache.get_many(list(tensors), source), tensors.values()))
    assert figures(cache, "mutations", "overflows") == (2, 2)


def test_a_comparison_that_the_device_refuses_is_told(
    source: DictSource, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory for the result")

    cache = on_host()
    cache.get_many(["a"], source)[0].add_(1)
    monkeypatch.setattr(HostDevice, "compare_async", refuse)
    assert same_bytes(cache.get_many(["a"], source)[0], source.tensors["a"])
    assert figures(cache, "mutations") == (0,)
    assert "whether bytes changed is not known (no memory for the result)" in caplog.text


def test_long_shards_are_compared_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_cache.device.bitwise._PIECE_BYTES", 64)
    for at in (0, 63, 64, 199, 200, 202):
        cache, source = on_host(), DictSource({"a": torch.zeros(203, dtype=torch.uint8)})
        cache.get_many(["a"], source)[0][at] = 1
        cache.get_many(["a"], source)
        assert figures(cache, "mutations") == (1,), at


# Not to be had again.


def test_what_its_owner_has_no_more_is_handed_out_as_it_is_and_told_once(
    cache: TensorCache, source: DictSource, caplog: pytest.LogCaptureFixture
) -> None:
    (written,) = cache.get_many(["a"], source)
    del source.tensors["a"]
    written.fill_(7)
    got = [cache.get_many(["a", "b"], source)[0] for _ in range(3)]
    assert {one.data_ptr() for one in got} == {written.data_ptr()}
    assert source.asked == [["a"], ["a", "b"]]
    (record,) = caplog.records
    assert "could not be fetched again (shard a is not at node-a:1): what is there is handed out" in record.getMessage()
    assert figures(cache, "mutations", "fetch_errors", "misses", "hits", "num_entries") == (1, 1, 3, 4, 2)
    assert figures(cache, "requested_bytes", "fetch_bytes") == (7 * 400, 2 * 400), "what was handed out, and what came"
    written.add_(1)
    cache.get_many(["a"], source)
    assert len(source.asked) == 3, "another write is another question"


def test_an_owner_that_hangs_ends_in_what_is_there(cache: TensorCache, source: DictSource) -> None:
    (written,) = cache.get_many(["a"], source)
    written.fill_(7)
    readers = gated(source)
    (got,) = cache.get_many(["a"], source, timeout_s=0.05)
    assert got.data_ptr() == written.data_ptr()
    readers[0].gate.set()
    eventually(lambda: not cache._lazy.tasks)
    assert cache.get_many(["a"], source)[0].data_ptr() == written.data_ptr(), "what came late changes nothing"
    assert figures(cache, "mutations", "num_entries") == (1, 1)


def test_others_that_fail_beside_it_fail_as_ever(cache: TensorCache, source: DictSource) -> None:
    cache.get_many(["a"], source)[0].add_(1)
    with pytest.raises(FetchError, match="1 of 2 shards failed: 'z'"):
        cache.get_many(["a", "z"], source)
    assert same_bytes(cache.get_many(["a"], source)[0], source.tensors["a"])
    assert figures(cache, "mutations", "fetch_errors", "misses", "hits") == (1, 1, 3, 1)


def test_what_was_put_has_no_source(cache: TensorCache, source: DictSource, caplog: pytest.LogCaptureFixture) -> None:
    cache.put("a", torch.arange(5))
    for writes in (1, 2):
        cache.get_many(["a"], source)[0].add_(1)
        for _ in range(2):
            assert torch.equal(cache.get_many(["a"], source)[0], torch.arange(5) + writes)
    assert figures(cache, "mutations", "misses") == (2, 0)
    assert not source.asked
    (record,) = caplog.records
    assert "shard 'a' (40 bytes from this process)" in record.getMessage()
    assert "it was put, and has no source" in record.getMessage()


def test_get_hands_out_what_is_there_and_says_so(
    cache: TensorCache, source: DictSource, caplog: pytest.LogCaptureFixture
) -> None:
    cache.put("p", torch.arange(5))
    cache.get_many(["a"], source)[0].fill_(7)
    for _ in range(2):
        got = cache.get("a")
        assert got is not None
        assert torch.equal(got, torch.full((100,), 7.0))
    assert "`get` has no source" in caplog.records[0].getMessage()
    assert same_bytes(cache.get_many(["a"], source)[0], source.tensors["a"]), "who can fetch it still does"
    for _ in range(2):
        cache.get("p").add_(1)  # type: ignore[union-attr]
    assert figures(cache, "mutations") == (2,), "one by one that put, of which the second nobody has met; one by a"


def test_a_capture_is_told_that_it_cannot_be_fetched(tmp_path: Path, source: DictSource) -> None:
    cuda = FakeCuda()
    device = cuda_device(cuda, tmp_path)
    cache = TensorCache(CONFIG, device=device)
    written, _ = cache.get_many(["a", "b"], source)
    written.add_(1)
    with cuda.capture(device.new_stream()):
        cache.get_many(["b"], source)
        with pytest.raises(
            TransferError, match=r"cannot fetch 'a' \(it was written to in place since it came\) \(1 in"
        ):
            cache.get_many(["b", "a"], source)
        assert cache.get("a") is not None
    assert same_bytes(cache.get_many(["a"], source)[0], source.tensors["a"])
    settle(cache)
    cache.close()
