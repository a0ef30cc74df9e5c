"""Shards that are not what a call expects: another dtype, another shape, another owner."""

from __future__ import annotations

import logging
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_cache import CacheConfig, FetchError, Promise, PromiseError, TensorCache, TransferError
from gpu_cache.device.host import HostDevice
from tests.support.cuda_devices import cuda_device
from tests.support.fake_cuda import FakeCuda
from tests.support.mutation_scene import CONFIG
from tests.support.sources import DictSource, gated, same_bytes

TIERED = CacheConfig(device="cpu", prealloc_bytes=0, pool_bytes=1 << 20, slab_bytes=1 << 20, host_tier_bytes=1 << 20)


def source_of(node: str = "node-a:1", offset: int = 0) -> DictSource:
    return DictSource({name: torch.arange(5) + 10 * number + offset for number, name in enumerate("abc")}, node)


def promise(like: torch.Tensor, owner: str | None = "node-a:1") -> Promise:
    return like.dtype, like.shape, owner


RIGHT, WRONG = promise(torch.arange(5)), promise(torch.arange(3))
FLOATS = promise(torch.ones(5, dtype=torch.float64))  # as many bytes


def expecting(**promises: Promise) -> dict[Hashable, Promise]:
    return dict(promises)


@pytest.mark.parametrize("wrong", [WRONG, FLOATS, promise(torch.ones(1, 5).long())])
def test_a_cached_shard_that_is_not_as_promised_fails_alone_and_stays(cache: TensorCache, wrong: Promise) -> None:
    source = source_of()
    kept = cache.get_many(["a"], source, expected=expecting(a=RIGHT))[0]
    with pytest.raises(FetchError) as caught:
        cache.get_many(["a", "b"], source, expected=expecting(a=wrong, b=RIGHT))
    error = caught.value.failures["a"]
    assert list(caught.value.failures) == ["a"]
    assert isinstance(error, PromiseError)
    assert (error.key, error.promised, error.found) == ("a", wrong, RIGHT)
    assert str(error).startswith(
        f"Failed to fetch shard 'a' from node-a:1: {wrong[0]} of shape {list(wrong[1])} is pro"
    )
    assert str(error).endswith("torch.int64 of shape [5] was found")
    again, other = cache.get_many(["a", "b"], source, expected=expecting(a=RIGHT, b=RIGHT))
    assert again.data_ptr() == kept.data_ptr()
    assert same_bytes(other, source.tensors["b"])
    assert source.asked == [["a"], ["b"]]


@pytest.mark.parametrize("wrong", [RIGHT[:2], list(RIGHT), torch.int64])
def test_a_promise_that_is_no_tuple_of_three_is_refused(cache: TensorCache, wrong: Any) -> None:
    for call in (cache.get_many, cache.prefetch):
        with pytest.raises(TypeError, match=r"expected has .*: a tuple \(dtype, shape, owner\) is expected"):
            call(["a"], source_of(), expected=expecting(a=wrong))
    assert cache.keys() == []


@pytest.mark.parametrize("wrong", [RIGHT[:1], (*WRONG, 1), list(RIGHT), torch.int64, "abc"])
@pytest.mark.parametrize("is_cached", [False, True], ids=["missing", "cached"])
def test_a_later_promise_that_is_none_is_named(cache: TensorCache, wrong: Any, is_cached: bool) -> None:
    source = source_of()
    if is_cached:
        cache.get_many(["a", "b"], source)
    promises = expecting(a=RIGHT, b=wrong)
    for call in (cache.get_many, cache.prefetch):
        with pytest.raises(TypeError, match=r"expected has .* for 'b': a tuple \(dtype, shape, owner\) is expected"):
            call(["a", "b"], source, expected=promises)
    assert len(source.asked) == is_cached, "before a source is asked"
    assert len(cache.get_many(["a", "b"], source)) == 2


