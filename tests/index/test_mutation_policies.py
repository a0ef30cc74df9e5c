"""Shards that a reader wrote into, by policy; checksums, which see more; and lines of the log."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from gpu_cache import CacheConfig, FetchError, MutatedError, TensorCache
from gpu_cache.device.host import HostDevice
from gpu_cache.index.entry import Entry
from gpu_cache.index.mutation import Mutations
from gpu_cache.pool.block import Copy
from tests.support.mutation_scene import SETTINGS, UNSEEN, WRITES, figures, on_host
from tests.support.sources import DictSource, same_bytes, some_tensors


def test_an_error_names_the_written_shard_and_changes_nothing(source: DictSource) -> None:
    cache = on_host(on_mutation="error")
    cache.put("p", torch.arange(5))
    cache.get_many(["a", "p"], source)[0].fill_(7)
    before = cache.buffer_stats()
    for ask in (lambda: cache.get_many(["c", "a", "b"], source), lambda: cache.get("a")):
        with pytest.raises(
            MutatedError, match="1 cached shards were written to in place since they came: 'a';"
        ) as caught:
            ask()
        assert caught.value.keys == ("a",)
    after = cache.buffer_stats()
    changed = {name for name, value in after.items() if value != before[name]}  # type: ignore[literal-required]
    assert changed <= {"mutations", "oldest_entry_age_seconds"}
    assert source.asked == [["a"]]
    cache.get_many(["p"], source)[0].add_(1)
    with pytest.raises(MutatedError, match="'p'"):
        cache.get_many(["p"], source)
    cache.clear(["a"])
    assert same_bytes(cache.get_many(["a"], source)[0], source.tensors["a"])


def test_the_policy_error_lets_a_prefetch_pass(source: DictSource) -> None:
    cache = on_host(on_mutation="error")
    cache.get_many(["a"], source)[0].fill_(7)
    assert cache.prefetch(["a", "b"], source).result(30) == 1


def test_other_callers_read_ignored_writes(source: DictSource, caplog: pytest.LogCaptureFixture) -> None:
    cache = on_host(on_mutation="ignore")
    cache.get_many(["a"], source)[0].fill_(7)
    assert torch.equal(cache.get_many(["a"], source)[0], torch.full((100,), 7.0))
    assert torch.equal(cache.get("a"), torch.full((100,), 7.0))  # type: ignore[arg-type]
    assert figures(cache, "mutations", "misses") == (0, 1)
    assert not caplog.records


# Checksums.


@pytest.mark.parametrize("write", [*WRITES.values(), *UNSEEN.values()], ids=[*WRITES, *UNSEEN])
def test_checksums_see_every_write(write: Callable[[torch.Tensor], object], source: DictSource) -> None:
    cache = on_host(debug_checksum=True)
    write(cache.get_many(["a", "b"], source)[0])
    assert same_bytes(cache.get_many(["b", "a"], source)[1], source.tensors["a"])
    assert figures(cache, "mutations", "misses", "hits") == (1, 3, 1)
    write(cache.get_many(["a"], source)[0])
    assert same_bytes(cache.get_many(["a"], source)[0], source.tensors["a"])
    assert figures(cache, "mutations", "misses", "hits") == (2, 4, 2)


@pytest.mark.parametrize("stages", [False, True])
def test_checksums_are_taken_of_any_shard_however_it_came(stages: bool) -> None:
    tensors = {**some_tensors(8), "empty": torch.empty(0), "scalar": torch.tensor(True)}
    cache = TensorCache(CacheConfig(**SETTINGS, debug_checksum=True, ready="stream"), device=HostDevice(stages))
    source = DictSource(tensors)
    cache.prefetch(list(tensors), source).result(30)
    cache.put("put", torch.arange(9))
    for _ in range(3):
        assert all(map(same_bytes, cache.get_many(list(tensors), source), tensors.values()))
    cache.get_many(["shard-3"], source)[0].data.zero_()
    cache.get("put").data.zero_()  # type: ignore[union-attr]
    assert all(map(same_bytes, cache.get_many(list(tensors), source), tensors.values()))
    assert cache.get("put") is None
    assert figures(cache, "mutations", "misses") == (2, len(tensors) + 1)


def test_a_checksum_that_differs_is_an_error_where_that_is_the_policy(source: DictSource) -> None:
    cache = on_host(debug_checksum=True, on_mutation="error")
    cache.get_many(["a"], source)[0].numpy().fill(3)
    for _ in range(2):
        with pytest.raises(MutatedError):
            cache.get_many(["a"], source)
    with pytest.raises(MutatedError):
        cache.get("a")


def test_a_shard_that_fails_a_checksum_and_is_gone_is_told_as_such(source: DictSource) -> None:
    cache = on_host(debug_checksum=True)
    cache.get_many(["a"], source)[0].numpy().fill(3)
    source.tensors = {}
    with pytest.raises(FetchError, match="cached copies of 'a' were dropped"):
        cache.get_many(["a"], source)


# Messages.


def test_a_warning_comes_once_a_minute_and_counts_the_others(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    mutations = Mutations("refetch", lambda: now[0])
    for keys in ("ab", "c"):
        mutations.tell([Entry(key, 1, node="n:1", copy=Copy(key, torch.empty(0), None, 1234)) for key in keys])
    now[0] = 60.0
    mutations.tell([Entry("d", 1)])
    first, later = [record.getMessage() for record in caplog.records]
    assert first.startswith("shard 'a' (1,234 bytes from n:1) was")
    assert "(1 more such since the last of these lines)" in first
    assert later.startswith("shard 'd' (0 bytes from this process)")
    assert "(1 more such since the last of these lines)" in later
