"""The owner's store: a mapping, exact totals, and no torn answers."""

from __future__ import annotations

import sys
import threading
import weakref
from typing import Any

import pytest
import torch

from gpu_cache.rpc.store import ShardStore
from gpu_cache.rpc.wire.frame import OwnedShard


def test_put_keeps_the_tensor_itself() -> None:
    store = ShardStore()
    tensor = torch.arange(4)
    store.put("a", tensor)
    assert store["a"] is tensor
    assert "a" in store
    assert "b" not in store


def test_a_missing_shard_raises_the_message_of_upstream() -> None:
    store = ShardStore()
    with pytest.raises(KeyError, match="Shard gone not found in storage"):
        store["gone"]
    with pytest.raises(KeyError, match="Shard gone not found in storage"):
        del store["gone"]
    assert store.get("gone") is None


def test_totals_follow_puts_overwrites_and_removals() -> None:
    store = ShardStore()
    store.put("a", torch.zeros(4, dtype=torch.float32))
    store.put("b", torch.zeros(3, dtype=torch.int64))
    assert store.stats() == {"num_tensors": 2, "total_bytes": 40}
    store.put("a", torch.zeros(1, dtype=torch.uint8))
    assert store.stats() == {"num_tensors": 2, "total_bytes": 25}
    assert store.remove(["a"]) == 1
    assert store.stats() == {"num_tensors": 1, "total_bytes": 24}
    store.clear()
    assert store.stats() == {"num_tensors": 0, "total_bytes": 0}


def test_a_tensor_given_other_memory_while_stored_does_not_upset_the_total() -> None:
    store = ShardStore()
    tensor = torch.zeros(4)
    store.put("a", tensor)
    with pytest.raises(RuntimeError, match="not resizable"):
        tensor.resize_(1000)
    tensor.set_(torch.zeros(1000))  # type: ignore[call-overload]
    store.remove(["a"])
    assert store.stats()["total_bytes"] == 0


def test_get_many_answers_in_order_with_repeats_and_names_the_missing() -> None:
    store = ShardStore()
    a, b = torch.ones(1), torch.ones(2)
    store.put("a", a)
    store.put("b", b)
    found, missing = store.get_many(["b", "x", "a", "b", "y", "x"])
    assert [shard_id for shard_id, _ in found] == ["b", "a", "b"]
    assert [shard.tensor is expected for (_, shard), expected in zip(found, [b, a, b], strict=True)] == [True] * 3
    assert missing == ["x", "y", "x"]


def test_a_bad_id_never_keeps_the_others_from_being_removed() -> None:
    store = ShardStore()
    for name in "abc":
        store.put(name, torch.ones(1))
    assert store.remove(["a", ["unhashable"], ("tuple", []), None, "unknown", 7, "a", "c"]) == 2
    assert list(store) == ["b"]


def test_it_is_a_mutable_mapping_as_upstreams_dict_was() -> None:
    store = ShardStore()
    store["a"] = torch.ones(2)
    store["b"] = torch.zeros(1)
    assert len(store) == 2
    assert sorted(store) == ["a", "b"]
    assert torch.equal(store.pop("a"), torch.ones(2))
    assert store.pop("a", None) is None
    assert dict(store.items()).keys() == {"b"}
    del store["b"]
    assert len(store) == 0
    assert store.stats()["total_bytes"] == 0


def test_iterating_does_not_mind_changes() -> None:
    store = ShardStore()
    store.update({str(number): torch.ones(1) for number in range(10)})
    for shard_id in store:
        del store[shard_id]
    assert len(store) == 0


def test_removed_tensors_die_at_once() -> None:
    store = ShardStore()
    store.put("a", torch.ones(3))
    store.put("b", torch.ones(3))
    deaths = [weakref.ref(store["a"]), weakref.ref(store["b"])]
    store.put("a", torch.zeros(1))
    store.remove(["b"])
    assert [death() for death in deaths] == [None, None]


def test_a_finaliser_may_use_the_store() -> None:
    """What dies in a removal dies outside the lock: a lock held there would never be had again."""
    store = ShardStore()
    counted: list[int] = []

    def remove_with_finaliser() -> None:
        for action in (lambda: store.put("a", torch.ones(1)), lambda: store.remove(["a"]), store.clear):
            tensor = torch.ones(3)
            weakref.finalize(tensor, lambda: counted.append(len(store)))
            store.put("a", tensor)
            del tensor
            action()

    thread = threading.Thread(target=remove_with_finaliser, daemon=True)
    thread.start()
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert counted == [1, 0, 0]


def test_a_batch_is_never_torn_by_a_concurrent_removal() -> None:
    store = ShardStore()
    ids = [str(number) for number in range(50)]
    stopping = threading.Event()

    def replace() -> None:
        while not stopping.is_set():
            with_all = {shard_id: torch.ones(1) for shard_id in ids}
            for shard_id, tensor in with_all.items():
                store.put(shard_id, tensor)
            store.remove(ids)

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        for _ in range(2_000):
            found, missing = store.get_many(ids)
            # Puts come one by one in order, the removal at once: what is there is always a beginning of the list.
            assert [shard_id for shard_id, _ in found] == ids[: len(found)]
            assert missing == ids[len(found) :]
    finally:
        stopping.set()
        thread.join()
    assert store.stats() == {"num_tensors": 0, "total_bytes": 0}


def test_repr_shows_the_totals() -> None:
    store = ShardStore()
    store.put("a", torch.zeros(1000, dtype=torch.uint8))
    assert repr(store) == "ShardStore(num_tensors=1, total_bytes=1,000)"


def test_a_tensor_made_while_a_server_looks_at_its_shard_disturbs_nothing() -> None:
    store = ShardStore()
    for step in range(30):  # the caller comes at each of them
        store.put_copies(["a"], [torch.ones(3)])
        (shard,) = store.find(["a"])
        assert shard is not None
        left = step

        def come(frame: Any, event: str, value: Any, shard: OwnedShard = shard) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                assert shard.tensor is store["a"]
            return come

        before = sys.gettrace()
        sys.settrace(come)
        try:
            shard.check("a")
        finally:
            sys.settrace(before)