def test_promises_that_are_not_by_key_are_refused(cache: TensorCache) -> None:
    promises: Any = [RIGHT]
    for call in (cache.get_many, cache.prefetch):
        with pytest.raises(TypeError, match="expected is a list: promises by key are expected"):
            call(["a"], source_of(), expected=promises)


def test_none_in_the_place_of_a_promise_is_no_promise(cache: TensorCache) -> None:
    unknown: Any = {"a": None, "b": RIGHT}
    assert cache.prefetch(["a", "b"], source_of(), expected=unknown).result(30) == 2
    assert len(cache.get_many(["a", "b", "c"], source_of(), expected=unknown)) == 3


@pytest.mark.parametrize("wrong", [WRONG, FLOATS])
def test_a_shard_that_arrives_otherwise_fails_alone_and_is_not_cached(cache: TensorCache, wrong: Promise) -> None:
    source = source_of()
    with pytest.raises(FetchError) as caught:
        cache.get_many(["a", "b", "c"], source, expected=expecting(a=RIGHT, b=wrong, c=RIGHT))
    assert list(caught.value.failures) == ["b"]
    assert isinstance(caught.value.failures["b"], PromiseError)
    assert cache.keys() == ["a", "c"]
    assert same_bytes(cache.get_many(["b"], source, expected=expecting(b=RIGHT))[0], source.tensors["b"])
    assert source.asked == [["a", "b", "c"], ["b"]]


def test_a_shard_that_breaks_its_promise_is_none_with_on_error_none(
    cache: TensorCache, caplog: pytest.LogCaptureFixture
) -> None:
    source = source_of()
    cache.get_many(["a"], source)
    with caplog.at_level(logging.WARNING):
        wrong = expecting(a=WRONG, b=WRONG, c=RIGHT)
        found = cache.get_many(["a", "b", "c"], source, on_error="none", expected=wrong)
    assert [one is None for one in found] == [True, True, False]
    assert "[2 of 3 shards failed: 'a', 'b'; the others are cached]" in caplog.text


def test_a_prefetch_fails_if_the_shard_is_not_as_promised(cache: TensorCache) -> None:
    source = source_of()
    cache.get_many(["a"], source)
    for name in "ab":
        error = cache.prefetch([name], source, expected=expecting(**{name: WRONG})).exception(30)
        assert isinstance(error, FetchError)
        assert isinstance(error.failures[name], PromiseError)
    assert cache.keys() == ["a"]


def test_a_joiner_that_expects_another_shard_fails_alone(cache: TensorCache) -> None:
    source = source_of()
    readers = gated(source)
    first = cache.prefetch(["a"], source, expected=expecting(a=RIGHT))
    assert readers[0].has_arrived.wait(30)
    second = cache.prefetch(["a"], source, expected=expecting(a=WRONG))
    readers[0].gate.set()
    assert first.result(30) == 1
    error = second.exception(30)
    assert isinstance(error, FetchError)
    assert isinstance(error.failures["a"], PromiseError)
    assert str(error).endswith("torch.int64 of shape [5] was found"), "one shard is named once"
    assert source.asked == [["a"]]


def test_a_joiner_of_a_fetch_with_another_promise_fetches_again(cache: TensorCache) -> None:
    source = source_of()
    readers = gated(source)
    first = cache.prefetch(["a"], source, expected=expecting(a=WRONG))
    assert readers[0].has_arrived.wait(30)
    readers[0].gate.set()
    source.wrap = lambda reader: reader
    assert same_bytes(cache.get_many(["a"], source, expected=expecting(a=RIGHT))[0], source.tensors["a"])
    assert isinstance(first.exception(30), FetchError)


