"""A node cache: a shard crosses the network once for a host, nothing that was cleared is served, and HTTP is left."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_cache import FetchError
from gpu_cache.rpc import node_cache as module
from gpu_cache.rpc import runtime
from gpu_cache.rpc.client import memory
from gpu_cache.rpc.client.http import HttpRTensorBackend, SameHostReader, drained
from gpu_cache.rpc.node_cache import NodeCache, Running
from gpu_cache.rpc.rtensor import RTensor, TensorShardInfo, clear_fetch_buffer, set_backend
from gpu_cache.rpc.segments import node_cache_path
from gpu_cache.rpc.server import main as rpc_server
from gpu_cache.rpc.server.main import ServerHandle
from gpu_cache.rpc.shard import ShardMissingError
from tests.support.areal_fixtures import full_listener, remote
from tests.support.fake_owner import FakeOwner
from tests.support.fault_server import FaultServer, frame, reply
from tests.support.interleave_stage import eventually
from tests.support.threads import run_threads
from tests.support.wire_tensors import WIRE_DTYPES, patterned, same_bits

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
SHAPES: list[tuple[int, ...]] = [(), (1,), (3, 5), (0, 4), (2, 1, 3, 1, 2, 2), (1, 1, 1, 1, 1, 1, 7)]


def serve_remote(monkeypatch: pytest.MonkeyPatch, owner: FakeOwner, port: int = 0) -> ServerHandle:
    """The owner's server as of another host: it announces no memory."""
    with monkeypatch.context() as patch:
        patch.setenv("GPU_CACHE_SHM", "0")
        return rpc_server.start(owner=owner, port=port)


