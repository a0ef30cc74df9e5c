"""Upstream's private mappings: the cache and the store, seen as dicts."""

from __future__ import annotations

from collections.abc import MutableMapping
from threading import Lock
from typing import Any

import pytest
import torch

from gpu_cache.rpc import rtensor, runtime
from gpu_cache.rpc.rtensor import RTensor, clear_fetch_buffer, remove, store
from tests.support.threads import run_threads
from tests.support.users_backend import UsersBackend, handle

MAPPINGS = [(rtensor._fetch_buffer, rtensor._fetch_buffer_lock), (rtensor._storage, rtensor._storage_lock)]


@pytest.mark.parametrize(("mapping", "lock"), MAPPINGS, ids=["cache", "store"])
def test_each_is_a_mapping_also_while_the_caller_holds_its_lock(
    mapping: MutableMapping[Any, torch.Tensor], lock: Lock
) -> None:
    """As upstream's tests do."""
    with lock:
        mapping["x"] = torch.arange(3)
        mapping["x"] = torch.arange(4)
        assert "x" in mapping
        assert (list(mapping), len(mapping), repr(mapping)[-10:]) == (["x"], 1, "(1 shards)")
        assert torch.equal(mapping["x"], torch.arange(4))
        assert torch.equal(mapping.pop("x"), torch.arange(4))
        assert (mapping.pop("x", None), mapping.pop("x", 7)) == (None, 7)
        mapping.update(y=torch.ones(1), z=torch.ones(2))
        del mapping["y"]
        assert list(mapping) == ["z"]
        mapping.clear()
        assert len(mapping) == 0


@pytest.mark.parametrize(("mapping", "lock"), MAPPINGS, ids=["cache", "store"])
def test_an_absent_shard_is_a_key_error(mapping: MutableMapping[Any, torch.Tensor], lock: Lock) -> None:
    with pytest.raises(KeyError, match="x"):
        mapping["x"]
    with pytest.raises(KeyError, match="x"):
        mapping.pop("x")
    with pytest.raises(KeyError, match="x"):
        del mapping["x"]


def test_locks_are_never_taken_by_our_own_code(users_backend: UsersBackend) -> None:
    with rtensor._fetch_buffer_lock, rtensor._storage_lock:
        RTensor.localize(handle(1))
        store("mine", torch.ones(4))
        assert list(rtensor._fetch_buffer) == ["s1"]
        assert list(rtensor._storage) == ["mine"]
        assert clear_fetch_buffer() == remove("mine") == 1
    assert runtime.current().cache.keys() == []


def test_a_shard_that_was_put_into_the_buffer_is_no_miss(users_backend: UsersBackend) -> None:
    rtensor._fetch_buffer["s1"] = torch.tensor([8.0, 9.0])
    assert torch.equal(handle(1).to_local(), torch.tensor([8.0, 9.0]))
    assert users_backend.fetched == []


def test_the_buffer_holds_a_copy() -> None:
    source = torch.ones(3, requires_grad=True)
    rtensor._fetch_buffer["x"] = source
    with torch.no_grad():
        source.zero_()
    assert torch.equal(rtensor._fetch_buffer["x"], torch.ones(3))
    assert not rtensor._fetch_buffer["x"].requires_grad


def test_an_unhashable_id_is_not_in_the_buffer() -> None:
    assert ["x"] not in rtensor._fetch_buffer


def test_popping_beside_a_clear_never_fails() -> None:
    def put_and_pop() -> None:
        for _ in range(100):
            rtensor._fetch_buffer["x"] = torch.ones(3)
            rtensor._fetch_buffer.pop("x", None)

    def clear() -> None:
        for _ in range(300):
            rtensor._fetch_buffer.clear()

    run_threads([put_and_pop, put_and_pop, clear])
