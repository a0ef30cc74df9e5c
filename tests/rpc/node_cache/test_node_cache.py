"""A node cache: a shard crosses the network once for a host, and nothing that was cleared is served."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from typing import Any

import pytest
import torch

from gpu_cache.rpc import node_cache as module
from gpu_cache.rpc import runtime
from gpu_cache.rpc.client import memory
from gpu_cache.rpc.client.http import HttpRTensorBackend
from gpu_cache.rpc.node_cache import NodeCache, Running
from gpu_cache.rpc.rtensor import RTensor, clear_fetch_buffer
from gpu_cache.rpc.server.main import ServerHandle
from tests.support.areal_fixtures import remote
from tests.support.fake_owner import FakeOwner
from tests.support.interleave_stage import eventually
from tests.support.node_caches import Consumer, batch, clear, kept, lost, sent, serve_remote
from tests.support.threads import run_threads
from tests.support.wire_tensors import WIRE_DTYPES, patterned, same_bits

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
SHAPES: list[tuple[int, ...]] = [(), (1,), (3, 5), (0, 4), (2, 1, 3, 1, 2, 2), (1, 1, 1, 1, 1, 1, 7)]


def test_every_dtype_and_shape_arrives_bit_by_bit(
    owner: FakeOwner, address: str, running: Running, consumers: list[Consumer]
) -> None:
    tensors = {f"{dtype}{shape}": patterned(dtype, *shape) for dtype in WIRE_DTYPES for shape in SHAPES}
    owner.put(tensors)
    few = {key: one for key, one in tensors.items() if one.ndim < 7}
    for one in consumers:
        one.read(address, tensors)
        one.read(address, few)
        assert one.transport == "node cache"


def test_a_shard_crosses_the_network_once(
    owner: FakeOwner, address: str, running: Running, consumers: list[Consumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = batch(100)
    owner.put(tensors)
    ids = sent(monkeypatch, owner)
    for one in consumers:
        one.read(address, tensors)
    assert sorted(ids) == sorted(tensors)


def test_consumers_that_ask_at_once_cause_one_fetch(
    owner: FakeOwner, address: str, running: Running, consumers: list[Consumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = batch(50)
    owner.put(tensors)
    ids = sent(monkeypatch, owner)
    run_threads([lambda one=one: one.read(address, tensors) for one in consumers])  # type: ignore[misc]
    assert sorted(ids) == sorted(tensors)


def test_more_than_one_question_takes(
    owner: FakeOwner, address: str, running: Running, consumers: list[Consumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_cache.rpc.client.same_host._PROXIED_BYTES", 11_000)
    tensors = batch(7)
    owner.put(tensors)
    ids = sent(monkeypatch, owner)
    consumers[0].read(address, tensors)
    assert sorted(ids) == sorted(tensors)
    assert running.server.num_answers == 4


def test_a_cache_of_tensors_reads_by_way_of_it(
    owner: FakeOwner, address: str, running: Running, local: HttpRTensorBackend
) -> None:
    tensors = batch()
    owner.put(tensors)
    found = RTensor.localize([remote(address, key, one) for key, one in tensors.items()])
    assert all(same_bits(one, other) for one, other in zip(found, tensors.values(), strict=True))
    assert runtime.current().cache.source_stats()[address]["transport"] == "node cache"
    assert running.cache.cache.source_stats()[address]["transport"] == "http"


def test_an_owner_of_the_same_host_is_read_directly(
    owner: FakeOwner, server: ServerHandle, running: Running, consumers: list[Consumer]
) -> None:
    tensors = batch(50)
    owner.put(tensors)
    consumers[0].read(server.address, tensors)
    consumers[0].read(server.address, tensors)
    assert consumers[0].transport == "shm"
    assert len(running.cache.cache) == 0


# Clears.


def test_what_a_stranger_cleared_is_not_served(
    owner: FakeOwner, address: str, running: Running, consumers: list[Consumer]
) -> None:
    tensors, others = batch(), batch(seed=50)
    owner.put(tensors | others)
    consumers[0].read(address, tensors | others)
    clear(address, *tensors)
    assert lost(consumers[1], address, tensors)
    eventually(lambda: kept(running) == others.keys())
    consumers[1].read(address, others)


def test_a_question_about_other_shards_frees_what_a_stranger_cleared(
    owner: FakeOwner, address: str, running: Running, consumers: list[Consumer]
) -> None:
    tensors, others = batch(), batch(seed=50)
    owner.put(tensors | others)
    consumers[0].read(address, tensors)
    clear(address, *tensors)
    consumers[0].read(address, others)
    eventually(lambda: kept(running) == others.keys())


def test_a_question_about_other_shards_frees_what_their_owner_dropped_with_all_others(
    owner: FakeOwner, address: str, running: Running, consumers: list[Consumer]
) -> None:
    owner.put(tensors := batch())
    consumers[0].read(address, tensors)
    owner.store.clear()
    owner.put(others := batch(seed=50))
    consumers[0].read(address, others)
    eventually(lambda: kept(running) == others.keys())


def test_a_consumers_clear_frees_at_once(
    owner: FakeOwner, address: str, running: Running, local: HttpRTensorBackend, consumers: list[Consumer]
) -> None:
    tensors = batch()
    owner.put(tensors)
    RTensor.localize([remote(address, key, one) for key, one in tensors.items()])
    asyncio.run(RTensor.clear_node(address, list(tensors)))
    eventually(lambda: len(running.cache.cache) == 0)
    assert lost(consumers[1], address, tensors)


def test_a_controllers_fan_out_frees_at_once(
    owner: FakeOwner, address: str, running: Running, local: HttpRTensorBackend
) -> None:
    tensors = batch()
    owner.put(tensors)
    RTensor.localize([remote(address, key, one) for key, one in tensors.items()])
    clear_fetch_buffer(list(tensors))
    eventually(lambda: len(running.cache.cache) == 0)


def test_a_clear_of_many_ids_reaches_it_in_parts_and_odd_ids_keep_none_away(
    owner: FakeOwner, address: str, running: Running, consumers: list[Consumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_FORGOTTEN_AT_ONCE", 4)
    owner.put(tensors := batch(30, nbytes=10))
    consumers[0].read(address, tensors)
    keys = list(tensors)
    consumers[0].backend.memories.forget_shards([7, *keys[:4], None, ("t",), "a\0b", *keys[4:], b"bytes"])
    eventually(lambda: kept(running) == set(keys[4:7]))  # those in one part with the id that cannot be in a message
    consumers[0].read(address, tensors)
    assert consumers[0].transport == "node cache", "the connection is good"


def test_a_clear_ends_with_the_first_part_that_the_socket_does_not_take(
    owner: FakeOwner, address: str, running: Running, consumers: list[Consumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_FORGOTTEN_AT_ONCE", 2)
    owner.put(tensors := batch(10, nbytes=10))
    consumers[0].read(address, tensors)
    sent: list[int] = []
    monkeypatch.setattr(memory.MemoryConnection, "forget", lambda _, text, number: sent.append(number) or len(sent) < 3)
    consumers[0].backend.memories.forget_shards(list(tensors))
    assert sent == [2, 2, 2]
    assert consumers[0].backend.memories is not None
    eventually(lambda: consumers[0].backend.memories.stats()["owners"] == 0)  # type: ignore[union-attr]


def test_a_callback_that_raises_leaks_no_descriptor(
    owner: FakeOwner, address: str, running: Running, consumers: list[Consumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(address: str) -> None:
        raise ZeroDivisionError

    owner.put(tensors := batch())
    consumers[0].read(address, tensors)
    consumers[0].backend.on_removal = refuse
    owner.put(others := batch(seed=50))
    consumers[1].read(address, others)  # by now there are descriptors to send
    before = len(os.listdir("/proc/self/fd"))
    clear(address, *others)
    reader = consumers[2].reader(address, tensors)
    monkeypatch.setattr(reader._node, "note_removals", refuse)
    with pytest.raises(ZeroDivisionError):
        reader.next_specs()
    reader.close()
    consumers[2].backend.close()
    gc.collect()
    eventually(lambda: len(os.listdir("/proc/self/fd")) <= before)  # servers close their ends, too


def test_each_consumers_clear_drops_what_came_since_the_one_before(
    owner: FakeOwner, address: str, running: Running, consumers: list[Consumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner.put(tensors := batch())
    real = NodeCache._versions

    def cleared_amid(node_cache: NodeCache, *args: Any) -> Any:
        versions = real(node_cache, *args)
        node_cache.forget(list(tensors))  # a consumer's clear, before the fetch begins
        return versions

    with monkeypatch.context() as patch:
        patch.setattr(NodeCache, "_versions", cleared_amid)
        consumers[0].read(address, tensors)
    assert kept(running) == tensors.keys()
    running.cache.forget(list(tensors))  # another's
    assert len(running.cache.cache) == 0


def test_versions_of_evicted_shards_are_forgotten_but_not_the_latest(
    owner: FakeOwner, address: str, running: Running, consumers: list[Consumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_FORGOTTEN", 10)
    owner.put(cached := batch(seed=1))
    consumers[0].read(address, cached)
    for seed in range(100, 400, 100):
        owner.put(others := batch(seed=seed))
        consumers[0].read(address, others)
        running.cache.cache.clear([one for one in running.cache._cached() if one.shard_id in others])
    assert kept(running) == cached.keys()
    assert cached.keys() <= running.cache._latest.keys()
    assert len(running.cache._latest) <= 10 + 2 * len(cached)
    assert others.keys() & running.cache._latest.keys()


def test_a_clear_amid_a_fetch_wins(
    owner: FakeOwner, address: str, running: Running, consumers: list[Consumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = batch()
    owner.put(tensors)
    real, is_in, may_go = owner.store.get_many, threading.Event(), threading.Event()

    def slow(wanted: Any) -> Any:
        found = real(wanted)
        is_in.set()
        assert may_go.wait(30)
        return found

    monkeypatch.setattr(owner.store, "get_many", slow)
    asking = threading.Thread(target=consumers[0].read, args=(address, tensors))
    asking.start()
    assert is_in.wait(30)
    owner.store.remove(list(tensors))
    running.cache.forget(list(tensors))
    may_go.set()
    asking.join()
    assert len(running.cache.cache) == 0
    assert lost(consumers[1], address, tensors)


def test_other_bytes_under_the_same_id_are_served(
    owner: FakeOwner, address: str, running: Running, consumers: list[Consumer]
) -> None:
    owner.put({"a": torch.zeros(2000)})
    consumers[0].read(address, {"a": torch.zeros(2000)})
    owner.put({"a": torch.ones(2000)})
    consumers[1].read(address, {"a": torch.ones(2000)})
    assert consumers[1].transport == "node cache"
    assert len(running.cache.cache) == 1


def test_nothing_of_an_owner_that_restarted_is_served(
    owner: FakeOwner, running: Running, consumers: list[Consumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner.put({"a": torch.zeros(2000), "gone": torch.zeros(3)})
    with serve_remote(monkeypatch, owner) as server:
        consumers[0].read(server.address, {"a": torch.zeros(2000), "gone": torch.zeros(3)})
    following = FakeOwner()
    following.put({"a": torch.ones(2000)})
    with serve_remote(monkeypatch, following, int(server.address.split(":")[1])):
        consumers[1].read(server.address, {"a": torch.ones(2000)})
        assert lost(consumers[1], server.address, {"gone": torch.zeros(3)})
        eventually(lambda: kept(running) == {"a"})


def test_a_leak_is_named_as_one(owner: FakeOwner, address: str, running: Running, consumers: list[Consumer]) -> None:
    owner.put({"forgotten": torch.ones(3)})
    consumers[0].read(address, {"forgotten": torch.ones(3)})
    for step in range(3):
        tensors = batch(seed=100 * step)
        owner.put(tensors)
        for one in consumers:
            one.read(address, tensors)
        clear(address, *tensors)
        for one in consumers:
            one.backend.memories.forget_shards(list(tensors))
    eventually(lambda: running.cache.cache.buffer_stats()["outlived_entries"] == 1)
    (leak,) = running.cache.cache._index.oldest(5, is_outlived=True)
    assert (str(leak.key), leak.source) == ("forgotten", address)
    assert running.cache.cache.config.role == "node-cache"