@pytest.fixture
def address(owner: FakeOwner, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with serve_remote(monkeypatch, owner) as server:
        yield server.address


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "node-cache"


@pytest.fixture
def running(path: Path) -> Iterator[Running]:
    with Running(path, 64 << 20) as running:
        yield running
    gc.collect()
    eventually(lambda: running.cache.segments.stats()["shared_bytes"] == 0)


class Consumer:
    """A process of the host, with a backend of its own and no cache."""

    def __init__(self, path: Path) -> None:
        self.backend = HttpRTensorBackend(same_host=True, node_cache=str(path))
        self.transport = ""

    def reader(self, address: str, tensors: Mapping[str, torch.Tensor], timeout_s: float = 30.0) -> SameHostReader:
        shards = {key: TensorShardInfo(key, address) for key in tensors}
        expected = {key: torch.empty(one.shape, dtype=one.dtype, device="meta") for key, one in tensors.items()}
        (reader,) = self.backend.source(shards, expected).open(list(tensors), timeout_s)  # type: ignore[arg-type]
        assert isinstance(reader, SameHostReader)
        return reader

    def read(self, address: str, tensors: Mapping[str, torch.Tensor], timeout_s: float = 30.0) -> None:
        """Fetch shards and look at every bit."""
        reader = self.reader(address, tensors, timeout_s)
        found = drained(reader)
        self.transport = reader.transport
        assert found.keys() == tensors.keys()
        assert all(same_bits(found[key], one) for key, one in tensors.items())


@pytest.fixture
def consumers(path: Path) -> Iterator[list[Consumer]]:
    made = [Consumer(path) for _ in range(3)]
    yield made
    for one in made:
        one.backend.close()
        assert one.backend.memories is not None
        assert one.backend.memories.stats() == {"owners": 0, "segments": 0, "mapped_bytes": 0}


@pytest.fixture
def local(path: Path) -> Iterator[HttpRTensorBackend]:
    """This process's backend."""
    runtime.configure(device="cpu")
    backend = HttpRTensorBackend(same_host=True, node_cache=str(path))
    set_backend(backend)
    yield backend
    backend.close()


def put(owner: FakeOwner, tensors: Mapping[str, torch.Tensor]) -> None:
    for key, copy in zip(tensors, owner.store.copies(list(tensors.values())), strict=True):
        owner.store.put(key, copy)


def batch(number: int = 6, seed: int = 0, nbytes: int = 5000) -> dict[str, torch.Tensor]:
    return {f"s{seed}-{one}": patterned(torch.uint8, nbytes, seed=seed + one) for one in range(number)}


def sent(monkeypatch: pytest.MonkeyPatch, owner: FakeOwner) -> list[str]:
    """The ids of all shards that the owner sends from now on."""
    ids: list[str] = []
    real = owner.store.get_many

    def look_up(wanted: Any) -> Any:
        found, missing = real(wanted)
        ids.extend(key for key, _ in found)
        return found, missing

    monkeypatch.setattr(owner.store, "get_many", look_up)
    return ids


def kept(running: Running) -> set[str]:
    """The ids of the shards that a node cache has."""
    return set(map(str, running.cache.cache.keys()))


def test_every_dtype_and_shape_arrives_bit_by_bit(
    owner: FakeOwner, address: str, running: Running, consumers: list[Consumer]
) -> None:
    tensors = {f"{dtype}{shape}": patterned(dtype, *shape) for dtype in WIRE_DTYPES for shape in SHAPES}
    put(owner, tensors)
    few = {key: one for key, one in tensors.items() if one.ndim < 7}
    for one in consumers:
        one.read(address, tensors)
        one.read(address, few)
        assert one.transport == "node cache"


def test_a_shard_crosses_the_network_once(
    owner: FakeOwner, address: str, running: Running, consumers: list[Consumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = batch(100)
    put(owner, tensors)
    ids = sent(monkeypatch, owner)
    for one in consumers:
        one.read(address, tensors)
    assert sorted(ids) == sorted(tensors)


def test_consumers_that_ask_at_once_cause_one_fetch(
    owner: FakeOwner, address: str, running: Running, consumers: list[Consumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = batch(50)
    put(owner, tensors)
    ids = sent(monkeypatch, owner)
    run_threads([lambda one=one: one.read(address, tensors) for one in consumers])  # type: ignore[misc]
    assert sorted(ids) == sorted(tensors)


def test_more_than_one_question_takes(
    owner: FakeOwner, address: str, running: Running, consumers: list[Consumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_cache.rpc.client.same_host._PROXIED_BYTES", 11_000)
    tensors = batch(7)
    put(owner, tensors)
    ids = sent(monkeypatch, owner)
    consumers[0].read(address, tensors)
    assert sorted(ids) == sorted(tensors)
    assert running.server.num_answers == 4


def test_a_cache_of_tensors_reads_by_way_of_it(
    owner: FakeOwner, address: str, running: Running, local: HttpRTensorBackend
) -> None:
    tensors = batch()
    put(owner, tensors)
    found = RTensor.localize([remote(address, key, one) for key, one in tensors.items()])
    assert all(same_bits(one, other) for one, other in zip(found, tensors.values(), strict=True))
    assert runtime.current().cache.source_stats()[address]["transport"] == "node cache"
    assert running.cache.cache.source_stats()[address]["transport"] == "http"


def test_an_owner_of_the_same_host_is_read_directly(
    owner: FakeOwner, server: ServerHandle, running: Running, consumers: list[Consumer]
) -> None:
    tensors = batch(50)
    put(owner, tensors)
    consumers[0].read(server.address, tensors)
    consumers[0].read(server.address, tensors)
    assert consumers[0].transport == "shm"
    assert len(running.cache.cache) == 0


# Clears.


def clear(address: str, *ids: str) -> None:
    """As a process that knows of no node cache."""
    backend = HttpRTensorBackend(same_host=False)
    asyncio.run(backend.delete(address, list(ids)))
    backend.close()


def lost(consumer: Consumer, address: str, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether none of the shards is served."""
    reader = consumer.reader(address, tensors)
    with pytest.raises(ShardMissingError):
        drained(reader)
    return reader.failures.keys() == tensors.keys()


def test_what_a_stranger_cleared_is_not_served(
    owner: FakeOwner, address: str, running: Running, consumers: list[Consumer]
) -> None:
    tensors, others = batch(), batch(seed=50)
    put(owner, tensors | others)
    consumers[0].read(address, tensors | others)
    clear(address, *tensors)
    assert lost(consumers[1], address, tensors)
    eventually(lambda: kept(running) == others.keys())
    consumers[1].read(address, others)


def test_a_question_about_other_shards_frees_what_a_stranger_cleared(
    owner: FakeOwner, address: str, running: Running, consumers: list[Consumer]
) -> None:
    tensors, others = batch(), batch(seed=50)
    put(owner, tensors | others)
    consumers[0].read(address, tensors)
    clear(address, *tensors)
    consumers[0].read(address, others)
    eventually(lambda: kept(running) == others.keys())


def test_a_consumers_clear_frees_at_once(
    owner: FakeOwner, address: str, running: Running, local: HttpRTensorBackend, consumers: list[Consumer]
) -> None:
    tensors = batch()
    put(owner, tensors)
    RTensor.localize([remote(address, key, one) for key, one in tensors.items()])
    asyncio.run(RTensor.clear_node(address, list(tensors)))
    eventually(lambda: len(running.cache.cache) == 0)
    assert lost(consumers[1], address, tensors)


def test_a_controllers_fan_out_frees_at_once(
    owner: FakeOwner, address: str, running: Running, local: HttpRTensorBackend
) -> None:
    tensors = batch()
    put(owner, tensors)
    RTensor.localize([remote(address, key, one) for key, one in tensors.items()])
    clear_fetch_buffer(tensors)
    eventually(lambda: len(running.cache.cache) == 0)


def test_a_clear_of_many_ids_reaches_it_in_parts_and_odd_ids_keep_none_away(
    owner: FakeOwner, address: str, running: Running, consumers: list[Consumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_FORGOTTEN_AT_ONCE", 4)
    put(owner, tensors := batch(30, nbytes=10))
    consumers[0].read(address, tensors)
    keys = list(tensors)
    consumers[0].backend.forget([7, *keys[:4], None, ("t",), "a\0b", *keys[4:], b"bytes"])
    eventually(lambda: kept(running) == set(keys[4:7]))  # those in one part with the id that cannot be in a message
    consumers[0].read(address, tensors)
    assert consumers[0].transport == "node cache", "the connection is good"


def test_a_clear_ends_with_the_first_part_that_the_socket_does_not_take(
    owner: FakeOwner, address: str, running: Running, consumers: list[Consumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_FORGOTTEN_AT_ONCE", 2)
    put(owner, tensors := batch(10, nbytes=10))
    consumers[0].read(address, tensors)
    sent: list[int] = []
    monkeypatch.setattr(memory.MemoryConnection, "forget", lambda _, text, number: sent.append(number) or len(sent) < 3)
    consumers[0].backend.forget(list(tensors))
    assert sent == [2, 2, 2]
    assert consumers[0].backend.memories is not None
    eventually(lambda: consumers[0].backend.memories.stats()["owners"] == 0)  # type: ignore[union-attr]


def test_a_callback_that_raises_leaks_no_descriptor(
    owner: FakeOwner, address: str, running: Running, consumers: list[Consumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(address: str) -> None:
        raise ZeroDivisionError

    put(owner, tensors := batch())
    consumers[0].read(address, tensors)
    consumers[0].backend.on_removal = refuse
    put(owner, others := batch(seed=50))
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
    put(owner, tensors := batch())
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
    put(owner, cached := batch(seed=1))
    consumers[0].read(address, cached)
    for seed in range(100, 400, 100):
        put(owner, others := batch(seed=seed))
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
    put(owner, tensors)
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
    put(owner, {"a": torch.zeros(2000)})
    consumers[0].read(address, {"a": torch.zeros(2000)})
    put(owner, {"a": torch.ones(2000)})
    consumers[1].read(address, {"a": torch.ones(2000)})
    assert consumers[1].transport == "node cache"
    assert len(running.cache.cache) == 1


def test_nothing_of_an_owner_that_restarted_is_served(
    owner: FakeOwner, running: Running, consumers: list[Consumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(owner, {"a": torch.zeros(2000), "gone": torch.zeros(3)})
    with serve_remote(monkeypatch, owner) as server:
        consumers[0].read(server.address, {"a": torch.zeros(2000), "gone": torch.zeros(3)})
    following = FakeOwner()
    put(following, {"a": torch.ones(2000)})
    with serve_remote(monkeypatch, following, int(server.address.split(":")[1])):
        consumers[1].read(server.address, {"a": torch.ones(2000)})
        assert lost(consumers[1], server.address, {"gone": torch.zeros(3)})
        eventually(lambda: kept(running) == {"a"})


def test_a_leak_is_named_as_one(owner: FakeOwner, address: str, running: Running, consumers: list[Consumer]) -> None:
    put(owner, {"forgotten": torch.ones(3)})
    consumers[0].read(address, {"forgotten": torch.ones(3)})
    for step in range(3):
        tensors = batch(seed=100 * step)
        put(owner, tensors)
        for one in consumers:
            one.read(address, tensors)
        clear(address, *tensors)
        for one in consumers:
            one.backend.forget(list(tensors))
    eventually(lambda: running.cache.cache.buffer_stats()["outlived_entries"] == 1)
    (leak,) = running.cache.cache._index.oldest(5, is_outlived=True)
    assert (str(leak.key), leak.source) == ("forgotten", address)
    assert running.cache.cache.config.role == "node-cache"


# Where it cannot help.


def over_http(consumer: Consumer, address: str, tensors: Mapping[str, torch.Tensor], times: int = 2) -> None:
    for _ in range(times):
        consumer.read(address, tensors)
        assert consumer.transport == "http"


def test_without_one_shards_come_over_http_and_one_line_says_why(
    owner: FakeOwner,
    address: str,
    consumers: list[Consumer],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "gpu_cache.rpc.client.memory")
    monkeypatch.setattr("gpu_cache.rpc.client.same_host.is_loopback", lambda host: False)
    put(owner, tensors := batch())
    over_http(consumers[0], address, tensors)
    (line,) = caplog.messages
    assert f"shards of {address} come over HTTP: no node cache at" in line


def test_of_an_owner_of_this_host_its_missing_memory_is_the_reason_not_a_missing_node_cache(
    owner: FakeOwner, address: str, consumers: list[Consumer], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gpu_cache.rpc.client.memory")
    put(owner, tensors := batch())
    over_http(consumers[0], address, tensors)
    (line,) = caplog.messages
    assert f"shards of {address} come over HTTP: its server offers no shared memory" in line


def test_one_that_ends_and_another_that_begins(
    owner: FakeOwner, address: str, path: Path, consumers: list[Consumer]
) -> None:
    put(owner, tensors := batch())
    with Running(path, 64 << 20):
        consumers[0].read(address, tensors)
        assert consumers[0].transport == "node cache"
    over_http(consumers[0], address, tensors)
    with Running(path, 64 << 20):
        for one in consumers:
            one.read(address, tensors)
            assert one.transport == "node cache"


def test_one_that_ends_amid_a_read(owner: FakeOwner, address: str, path: Path, consumers: list[Consumer]) -> None:
    put(owner, tensors := batch())
    with Running(path, 64 << 20):
        reader = consumers[0].reader(address, tensors)
        specs = reader.next_specs()
        assert specs is not None
        assert reader.is_lending
    left = {spec.key for spec in specs}
    with pytest.raises(FetchError, match="the node cache ended the connection") as caught:
        reader.read_into([memoryview(bytearray(5000))])
    assert caught.value.may_go_on
    again = reader.next_specs()
    assert again is not None
    assert {spec.key for spec in again} == left
    reader.close()


def test_a_busy_one_leaves_shards_to_their_owner(
    owner: FakeOwner, address: str, running: Running, consumers: list[Consumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_UNDER_WAY", 0)
    put(owner, tensors := batch())
    over_http(consumers[0], address, tensors)


def test_one_without_a_thread_leaves_shards_to_their_owner(
    owner: FakeOwner,
    address: str,
    running: Running,
    consumers: list[Consumer],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, module.__name__)
    put(owner, tensors := batch())

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(module.OwnThread, "start", refuse)
        over_http(consumers[0], address, tensors)
    assert running.cache._num_under_way == 0
    (line,) = [one for one in caplog.messages if "can't start new thread" in one]  # two questions, one line
    assert f"leaving 6 shards of {address} to their owner" in line
    consumers[0].read(address, tensors)
    assert consumers[0].transport == "node cache"


def test_shards_that_are_left_to_their_owner_are_no_clear(
    owner: FakeOwner, address: str, running: Running, consumers: list[Consumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    consumers[0].backend.on_removal = told.append
    put(owner, tensors := batch())
    put(owner, others := batch(seed=50))
    clear(address, *others)  # so that its count is not 0
    consumers[0].read(address, tensors)
    monkeypatch.setattr(module, "_MAX_UNDER_WAY", 0)
    over_http(consumers[0], address, tensors)
    assert told == []
    clear(address, *tensors)
    assert lost(consumers[0], address, tensors)
    assert told == [address]


def test_a_question_does_not_count_while_its_owner_is_asked_what_is_left(
    owner: FakeOwner, address: str, running: Running, consumers: list[Consumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    is_in, may_go = threading.Event(), threading.Event()
    monkeypatch.setattr(NodeCache, "_sweep", lambda *_: (is_in.set(), may_go.wait(30)))
    put(owner, tensors := batch())
    try:
        consumers[0].read(address, tensors)
        assert is_in.wait(30)
        assert running.cache._num_under_way == 0
    finally:
        may_go.set()


def test_a_late_one_is_not_waited_for(
    owner: FakeOwner,
    address: str,
    running: Running,
    consumers: list[Consumer],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "gpu_cache.rpc.client.memory")
    put(owner, tensors := batch())
    may_go = threading.Event()
    real = NodeCache._brought
    monkeypatch.setattr(NodeCache, "_brought", lambda *args: (may_go.wait(30), real(*args))[1])
    try:
        consumers[0].read(address, tensors, timeout_s=1.5)
        assert consumers[0].transport == "http"
        over_http(consumers[0], address, tensors)
    finally:
        may_go.set()
    (line,) = [record.getMessage() for record in caplog.records if "no answer on" in record.getMessage()]
    assert f"shards of {address} come over HTTP" in line
    eventually(lambda: running.cache._num_under_way == 0)


def test_a_dead_owner_stalls_only_its_own_shards(
    owner: FakeOwner, address: str, running: Running, consumers: list[Consumer]
) -> None:
    put(owner, tensors := batch())
    with full_listener() as (host, port):
        failed = []

        def ask() -> None:
            try:
                consumers[0].read(f"{host}:{port}", {"x": torch.ones(3)}, timeout_s=1.5)
            except FetchError as error:
                failed.append(type(error))

        asking = threading.Thread(target=ask)
        asking.start()
        eventually(lambda: running.cache._num_under_way == 1)
        for _ in range(5):
            consumers[1].read(address, tensors)
            assert consumers[1].transport == "node cache"
        asking.join()
        assert failed
        consumers[0].read(address, tensors)
        assert consumers[0].transport == "node cache", "the other owner's shards go on by way of it"


def test_another_users_is_not_asked(
    owner: FakeOwner, address: str, running: Running, consumers: list[Consumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "user_of", lambda sock: os.geteuid() + 1)
    put(owner, tensors := batch())
    over_http(consumers[0], address, tensors)


def test_an_owner_without_serials_is_asked_itself(
    running: Running, consumers: list[Consumer], serve: Callable[..., FaultServer]
) -> None:
    tensors = {"a": torch.ones(3)}
    answers = iter([reply(b"{}", "405 Method Not Allowed"), reply(frame(tensors))])
    server = serve(lambda exchange: exchange.send(next(answers)))
    consumers[0].read(server.address, tensors)
    assert consumers[0].transport == "http"


SAID = {
    "removals": (b'{"serials": ["1"]}', {"X_Shard_Incarnation": "x", "X_Shard_Removals": "9" * 40}),
    "numbers": (b'{"serials": [7]}', {"X_Shard_Incarnation": "x"}),
    "too few": (b'{"serials": []}', {"X_Shard_Incarnation": "x"}),
    "list": (b"[]", {}),
    "no text": (b"\xff" * 10_000, {}),
}


@pytest.mark.parametrize("said", SAID.values(), ids=list(SAID))
def test_nothing_that_an_owner_says_of_its_shards_hurts_it(
    owner: FakeOwner,
    address: str,
    running: Running,
    consumers: list[Consumer],
    serve: Callable[..., FaultServer],
    said: tuple[bytes, dict[str, str]],
) -> None:
    tensors = {"a": torch.ones(3)}
    body, headers = said
    answers = iter([reply(body, content_type="application/json", **headers), *[reply(frame(tensors))] * 3])
    consumers[0].read(serve(lambda exchange: exchange.send(next(answers))).address, tensors)
    put(owner, tensors := batch())
    consumers[0].read(address, tensors)
    assert consumers[0].transport == "node cache"


# Memory.


def test_it_keeps_within_its_limit_and_evicts_what_was_used_longest_ago(
    owner: FakeOwner, address: str, path: Path, consumers: list[Consumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Running(path, 4 << 20) as running:
        batches = [batch(1, seed=seed, nbytes=1 << 20) for seed in range(6)]
        for tensors in batches:
            put(owner, tensors)
            consumers[0].read(address, tensors)
            assert consumers[0].transport == "node cache"
            consumers[0].read(address, batches[0])  # used all the time
        assert running.cache.segments.stats()["shared_bytes"] <= 4 << 20
        ids = sent(monkeypatch, owner)
        consumers[1].read(address, batches[0])
        assert ids == []
        consumers[1].read(address, batches[1])
        assert ids == list(batches[1])


def test_what_a_consumer_holds_is_not_evicted_and_what_has_no_room_comes_over_http(
    owner: FakeOwner, address: str, path: Path, consumers: list[Consumer]
) -> None:
    with Running(path, 2 << 20):
        held, others = batch(2, nbytes=1 << 20), batch(2, seed=9, nbytes=1 << 20)
        put(owner, held | others)
        reader = consumers[0].reader(address, held)
        specs = reader.next_specs()
        assert specs is not None
        over_http(consumers[1], address, others)
        for spec in specs:
            found = torch.empty(spec.nbytes, dtype=torch.uint8)
            reader.read_into([found.numpy().data])
            assert same_bits(found, held[str(spec.key)])
        reader.close()
        eventually(lambda: _reads(consumers[1], address, others) == "node cache")


def test_a_full_one_names_its_own_option(
    owner: FakeOwner, address: str, path: Path, consumers: list[Consumer], caplog: pytest.LogCaptureFixture
) -> None:
    with Running(path, 1 << 20) as running:
        put(owner, tensors := batch(1, nbytes=2 << 20))
        over_http(consumers[0], address, tensors)
        assert running.cache.cache.buffer_stats()["overflows"] == 0
    (line, *_) = [one for one in caplog.messages if "is shorter than this run" in one]
    assert "raise max_bytes (--max-bytes)" in line
    assert "GPU_CACHE_POOL_BYTES" not in caplog.text


def _reads(consumer: Consumer, address: str, tensors: Mapping[str, torch.Tensor]) -> str:
    consumer.read(address, tensors)
    return consumer.transport


def test_it_and_owners_report_the_memory_that_they_share(
    owner: FakeOwner, address: str, running: Running, consumers: list[Consumer], local: HttpRTensorBackend
) -> None:
    put(owner, tensors := batch())
    consumers[0].read(address, tensors)
    cache = running.cache.cache
    report = cache._publisher._reporter.compose(cache._lazy.open())
    assert 0 < report["shared_bytes"] <= report["shared_reserved_bytes"]
    current = runtime.current()
    current.cache.put("a", torch.ones(3))
    composed = current.cache._publisher._reporter.compose
    assert "shared_bytes" not in composed(current.cache._lazy.open()), "it shares none"
    handles = RTensor.remotize([torch.ones(3)], "127.0.0.1:1")
    assert composed(current.cache._lazy.open())["shared_bytes"] == 512
    del handles


def test_steps_leave_neither_memory_nor_descriptors(
    owner: FakeOwner, address: str, running: Running, consumers: list[Consumer]
) -> None:
    def step(number: int) -> tuple[int, int]:
        put(owner, tensors := batch(20, seed=number))
        for one in consumers:
            one.read(address, tensors)
        clear(address, *tensors)
        consumers[0].backend.forget(list(tensors))
        eventually(lambda: running.cache._num_under_way == 0 and len(running.cache.cache) == 0)
        return len(os.listdir("/proc/self/fd")), running.cache.segments.stats()["shared_reserved_bytes"]

    descriptors, nbytes = zip(*map(step, range(12)), strict=True)
    of_later, nbytes_later = zip(*map(step, range(12, 20)), strict=True)
    assert max(of_later) <= max(descriptors) + 3
    assert max(nbytes_later) <= max(nbytes)


# Where it is.


def test_there_is_one_at_a_path(path: Path, running: Running) -> None:
    with pytest.raises(BlockingIOError):
        Running(path, 1 << 20)
    assert os.path.realpath(path) == running.server.path


def test_it_leaves_no_link_behind(path: Path) -> None:
    with Running(path, 1 << 20) as running:
        socket_path = running.server.path
        assert path.is_symlink()
    assert not path.is_symlink()
    assert not os.path.exists(socket_path)
    assert running._lock == -1, "a forked child would close a later file of that number"
    running.stop()


def test_the_program_says_what_it_cannot_use(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "readable_on", lambda *_: contextlib.nullcontext())
    for arguments, said in (
        (["--path", str(path), "--max-bytes", "1"], "max_bytes=1: must be at least 512"),
        (["--path", ""], "name a path by --path"),
        (["--path", str(path / "missing" / "x")], "No such file or directory"),
    ):
        with pytest.raises(SystemExit) as caught:
            module.main(arguments)
        assert caught.value.code == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("said", ["", "0", "no", "False"])
def test_it_is_off_by_default(said: str) -> None:
    assert node_cache_path({"GPU_CACHE_NODE_CACHE": said}) == node_cache_path({}) == ""


def test_a_variable_says_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as base:
        usual = node_cache_path({"GPU_CACHE_NODE_CACHE": "auto", "XDG_RUNTIME_DIR": base})
        assert usual == f"{base}/gpu-cache-memory-{os.geteuid()}/node-cache"
    assert node_cache_path({"GPU_CACHE_NODE_CACHE": "/run/mine"}) == "/run/mine"
    monkeypatch.setenv("GPU_CACHE_SHM", "0")
    monkeypatch.setenv("GPU_CACHE_NODE_CACHE", "/run/mine")
    with contextlib.closing(HttpRTensorBackend()) as backend:
        assert backend.memories is None


def test_it_ends_when_it_has_been_idle(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "readable_on", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(module.select, "select", lambda *_: (time.sleep(0.01), [[]])[1])
    assert module.main(["--path", str(path), "--idle-timeout", "0.05", "--max-bytes", "1MiB"]) == 0
