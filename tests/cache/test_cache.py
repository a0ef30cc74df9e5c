from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gpu_cache import CacheClosedError, CacheFullError, FetchError, TensorCache, TransferError
from gpu_cache.report.counters import BufferStats
from gpu_cache.source import NO_SOURCE
from tests.support.cuda_devices import cuda_device
from tests.support.fake_cuda import FakeCuda
from tests.support.mutation_scene import CONFIG
from tests.support.scoped import device_bytes
from tests.support.sources import DictSource, gated, same_bytes, some_tensors
from tests.support.threads import run_threads


def test_shards_are_fetched_once_and_come_back_bit_for_bit(cache: TensorCache) -> None:
    tensors = some_tensors(300)
    source = DictSource(tensors)
    first = cache.get_many(list(tensors), source)
    second = cache.get_many(list(reversed(tensors)), source)
    assert all(same_bytes(got, want) for got, want in zip(first, tensors.values(), strict=True))
    assert all(same_bytes(got, want) for got, want in zip(second, reversed(tensors.values()), strict=True))
    assert source.asked == [list(tensors)]
    stats = cache.buffer_stats()
    assert (stats["misses"], stats["hits"], stats["num_entries"]) == (300, 300, 300)
    assert stats["fetch_bytes"] == stats["hit_bytes"] == sum(tensor.nbytes for tensor in tensors.values())


def test_a_hit_copies_nothing(cache: TensorCache) -> None:
    source = DictSource({"a": torch.arange(100)})
    (first,), (second,) = cache.get_many(["a"], source), cache.get_many(["a"], source)
    assert first is not second
    assert first.data_ptr() == second.data_ptr()
    assert cache.buffer_stats()["copies"] <= 1


def test_a_partial_hit_asks_only_for_the_misses(cache: TensorCache) -> None:
    tensors = some_tensors(6)
    keys, source = list(tensors), DictSource(tensors)
    cache.get_many(keys[:4], source)
    cache.get_many(keys[2:], source)
    assert source.asked == [keys[:4], keys[4:]]


def test_a_repeated_key_is_asked_for_once_and_gives_tensors_of_its_own(cache: TensorCache) -> None:
    source = DictSource({"a": torch.arange(5), "b": torch.arange(3)})
    got = cache.get_many(["a", "b", "a"], source)
    assert source.asked == [["a", "b"]]
    assert same_bytes(got[0], got[2])
    assert got[0] is not got[2]
    assert cache.buffer_stats()["requested"] == 2


def test_a_call_without_keys_does_no_work(cache: TensorCache) -> None:
    source = DictSource({})
    assert cache.get_many([], source) == []
    assert cache.prefetch([], source).result(0) == 0
    assert source.asked == []


def test_tensors_own_their_storage(cache: TensorCache, tmp_path: Path) -> None:
    (tensor,) = cache.get_many(["a"], DictSource({"a": torch.arange(1000)}))
    assert tensor.untyped_storage().nbytes() == 8000
    assert tensor.storage_offset() == 0
    torch.save(tensor, tmp_path / "shard.pt")
    assert (tmp_path / "shard.pt").stat().st_size < 12_000
    with pytest.raises(RuntimeError):
        tensor.resize_(10_000)


def test_a_shard_larger_than_slots_runs_and_slabs_arrives_whole(cache: TensorCache) -> None:
    large = torch.randint(0, 255, (5 << 20,), dtype=torch.uint8)
    source = DictSource({"small": torch.arange(7), "large": large, "after": torch.arange(9)})
    got = cache.get_many(["small", "large", "after"], source)
    assert torch.equal(got[1], large)
    assert torch.equal(got[2], torch.arange(9))


def test_a_run_is_copied_by_one_call(cache: TensorCache) -> None:
    tensors = {number: torch.full((100,), number) for number in range(64)}  # 64 KiB with alignment: one run
    cache.get_many(list(tensors), DictSource(tensors))
    stats = cache.buffer_stats()
    assert stats["copies"] == (1 if stats["pinned_capacity_bytes"] else 0)


def test_a_missing_shard_fails_alone(cache: TensorCache) -> None:
    source = DictSource({"a": torch.arange(5), "c": torch.arange(3)})
    with pytest.raises(FetchError, match=r"shard b is not at node-a:1 \[1 of 3 shards failed: 'b'") as caught:
        cache.get_many(["a", "b", "c"], source)
    assert list(caught.value.failures) == ["b"]
    assert sorted(cache.keys()) == ["a", "c"]
    source.tensors = {"b": torch.arange(2)}
    assert [len(tensor) for tensor in cache.get_many(["a", "b", "c"], source)] == [5, 2, 3]
    assert source.asked[-1] == ["b"]


