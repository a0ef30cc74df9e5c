"""`prefer="host"`: batches that never sit on the device, received into the host tier and handed out there."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from gpu_cache import FetchError, TensorCache
from gpu_cache.device.host import HostDevice
from gpu_cache.errors import MutatedError, TransferError
from tests.support.sim_device import SimDevice
from tests.support.sources import DictSource, same_bytes
from tests.support.tier_scene import CONFIG, KIB, KINDS, SHARDS, fill, is_in, on_host, parked, run_of


@pytest.fixture
def source() -> DictSource:
    return DictSource({**SHARDS, "empty": torch.empty(0, 3)})


def test_missing_shards_are_received_on_the_host_and_take_nothing_of_the_device(
    cache: TensorCache, source: DictSource
) -> None:
    got = on_host(cache, source, "ab")
    assert is_in("host", cache, got)
    assert {one.device.type for one in got} == {"cpu"}
    assert parked(cache) == {*run_of("a"), *run_of("b")}
    again = on_host(cache, source, "ab")
    assert [one.data_ptr() for one in again] == [one.data_ptr() for one in got], "handed out without a copy"
    stats = cache.buffer_stats()
    assert (stats["misses"], stats["host_hits"], stats["hits"], stats["fetches"]) == (8, 8, 0, 1)
    assert (stats["miss_bytes"], stats["hit_bytes"], stats["requested_bytes"]) == (16_000, 16_000, 32_000)
    assert (stats["host_bytes"], stats["device_bytes"], stats["device_reserved_bytes"]) == (16 * KIB, 0, 0)
    assert (stats["copies"], stats["h2d_bytes"], stats["pinned_bytes"]) == (0, 0, 0)
    assert (stats["num_entries"], stats["total_bytes"]) == (8, 16_000)
    assert cache._index.report()["host_entries"] == 8


def test_an_evicted_shard_is_handed_out_on_the_host(cache: TensorCache, source: DictSource) -> None:
    fill(cache, source, "abcdef")
    before, asked = cache.buffer_stats(), len(source.asked)
    got = on_host(cache, source, "a")
    if isinstance(cache._lazy.open().device, SimDevice):
        for tensor, key in zip(got, run_of("a"), strict=True):  # the copies that filled them are seen to be done
            expected = SHARDS[key].numpy().view("uint8")
            cache._lazy.open().device.host_read(tensor, expected, str(key))  # type: ignore[attr-defined]
    after = cache.buffer_stats()
    assert is_in("host", cache, got)
    assert len(source.asked) == asked
    assert after["copies"] == before["copies"]
    assert after["host_hits"] - before["host_hits"] == 4
    assert parked(cache) >= set(run_of("a"))


def test_a_shard_on_the_device_is_handed_out_there(cache: TensorCache, source: DictSource) -> None:
    fill(cache, source, "a")
    got = on_host(cache, source, "ab")
    assert is_in("device", cache, got[:4])
    assert is_in("host", cache, got[4:])
    assert parked(cache) == set(run_of("b"))


def test_a_call_for_the_device_takes_it_out_of_the_tier(cache: TensorCache, source: DictSource) -> None:
    on_host(cache, source, "a")
    got = cache.get_many(run_of("a"), source)
    assert all(same_bytes(tensor, SHARDS[key]) for key, tensor in zip(run_of("a"), got, strict=True))
    assert is_in("device", cache, got)
    assert parked(cache) == set()
    cache.synchronize()
    stats = cache.buffer_stats()
    assert (stats["host_bytes"], stats["misses"], stats["host_hits"], stats["num_entries"]) == (0, 4, 4, 4)
    assert len(source.asked) == 1


def test_a_shard_that_a_reader_holds_on_the_host_stays_there(cache: TensorCache, source: DictSource) -> None:
    """Its holder may write during the copy: then the copy is no original, and no other caller may get it."""
    held = on_host(cache, source, "a")
    got = cache.get_many(run_of("a"), source)
    assert all(same_bytes(tensor, SHARDS[key]) for key, tensor in zip(run_of("a"), got, strict=True))
    assert is_in("device", cache, got)
    assert parked(cache) == set(run_of("a"))
    assert cache.buffer_stats()["overflows"] == 0
    held[0].fill_(7)
    again = cache.get_many(run_of("a"), source)
    assert same_bytes(again[0], SHARDS["a0"])
    assert source.asked == [run_of("a"), ["a0"]]
    assert parked(cache) == set(run_of("a")[1:]), "fetched again for the device"
    del held, got, again
    fill(cache, source, "a")
    assert parked(cache) == set()
    assert len(source.asked) == 2


def test_the_tier_makes_room_and_overflows_only_when_all_of_it_is_held(
    cache: TensorCache, source: DictSource, caplog: pytest.LogCaptureFixture
) -> None:
    on_host(cache, source, "abcdefgh")
    held = on_host(cache, source, "ijklabcd")
    assert parked(cache) == {key for name in "ijklabcd" for key in run_of(name)}
    assert caplog.records == []
    overflown = on_host(cache, source, "ef")
    assert cache.buffer_stats()["overflows"] == 8
    assert "e0" not in cache
    (record,) = caplog.records
    assert "the host tier of 65,536 bytes is full" in record.getMessage()
    assert "raise host_tier_bytes (GPU_CACHE_HOST_TIER_BYTES)" in record.getMessage()
    del held, overflown
    cache.synchronize()
    on_host(cache, source, "ef")
    assert parked(cache) >= {*run_of("e"), *run_of("f")}
    assert cache.buffer_stats()["overflows"] == 8


def test_without_a_tier_it_is_refused_unless_the_device_is_the_host(source: DictSource) -> None:
    off = dataclasses.replace(CONFIG, host_tier_bytes=0)
    staged = TensorCache(off, device=HostDevice(stages=True))
    for call in (staged.get_many, staged.prefetch):
        with pytest.raises(ValueError, match=r"host tier is off; set host_tier_bytes \(GPU_CACHE_HOST_TIER_BYTES\)"):
            call(["a0"], source, prefer="host")
        with pytest.raises(ValueError, match="prefer='gpu': must be 'device' or 'host'"):
            call(["a0"], source, prefer="gpu")  # type: ignore[arg-type]
    assert source.asked == []
    assert len(staged) == 0
    (tensor,) = TensorCache(off, device=HostDevice()).get_many(["a0"], source, prefer="host")
    assert same_bytes(tensor, SHARDS["a0"])


def test_a_scope_drops_shards_that_a_prefetch_brought_to_the_host(cache: TensorCache, source: DictSource) -> None:
    with cache.scope("step"):
        assert cache.prefetch([*run_of("a"), "empty"], source, prefer="host").result(10) == 5
        assert cache.prefetch(run_of("a"), source, prefer="host").result(10) == 0, "it is there"
        assert parked(cache) == {*run_of("a"), "empty"}
        fill(cache, source, "a")
        assert len(cache) == 5
    assert len(cache) == 0


@pytest.mark.parametrize("cache", KINDS[:3], indirect=True)
def test_a_shard_without_bytes_comes_where_a_call_asks_for_it(cache: TensorCache, source: DictSource) -> None:
    (tensor,) = cache.get_many(["empty"], source, prefer="host")
    assert (tensor.shape, tensor.device.type) == ((0, 3), "cpu")
    assert parked(cache) == {"empty"}
    del tensor
    assert cache.get_many(["empty"], source)[0].shape == (0, 3)
    assert parked(cache) == set()
    assert len(source.asked) == 1


@pytest.mark.parametrize("prefers", ["device", "host"])
def test_after_a_write_readers_get_the_original(
    cache: TensorCache, source: DictSource, caplog: pytest.LogCaptureFixture, prefers: str
) -> None:
    other, written = cache.get_many(["a0", "a1"], source, prefer="host")
    written[3] = 12345
    again = cache.get_many(run_of("a"), source, prefer=prefers)  # type: ignore[call-overload]
    assert all(same_bytes(tensor, SHARDS[key]) for key, tensor in zip(run_of("a"), again, strict=True))
    assert written[3] == 12345, "who holds the old block keeps it"
    assert source.asked == [["a0", "a1"], ["a1", "a2", "a3"]]
    assert same_bytes(other, SHARDS["a0"])
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "'a1'" in record.getMessage()
    assert cache.buffer_stats()["mutations"] == 1


@pytest.mark.parametrize("prefers", ["device", "host"])
def test_a_written_shard_that_its_owner_has_no_more_is_an_error(
    cache: TensorCache, source: DictSource, prefers: str
) -> None:
    (written,) = cache.get_many(["a0"], source, prefer="host")
    written.zero_()
    del source.tensors["a0"]  # type: ignore[attr-defined]
    with pytest.raises(FetchError, match="cached copies of 'a0' were dropped, as a reader wrote into them"):
        cache.get_many(["a0"], source, prefer=prefers)  # type: ignore[call-overload]
    assert parked(cache) == set()


def test_get_of_a_written_shard_there_is_a_miss(cache: TensorCache, source: DictSource) -> None:
    cache.get_many(["a0"], source, prefer="host")[0].zero_()
    assert cache.get("a0") is None
    assert (parked(cache), cache.buffer_stats()["misses"]) == (set(), 1)


def test_the_other_policies_hold_in_the_host_tier_too(source: DictSource) -> None:
    strict = TensorCache(dataclasses.replace(CONFIG, on_mutation="error"), device=SimDevice())
    (written,) = strict.get_many(["a0"], source, prefer="host")
    written.zero_()
    for prefer in ("host", "device"):
        with pytest.raises(MutatedError, match="a0"):
            strict.get_many(["a0"], source, prefer=prefer)  # type: ignore[call-overload]
    lax = TensorCache(dataclasses.replace(CONFIG, on_mutation="ignore"), device=SimDevice())
    (written,) = lax.get_many(["a0"], source, prefer="host")
    written.zero_()
    assert lax.get_many(["a0"], source, prefer="host")[0].data_ptr() == written.data_ptr()
    del written
    assert not lax.get_many(["a0"], source)[0].any()
    assert parked(lax) == set()


def test_checksums_see_writes_that_torch_does_not_count(source: DictSource) -> None:
    cache = TensorCache(dataclasses.replace(CONFIG, debug_checksum=True), device=HostDevice(stages=True))
    (tensor,) = cache.get_many(["a1"], source, prefer="host")
    tensor.numpy()[0] = -1
    assert same_bytes(cache.get_many(["a1"], source, prefer="host")[0], SHARDS["a1"])
    assert len(source.asked) == 2


def test_checksums_see_a_write_from_before_a_prefetch_to_the_device(source: DictSource) -> None:
    cache = TensorCache(dataclasses.replace(CONFIG, debug_checksum=True), device=HostDevice(stages=True))
    (tensor,) = cache.get_many(["a1"], source, prefer="host")
    tensor.numpy()[0] = -1
    del tensor
    cache.prefetch(["a1"], source).result(30)
    assert parked(cache) == set()
    assert same_bytes(cache.get_many(["a1"], source)[0], SHARDS["a1"])
    assert len(source.asked) == 2


def test_a_capture_gets_shards_of_the_tier_and_nothing_else(source: DictSource) -> None:
    device = SimDevice()
    cache = TensorCache(CONFIG, device=device)
    on_host(cache, source, "a")
    with device.stream(device.pooled[1]):
        device.captured = device.pooled[1]
        assert len(cache.get_many(run_of("a"), source, prefer="host")) == 4
        with pytest.raises(TransferError, match=r"cannot fetch 'a0' \(it is in the host tier\)"):
            cache.get_many(run_of("a"), source)
        with pytest.raises(TransferError, match="cannot fetch 'b0'"):
            cache.get_many(run_of("b"), source, prefer="host")
        device.captured = None
    assert device.faults == []


def test_offload_leaves_the_tier_and_close_leaves_held_shards(cache: TensorCache, source: DictSource) -> None:
    held = on_host(cache, source, "ab")[:2]
    fill(cache, source, "c")
    cache.offload()
    assert parked(cache) == {key for name in "abc" for key in run_of(name)}
    engine = cache._lazy.open()
    assert engine.tier is not None
    cache.close()
    assert all(same_bytes(tensor, SHARDS[key]) for key, tensor in zip(run_of("a"), held, strict=False))
    held.clear()
    engine.synchronize()
    assert engine.tier.pool.accounts()["reserved"] == 0


def test_bytes_on_their_way_to_either_place_are_bounded_together(cache: TensorCache) -> None:
    engine = cache._lazy.open()
    assert engine.host_level.transfer.inflight is engine.transfer.inflight
