"""A node cache that is missing, busy, full, late or gone: its consumers read over HTTP."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from gpu_cache import FetchError
from gpu_cache.rpc import node_cache as module
from gpu_cache.rpc import runtime
from gpu_cache.rpc.client import memory
from gpu_cache.rpc.client.http import HttpRTensorBackend
from gpu_cache.rpc.node_cache import NodeCache, Running
from gpu_cache.rpc.rtensor import RTensor
from tests.support.areal_fixtures import full_listener
from tests.support.fake_owner import FakeOwner
from tests.support.fault_server import FaultServer, frame, reply
from tests.support.interleave_stage import eventually
from tests.support.node_caches import Consumer, batch, clear, lost, over_http, sent
from tests.support.wire_tensors import same_bits

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


def test_without_one_shards_come_over_http_and_one_line_says_why(
    owner: FakeOwner,
    address: str,
    consumers: list[Consumer],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "gpu_cache.rpc.client.memory")
    monkeypatch.setattr("gpu_cache.rpc.client.same_host.is_loopback", lambda host: False)
    owner.put(tensors := batch())
    over_http(consumers[0], address, tensors)
    (line,) = caplog.messages
    assert f"shards of {address} come over HTTP: no node cache at" in line


def test_of_an_owner_of_this_host_its_missing_memory_is_the_reason_not_a_missing_node_cache(
    owner: FakeOwner, address: str, consumers: list[Consumer], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gpu_cache.rpc.client.memory")
    owner.put(tensors := batch())
    over_http(consumers[0], address, tensors)
    (line,) = caplog.messages
    assert f"shards of {address} come over HTTP: its server offers no shared memory" in line


def test_one_that_ends_and_another_that_begins(
    owner: FakeOwner, address: str, path: Path, consumers: list[Consumer]
) -> None:
    owner.put(tensors := batch())
    with Running(path, 64 << 20):
        consumers[0].read(address, tensors)
        assert consumers[0].transport == "node cache"
    over_http(consumers[0], address, tensors)
    with Running(path, 64 << 20):
        for one in consumers:
            one.read(address, tensors)
            assert one.transport == "node cache"


def test_one_that_ends_amid_a_read(owner: FakeOwner, address: str, path: Path, consumers: list[Consumer]) -> None:
    owner.put(tensors := batch())
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


def test_a_busy_one_leaves_shards_to_their_owner_and_says_so(
    owner: FakeOwner,
    address: str,
    running: Running,
    consumers: list[Consumer],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, module.__name__)
    monkeypatch.setattr(module, "_MAX_UNDER_WAY", 0)
    owner.put(tensors := batch())
    over_http(consumers[0], address, tensors)
    assert f"leaving 6 shards of {address} to their owner: 0 questions are under way" in caplog.messages


def test_one_without_a_thread_leaves_shards_to_their_owner(
    owner: FakeOwner,
    address: str,
    running: Running,
    consumers: list[Consumer],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, module.__name__)
    owner.put(tensors := batch())

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
    owner.put(tensors := batch())
    owner.put(others := batch(seed=50))
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
    owner.put(tensors := batch())
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
    owner.put(tensors := batch())
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


def test_a_caller_with_little_time_keeps_no_later_one_from_it(
    owner: FakeOwner, address: str, running: Running, consumers: list[Consumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner.put(tensors := batch())
    monkeypatch.setattr(memory, "_PER_WAIT", 1)
    may_go = threading.Event()
    real = NodeCache._brought
    monkeypatch.setattr(NodeCache, "_brought", lambda *args: (may_go.wait(30), real(*args))[1])
    try:
        with contextlib.suppress(FetchError):  # there was too little time for HTTP, too
            consumers[0].read(address, tensors, timeout_s=0.06)
    finally:
        may_go.set()
    eventually(lambda: _reads(consumers[0], address, tensors) == "node cache")


def test_a_dead_owner_stalls_only_its_own_shards(
    owner: FakeOwner, address: str, running: Running, consumers: list[Consumer]
) -> None:
    owner.put(tensors := batch())
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
    owner.put(tensors := batch())
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
    owner.put(tensors := batch())
    consumers[0].read(address, tensors)
    assert consumers[0].transport == "node cache"


# Memory.


def test_it_keeps_within_its_limit_and_evicts_what_was_used_longest_ago(
    owner: FakeOwner, address: str, path: Path, consumers: list[Consumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Running(path, 4 << 20) as running:
        batches = [batch(1, seed=seed, nbytes=1 << 20) for seed in range(6)]
        for tensors in batches:
            owner.put(tensors)
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
        owner.put(held | others)
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
        owner.put(tensors := batch(1, nbytes=2 << 20))
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
    owner.put(tensors := batch())
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
        owner.put(tensors := batch(20, seed=number))
        for one in consumers:
            one.read(address, tensors)
        clear(address, *tensors)
        consumers[0].backend.memories.forget_shards(list(tensors))
        eventually(lambda: running.cache._num_under_way == 0 and len(running.cache.cache) == 0)
        return len(os.listdir("/proc/self/fd")), running.cache.segments.stats()["shared_reserved_bytes"]

    descriptors, nbytes = zip(*map(step, range(12)), strict=True)
    of_later, nbytes_later = zip(*map(step, range(12, 20)), strict=True)
    assert max(of_later) <= max(descriptors) + 3
    assert max(nbytes_later) <= max(nbytes)