def test_a_clear_gives_the_bytes_back(cache: TensorCache) -> None:
    tensors = some_tensors(50)
    kept = cache.get_many(list(tensors), DictSource(tensors))[7][1:]
    assert cache.clear(["unknown", *tensors]) == 50
    assert device_bytes(cache) > 0, "one alias lives"
    assert same_bytes(kept, tensors["shard-7"][1:])
    del kept
    assert device_bytes(cache) == 0
    assert cache.buffer_stats()["device_reserved_bytes"] == 2 << 20, "a slab is kept for the next step"
    cache.trim()
    assert cache.buffer_stats()["device_reserved_bytes"] == 0


def test_reused_bytes_never_show_through_an_alias(cache: TensorCache) -> None:
    old, new = some_tensors(40, seed=1), some_tensors(40, seed=2)
    kept = cache.get_many(list(old), DictSource(old))[::5]
    for _ in range(5):
        cache.clear()
        cache.get_many(list(new), DictSource(new))
    assert all(same_bytes(got, want) for got, want in zip(kept, list(old.values())[::5], strict=True))


def test_clearing_a_node_leaves_the_others(cache: TensorCache) -> None:
    cache.get_many(["a", "b"], DictSource({"a": torch.ones(1), "b": torch.ones(2)}, node="one:1"))
    cache.get_many(["c"], DictSource({"c": torch.ones(3)}, node="two:1"))
    assert cache.clear_node("one:1", ["a", "c"]) == 1
    assert cache.clear_node("one:1") == 1
    assert cache.keys() == ["c"]


def test_prefetched_shards_are_hits(cache: TensorCache) -> None:
    tensors = some_tensors(20)
    source = DictSource(tensors)
    assert cache.prefetch(list(tensors), source).result(30) == 20
    got = cache.get_many(list(tensors), source)
    assert all(same_bytes(a, b) for a, b in zip(got, tensors.values(), strict=True))
    assert len(source.asked) == 1
    assert cache.prefetch(list(tensors), source).result(0) == 0


def test_a_failed_prefetch_fails_its_future_and_nothing_else(cache: TensorCache) -> None:
    source = DictSource({"a": torch.ones(1)})
    with pytest.raises(FetchError, match="shard b"):
        cache.prefetch(["a", "b"], source).result(30)
    assert cache.keys() == ["a"]


def test_a_read_joins_a_prefetch_under_way(cache: TensorCache) -> None:
    source = DictSource({"a": torch.arange(9)})
    readers = gated(source)
    future = cache.prefetch(["a"], source)
    assert readers[0].has_arrived.wait(30)
    threading.Timer(0.01, readers[0].gate.set).start()
    assert torch.equal(cache.get_many(["a"], source)[0], torch.arange(9))
    assert future.result(30) == 1
    assert len(source.asked) == 1
    assert cache.buffer_stats()["joined"] == 1


def test_ten_threads_on_one_shard_make_one_fetch(cache: TensorCache) -> None:
    source = DictSource({"a": torch.arange(1000)})
    got: list[torch.Tensor] = []
    run_threads([lambda: got.extend(cache.get_many(["a"], source))] * 10)
    assert len(source.asked) == 1
    assert len(got) == 10
    assert all(torch.equal(tensor, torch.arange(1000)) for tensor in got)


def test_a_put_shard_is_found(cache: TensorCache) -> None:
    value = torch.arange(10, dtype=torch.int16)[::2]
    assert cache.put("a", value, node="here")
    assert not cache.put("a", torch.zeros(1))
    found = cache.get("a")
    assert found is not None
    assert same_bytes(found, value.contiguous())
    assert cache.get("b") is None
    assert cache.clear_node("here") == 1