def test_another_owners_shard_is_a_miss_and_takes_the_place(cache: TensorCache) -> None:
    one, other = source_of(), source_of("node-b:1", 100)
    theirs = promise(torch.arange(5), "node-b:1")
    held = cache.get_many(["a"], one, expected=expecting(a=RIGHT))[0]
    assert same_bytes(cache.get_many(["a"], other, expected=expecting(a=theirs))[0], other.tensors["a"])
    assert same_bytes(cache.get_many(["a"], other, expected=expecting(a=theirs))[0], other.tensors["a"])
    assert same_bytes(held, one.tensors["a"])
    assert (other.asked, len(cache), cache.entries()[0].source) == ([["a"]], 1, "node-b:1")
    assert same_bytes(cache.get_many(["a"], one, expected=expecting(a=RIGHT))[0], one.tensors["a"])
    assert one.asked == [["a"], ["a"]]


def test_another_owner_that_fails_costs_the_cached_shard_nothing(cache: TensorCache) -> None:
    one, other = source_of(), DictSource({}, "node-b:1")
    cache.get_many(["a"], one, expected=expecting(a=RIGHT))
    with pytest.raises(FetchError):
        cache.get_many(["a"], other, expected=expecting(a=promise(torch.arange(5), "node-b:1")))
    assert same_bytes(cache.get_many(["a"], one, expected=expecting(a=RIGHT))[0], one.tensors["a"])
    assert one.asked == [["a"]]


def test_no_call_joins_another_owners_fetch(cache: TensorCache) -> None:
    one, other = source_of(), source_of("node-b:1", 100)
    readers = gated(one)
    first = cache.prefetch(["a"], one, expected=expecting(a=RIGHT))
    assert readers[0].has_arrived.wait(30)
    theirs = expecting(a=promise(torch.arange(5), "node-b:1"))
    assert same_bytes(cache.get_many(["a"], other, expected=theirs)[0], other.tensors["a"])
    readers[0].gate.set()
    assert first.result(30) == 1
    assert same_bytes(cache.get_many(["a"], other, expected=theirs)[0], other.tensors["a"])
    assert other.asked == [["a"]], "the late one takes no place"


@pytest.mark.parametrize("drop", ["clear", "clear_node", "scope"])
def test_a_drop_meanwhile_keeps_another_owners_shard_from_the_index(cache: TensorCache, drop: str) -> None:
    one, other = source_of(), source_of("node-b:1", 100)
    cache.get_many(["a", "b"], one, expected=expecting(a=RIGHT, b=RIGHT))
    readers = gated(other)
    with cache.scope() as scope:
        fetch = cache.prefetch(["a"], other, expected=expecting(a=promise(torch.arange(5), "node-b:1")))
        assert readers[0].has_arrived.wait(30)
        if drop == "clear":
            assert cache.clear(["b"]) == 1
        elif drop == "clear_node":
            assert cache.clear_node("node-b:1") == 0
    readers[0].gate.set()
    assert fetch.result(30) == 1
    assert scope.is_over
    theirs = cache.entries()
    assert {entry.source for entry in theirs} == {"node-a:1"}


def test_a_scope_knows_a_shard_and_another_owners_in_its_place() -> None:
    cache = TensorCache(CONFIG)
    one, other = source_of(), source_of("node-b:1", 100)
    theirs = expecting(a=promise(torch.arange(5), "node-b:1"))
    with cache.scope():
        cache.get_many(["a"], one, expected=expecting(a=RIGHT))
        with pytest.raises(FetchError):
            cache.get_many(["a"], DictSource({}, "node-b:1"), expected=theirs)
    assert len(cache) == 0
    with cache.scope() as scope:
        cache.get_many(["a"], one, expected=expecting(a=RIGHT))
        cache.get_many(["a"], other, expected=theirs)
        assert scope.num_shards == 1
    assert len(cache) == 0


def test_keep_means_the_shard_of_the_named_owner() -> None:
    cache = TensorCache(CONFIG)
    one, other = source_of(), source_of("node-b:1", 100)
    cache.get_many(["a", "b"], one, expected=expecting(a=RIGHT, b=RIGHT))
    cache.get_many(["a"], other, keep=True, expected=expecting(a=promise(torch.arange(5), "node-b:1")))
    cache.get_many(["b"], one, keep=True, on_error="none", expected=expecting(b=WRONG))
    assert {key: entry.is_kept for key, entry in cache._index._entries.items()} == {"a": True, "b": False}