ODD: dict[str, torch.Tensor] = {
    "one element with a stride": torch.arange(8.0)[6::2],
    "conjugated": torch.tensor([1 + 2j, 3]).conj(),
    "negated": torch.tensor([1 + 2j, 3]).conj().imag[:1],
    "repeated": torch.ones(1).expand(3, 2),
    "zeros without memory": torch._efficientzerotensor((2,)),
    "bools beside 0 and 1": torch.tensor([[0, 2], [255, 1]], dtype=torch.uint8).view(torch.bool).t(),
    "four bits": torch.arange(6, dtype=torch.uint8).view(torch.float4_e2m1fn_x2).reshape(2, 3).t(),
    "raw bits": torch.arange(6, dtype=torch.int16).view(torch.bits16).reshape(2, 3).t(),
    "wide": torch.tensor([[1 + 2j, 3], [4, 5]], dtype=torch.complex128).t(),
}


@pytest.mark.parametrize("value", ODD.values(), ids=ODD.keys())
def test_a_put_shard_has_every_bit_whatever_its_layout(cache: TensorCache, value: torch.Tensor) -> None:
    assert cache.put("a", value)
    found = cache.get("a")
    assert found is not None
    assert (found.dtype, found.shape) == (value.dtype, value.shape)
    bits = {1: torch.uint8, 2: torch.int16}.get(value.itemsize, value.dtype)
    wanted = value.clone() if bits is value.dtype else value.view(bits).clone()
    assert torch.equal(found.view(bits), wanted)


def test_put_refuses_an_object_that_is_no_tensor(cache: TensorCache) -> None:
    with pytest.raises(TypeError, match="shard 'a' is a list: a Tensor is expected"):
        cache.put("a", [1, 2])  # type: ignore[arg-type]
    assert cache.put("a", torch.ones(2))


@pytest.mark.parametrize("source", [None, object(), {}])
def test_a_source_that_is_none_is_refused_for_a_missing_shard(cache: TensorCache, source: Any) -> None:
    said = f"source is a {type(source).__name__}: a ShardSource is expected"
    for call in (cache.get_many, cache.prefetch):
        with pytest.raises(TypeError, match=said):
            call(["a"], source)
    cache.put("a", torch.ones(2))
    assert len(cache.get_many(["a"], source)) == 1, "a hit asks no source"


def test_a_text_in_the_place_of_keys_is_refused(cache: TensorCache) -> None:
    cache.put("a", torch.ones(2))
    calls = [
        lambda: cache.get_many("a", NO_SOURCE),  # each of its letters is a cached key
        lambda: cache.clear("a"),
        lambda: cache.clear_node("node", "a"),
        lambda: cache.get_many("ab", NO_SOURCE),
        lambda: cache.prefetch("ab", NO_SOURCE),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"'ab?' is one key, where several are expected: put it into a list"):
            call()
    assert cache.keys() == ["a"]


@pytest.mark.parametrize("kind", [iter, dict.fromkeys], ids=["iterator", "dict"])
@pytest.mark.parametrize("options", [{}, {"keep": True}, {"on_error": "none"}])
def test_keys_are_taken_from_whatever_can_be_walked(cache: TensorCache, kind: Any, options: Any) -> None:
    source = DictSource({name: torch.full((3,), float(number)) for number, name in enumerate("abcd")})
    assert cache.prefetch(kind("ab"), source).result(30) == 2
    for _ in range(2):
        assert [tensor[0].item() for tensor in cache.get_many(kind("abcd"), source, **options)] == [0, 1, 2, 3]


@pytest.mark.parametrize("call", ["get_many", "prefetch"])
def test_a_place_that_is_none_is_refused(cache: TensorCache, call: str) -> None:
    with pytest.raises(ValueError, match="prefer='gpu': must be 'device' or 'host'"):
        getattr(cache, call)(["a"], NO_SOURCE, prefer="gpu")


def test_put_refuses_a_tensor_without_room_and_changes_nothing(cache: TensorCache) -> None:
    assert cache.put("a", torch.zeros(4 << 20, dtype=torch.uint8))
    held = cache.get("a")
    with pytest.raises(CacheFullError, match="need 6,291,456 bytes"):
        cache.put("b", torch.zeros(6 << 20, dtype=torch.uint8))
    with pytest.raises(ValueError, match="need a dense tensor in host memory"):
        cache.put("b", torch.zeros(3, device="meta"))
    assert cache.keys() == ["a"]
    assert held is not None


def test_a_full_pool_evicts_the_least_recently_used(cache: TensorCache) -> None:
    tensors = {number: torch.full((1 << 20,), number, dtype=torch.uint8) for number in range(10)}
    source = DictSource(tensors)
    for number in range(8):
        cache.get_many([number], source)
    cache.get_many([0], source)
    cache.get_many([8], source)
    assert 1 not in cache
    assert 0 in cache
    assert cache.buffer_stats()["evictions"] == 1
    assert cache.buffer_stats()["overflows"] == 0


def test_a_pool_full_of_held_shards_overflows_and_says_so(cache: TensorCache, caplog: pytest.LogCaptureFixture) -> None:
    tensors = {number: torch.full((1 << 20,), number, dtype=torch.uint8) for number in range(12)}
    source = DictSource(tensors)
    held = cache.get_many(list(tensors), source)
    assert all(torch.equal(got, want) for got, want in zip(held, tensors.values(), strict=True))
    stats = cache.buffer_stats()
    assert stats["num_entries"] + stats["overflows"] == 12
    assert stats["overflows"] >= 4
    assert stats["overflow_bytes"] == stats["overflows"] << 20
    again = cache.get_many([11], source)
    assert torch.equal(again[0], tensors[11])
    assert len([record for record in caplog.records if "GPU_CACHE_POOL_BYTES" in record.message]) == 1
    del held, again
    cache.clear()
    assert device_bytes(cache) == 0


def test_small_shards_fill_a_pool_that_has_holes(cache: TensorCache) -> None:
    small = {number: torch.full((4096,), number % 250, dtype=torch.uint8) for number in range(2048)}
    held = cache.get_many(list(small), DictSource(small))
    cache.clear(range(0, 2048, 2))
    del held[::2]
    more = {f"more-{number}": torch.full((4000,), 7, dtype=torch.uint8) for number in range(1024)}
    got = cache.get_many(list(more), DictSource(more))
    assert cache.buffer_stats()["overflows"] == 0, "a run is halved until its parts fit the holes"
    assert all(bool((tensor == 7).all()) for tensor in got)
    assert all(bool((tensor == number % 250).all()) for number, tensor in zip(range(1, 2048, 2), held, strict=True))


def test_trim_returns_empty_slabs(cache: TensorCache) -> None:
    cache.get_many(["a"], DictSource({"a": torch.arange(9)}))
    assert not cache.trim()
    cache.clear()
    cache.trim()
    assert cache.buffer_stats()["device_reserved_bytes"] == 0


def test_closing_keeps_tensors_and_refuses_calls(cache: TensorCache) -> None:
    source = DictSource({"a": torch.arange(9)})
    (tensor,) = cache.get_many(["a"], source)
    cache.close()
    cache.close()
    for call in (
        lambda: cache.get_many(["a"], source),
        lambda: cache.prefetch(["a"], source),
        lambda: cache.put("b", torch.ones(1)),
        lambda: cache.get("a"),
    ):
        with pytest.raises(CacheClosedError):
            call()
    assert torch.equal(tensor, torch.arange(9))
    assert cache.buffer_stats()["num_entries"] == 0
    assert cache.clear() == 0


def test_a_first_read_in_inference_mode_serves_a_training_step(cache: TensorCache) -> None:
    source = DictSource({"a": torch.ones(3, 3)})
    with torch.inference_mode():
        (first,) = cache.get_many(["a"], source)
    (second,) = cache.get_many(["a"], source)
    weight = torch.ones(3, 3, requires_grad=True)
    (weight @ first + weight * second).sum().backward()
    assert weight.grad is not None


def test_a_fake_tensor_mode_of_the_caller_changes_nothing(cache: TensorCache) -> None:
    source = DictSource({"a": torch.ones(3)})
    with FakeTensorMode():
        (tensor,) = cache.get_many(["a"], source)
    assert type(tensor) is torch.Tensor
    assert tensor.tolist() == [1.0, 1.0, 1.0]


def test_an_autograd_graph_keeps_a_cleared_shard(cache: TensorCache) -> None:
    weight = torch.ones(64, requires_grad=True)
    loss = (weight * cache.get_many(["a"], DictSource({"a": torch.arange(64.0)}))[0]).sum()
    cache.clear()
    cache.get_many(["b"], DictSource({"b": torch.zeros(64)}))
    loss.backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.arange(64.0))
    del loss
    gc.collect()
    cache.clear()
    assert device_bytes(cache) == 0


def test_statistics_have_exactly_the_documented_keys(cache: TensorCache) -> None:
    before = cache.buffer_stats()
    cache.get_many(["a"], DictSource({"a": torch.ones(3)}))
    assert set(before) == set(cache.buffer_stats()) == set(BufferStats.__annotations__)
    assert before["device_reserved_bytes"] == 0
    assert all(isinstance(value, int | float) for value in cache.buffer_stats().values())