def test_an_unknown_owner_matches_every_owner(cache: TensorCache) -> None:
    source = source_of()
    cache.put("a", source.tensors["a"])
    cache.put("b", source.tensors["b"], node="node-b:1")
    cache.get_many(["c"], source)
    anybody = promise(torch.arange(5), None)
    cache.get_many(["a", "b", "c"], source, expected=expecting(a=anybody, b=anybody, c=anybody))
    cache.get_many(["a", "b", "c"], source, expected=expecting(a=RIGHT, b=RIGHT, c=RIGHT))
    assert source.asked == [["c"], ["b"]]


def test_a_shape_that_is_no_tuple_is_named(cache: TensorCache) -> None:
    as_list: Any = (torch.int64, [5], None)
    for _ in range(2):  # it arrives, then it is cached
        with pytest.raises(FetchError, match=r"shape \[5\] was found; a promised shape is a tuple"):
            cache.get_many(["a"], source_of(), expected=expecting(a=as_list))
        cache.get_many(["a"], source_of())


def test_a_promise_holds_in_the_host_tier_too() -> None:
    cache = TensorCache(TIERED, device=HostDevice(stages=True))
    one, other = source_of(), source_of("node-b:1", 100)
    cache.get_many(["a"], one, prefer="host", expected=expecting(a=RIGHT))
    for prefer in ("host", "device"):
        with pytest.raises(FetchError, match="is promised"):
            cache.get_many(["a"], one, prefer=prefer, expected=expecting(a=WRONG))  # type: ignore[call-overload]
    assert same_bytes(cache.get_many(["a"], one, expected=expecting(a=RIGHT))[0], one.tensors["a"])
    theirs = expecting(a=promise(torch.arange(5), "node-b:1"))
    assert same_bytes(cache.get_many(["a"], other, prefer="host", expected=theirs)[0], other.tensors["a"])
    assert same_bytes(cache.get_many(["a"], other, expected=theirs)[0], other.tensors["a"])
    assert (one.asked, other.asked) == ([["a"]], [["a"]])


def test_a_written_shard_of_another_owner_is_no_concern(cache: TensorCache) -> None:
    one, other = source_of(), source_of("node-b:1", 100)
    cache.get_many(["a"], one, expected=expecting(a=RIGHT))[0].add_(1)
    theirs = expecting(a=promise(torch.arange(5), "node-b:1"))
    assert same_bytes(cache.get_many(["a"], other, expected=theirs)[0], other.tensors["a"])
    assert cache.buffer_stats()["mutations"] == 0


def test_a_written_shard_that_comes_again_otherwise_is_a_broken_promise(cache: TensorCache) -> None:
    source = source_of()
    cache.get_many(["a"], source, expected=expecting(a=RIGHT))[0].add_(1)
    source.tensors = {"a": torch.ones(3)}
    with pytest.raises(FetchError, match=r"is promised.*cached copies of 'a' were dropped"):
        cache.get_many(["a"], source, expected=expecting(a=RIGHT))
    (tensor,) = cache.get_many(["a"], source, expected=expecting(a=promise(torch.ones(3))))
    assert same_bytes(tensor, torch.ones(3))


def test_a_capture_is_told_of_another_owner(tmp_path: Path) -> None:
    device = cuda_device(FakeCuda(), tmp_path)
    cache = TensorCache(CONFIG, device=device)
    cache.get_many(["a"], source_of(), expected=expecting(a=RIGHT))
    with device._cuda.capture(device.new_stream()), pytest.raises(TransferError, match="another owner's shard of that"):
        cache.get_many(["a"], source_of(), expected=expecting(a=promise(torch.arange(5), "node-b:1")))
    cache.close()