def test_the_peak_can_be_reset(cache: TensorCache) -> None:
    cache.get_many(["a"], DictSource({"a": torch.ones(300)}))
    cache.clear()
    assert device_bytes(cache) == 0
    assert cache.buffer_stats()["device_peak_bytes"] == 1536
    cache.reset_peak_stats()
    assert cache.buffer_stats()["device_peak_bytes"] == 0


def test_repr_names_device_and_entries(cache: TensorCache) -> None:
    assert repr(cache).startswith("TensorCache(no device yet, ShardIndex(0 ready")
    cache.put("a", torch.ones(1))
    assert repr(cache).startswith(("TensorCache(cpu, ShardIndex(1 ready", "TensorCache(cuda:1, ShardIndex(1 ready"))


def test_capture_hands_out_only_shards_that_the_host_saw_arrive(tmp_path: Path) -> None:
    cuda = FakeCuda()
    device = cuda_device(cuda, tmp_path)
    cache = TensorCache(CONFIG, device=device)
    source = DictSource({"a": torch.ones(3), "b": torch.ones(4), "c": torch.ones(1)})
    cache.get_many(["a"], source)
    cache.get_many(["b"], source, ready="stream")
    with cuda.capture(device.fence_streams()[3]):
        assert cache.get_many(["a"], source)[0].tolist() == [1.0] * 3
        with pytest.raises(TransferError, match="not seen complete"):
            cache.get_many(["b"], source)
        with pytest.raises(TransferError, match="cannot fetch 'c'"):
            cache.get_many(["c"], source)
        with pytest.raises(TransferError, match="cannot synchronize"):
            cache.synchronize()
    assert len(cache.get_many(["b", "c"], source)) == 2


def test_ready_on_the_stream_makes_the_callers_stream_wait(tmp_path: Path) -> None:
    cuda = FakeCuda()
    device = cuda_device(cuda, tmp_path)
    cache = TensorCache(CONFIG, device=device)
    source = DictSource({"a": torch.ones(3)})
    consumer = device.fence_streams()[4]
    with cuda.device(device.torch_device), cuda.stream(consumer):
        (tensor,) = cache.get_many(["a"], source, ready="stream")
    assert any(kind == "wait" for kind, _ in cuda.queue(consumer))
    cache.record_stream(tensor, consumer)


@pytest.mark.parametrize("call", ["get", "get_many"])
def test_an_error_of_a_capture_keeps_no_block(tmp_path: Path, call: str) -> None:
    cuda = FakeCuda()
    device = cuda_device(cuda, tmp_path)
    cache = TensorCache(CONFIG, device=device)
    source = DictSource({"a": torch.ones(3)})
    cache.prefetch(["a"], source).result(30)
    with cuda.capture(device.fence_streams()[3]), pytest.raises(TransferError, match="not seen complete") as kept:
        cache.get("a") if call == "get" else cache.get_many(["a"], source)
    assert cache.clear() == 1
    assert device_bytes(cache) == 0
    del kept


@pytest.mark.parametrize("stream", [None, 7, "stream"])
def test_a_stream_that_is_none_is_refused_and_spoils_no_fence(tmp_path: Path, stream: Any) -> None:
    cache = TensorCache(CONFIG, device=cuda_device(FakeCuda(), tmp_path))
    (tensor,) = cache.get_many(["a"], DictSource({"a": torch.ones(3)}))
    with pytest.raises(ValueError, match="is no stream of cuda:1"):
        cache.record_stream(tensor, stream)
    del tensor
    assert cache.clear() == 1
    assert device_bytes(cache) == 0


def test_a_stream_that_is_known_costs_no_call_of_the_device(tmp_path: Path) -> None:
    cuda = FakeCuda()
    device = cuda_device(cuda, tmp_path)
    cache = TensorCache(CONFIG, device=device)
    (tensor,) = cache.get_many(["a"], DictSource({"a": torch.ones(3)}))
    streams = device.fence_streams()[3:5]
    for stream in streams:
        cache.record_stream(tensor, stream)
    calls = dict(cuda.library.calls)
    for stream in streams * 2:
        cache.record_stream(tensor, stream)
    assert calls == cuda.library.calls
