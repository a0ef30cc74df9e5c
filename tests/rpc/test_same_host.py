"""Shards of owners on the same host: read from their memory bit by bit, over HTTP where that cannot be, never wrong."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_cache import FetchError, ShardSpec
from gpu_cache.rpc import runtime
from gpu_cache.rpc.client import memory
from gpu_cache.rpc.client import same_host as client
from gpu_cache.rpc.client.http import HttpRTensorBackend, SameHostReader, drained
from gpu_cache.rpc.client.memory import OwnersMemory
from gpu_cache.rpc.client.pool import NodeState
from gpu_cache.rpc.rtensor import RTensor, TensorShardInfo, clear_fetch_buffer, set_backend
from gpu_cache.rpc.server import main as rpc_server
from gpu_cache.rpc.server import same_host
from gpu_cache.rpc.server.main import ServerHandle
from gpu_cache.rpc.server.same_host import Limits, SameHostServer
from gpu_cache.rpc.shard import ShardFetchError, ShardUnreachableError
from gpu_cache.rpc.wire.records import announced
from tests.support.areal_fixtures import remote
from tests.support.fake_owner import FakeOwner
from tests.support.interleave_stage import eventually
from tests.support.same_host_process import KEYS, Nursery, fetched, fill, nursery
from tests.support.wire_tensors import WIRE_DTYPES, patterned, same_bits

ROOT = Path(__file__).parents[2]
SHAPES: list[tuple[int, ...]] = [(), (1,), (3, 5), (0, 4), (2, 1, 3, 1, 2, 2), (1, 1, 1, 1, 1, 1, 7)]
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


@pytest.fixture(autouse=True)
def on_the_host() -> None:
    runtime.configure(device="cpu", staging_slots=2, staging_slot_bytes="1MiB", run_bytes="512KiB")


@pytest.fixture
def shared() -> Iterator[HttpRTensorBackend]:
    """This process's backend."""
    backend = HttpRTensorBackend(same_host=True)
    set_backend(backend)
    yield backend
    backend.close()
    assert backend.memories is not None
    assert backend.memories.stats() == {"owners": 0, "segments": 0, "mapped_bytes": 0}


@pytest.fixture(scope="module")
def processes() -> Iterator[Nursery]:
    with nursery() as made:
        yield made


@pytest.fixture
def known(owner: FakeOwner, server: ServerHandle, shared: HttpRTensorBackend) -> str:
    """The address of an owner whose socket the backend knows."""
    put(owner, {"first": torch.ones(1)})
    shared.fetch([TensorShardInfo("first", server.address)])
    return server.address


def put(owner: FakeOwner, tensors: Mapping[str, torch.Tensor]) -> None:
    for key, copy in zip(tensors, owner.store.copies(list(tensors.values())), strict=True):
        owner.store.put(key, copy)


def localized(address: str, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = RTensor.localize([remote(address, key, one) for key, one in tensors.items()])
    return found


def transport(address: str) -> str:
    """How the latest answer of an owner came."""
    found: str = runtime.current().cache._index.report()["sources"][address]["transport"]
    return found


def reader(backend: HttpRTensorBackend, address: str, *keys: Hashable, timeout_s: float = 30.0) -> SameHostReader:
    (made,) = backend.source({key: TensorShardInfo(key, address) for key in keys}, {}).open(keys, timeout_s)
    assert isinstance(made, SameHostReader)
    return made


def read(source: SameHostReader, nbytes: int) -> bytes:
    """The next bytes, where they are lent."""
    return b"".join(
        bytes(one.memory.tensor[one.begin : one.begin + one.nbytes].numpy()) for one in source.read_run([(0, nbytes)])
    )


def test_a_cold_read_describes_each_shard_once_over_either_way(
    owner: FakeOwner, known: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {f"s{number}": patterned(torch.float32, number) for number in range(20)}
    put(owner, tensors)
    described: list[Hashable] = []
    real = ShardSpec.__init__

    def describe(self: ShardSpec, key: Hashable, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        described.append(key)
        real(self, key, dtype, shape)

    monkeypatch.setattr(ShardSpec, "__init__", describe)
    over_http = HttpRTensorBackend(same_host=False)
    for way in ("shm", "http"):
        localized(known, tensors)
        assert transport(known) == way
        assert sorted(map(str, described)) == sorted(tensors)
        described.clear()
        clear_fetch_buffer()
        set_backend(over_http)
    over_http.close()


def test_every_dtype_and_shape_arrives_bit_by_bit(owner: FakeOwner, known: str) -> None:
    tensors = {f"{dtype}{shape}": patterned(dtype, *shape) for dtype in WIRE_DTYPES for shape in SHAPES}
    put(owner, tensors)
    found = localized(known, tensors)
    assert all(same_bits(one, other) for one, other in zip(found, tensors.values(), strict=True))
    few = {key: one for key, one in tensors.items() if one.ndim < 7}
    clear_fetch_buffer()
    assert all(same_bits(one, other) for one, other in zip(localized(known, few), few.values(), strict=True))
    assert transport(known) == "shm"


@pytest.mark.parametrize("same_host", [True, False])
def test_a_promised_shape_may_be_a_list(
    owner: FakeOwner, known: str, shared: HttpRTensorBackend, same_host: bool
) -> None:
    put(owner, {"a": (tensor := patterned(torch.float32, 2, 3))})
    backend = shared if same_host else HttpRTensorBackend(same_host=False)
    source = backend.source({"a": TensorShardInfo("a", known)}, {"a": (torch.float32, [2, 3], known)})  # type: ignore[dict-item]
    (opened,) = source.open(["a"], 30.0)
    assert same_bits(drained(opened)["a"], tensor)
    if not same_host:
        backend.close()


def test_only_the_first_request_to_an_owner_goes_over_http(
    owner: FakeOwner, server: ServerHandle, shared: HttpRTensorBackend
) -> None:
    tensors = {f"s{number}": patterned(torch.int64, 50, seed=number) for number in range(100)}
    put(owner, tensors)
    found = localized(server.address, tensors)
    assert all(same_bits(one, other) for one, other in zip(found, tensors.values(), strict=True))
    assert transport(server.address) == "shm"
    assert runtime.current().cache.buffer_stats()["fetch_bytes"] == 100 * 400


def test_a_connection_whose_answer_was_not_read_serves_no_other_reader(
    owner: FakeOwner, known: str, shared: HttpRTensorBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {f"s{number}": torch.full((5,), number) for number in range(8)}
    put(owner, tensors)
    first, others = dict(list(tensors.items())[:4]), dict(list(tensors.items())[4:])
    find, is_asked = owner.store.find, threading.Event()

    def late(shard_ids: Any) -> Any:
        if not is_asked.is_set():
            is_asked.set()
            time.sleep(0.3)
        return find(shard_ids)

    def broken(*args: object) -> None:
        raise MemoryError("planted")

    monkeypatch.setattr(owner.store, "find", late)
    with monkeypatch.context() as patched:
        patched.setattr(client, "Foreseen", broken)
        with pytest.raises(FetchError, match="planted"):
            localized(known, first)
    assert shared.memories is not None
    assert shared.memories.stats()["owners"] == 0, "the connection is closed"
    found = localized(known, others)
    assert all(same_bits(one, other) for one, other in zip(found, others.values(), strict=True))


def test_a_batch_is_lent_in_the_order_in_which_it_lies(
    owner: FakeOwner, known: str, shared: HttpRTensorBackend
) -> None:
    put(owner, {"a": torch.arange(9.0), "b": torch.ones(3, 3)})
    source = reader(shared, known, "b", "a")
    specs = source.next_specs()
    assert specs is not None
    assert source.is_lending
    assert [spec.key for spec in specs] == ["a", "b"], "in the order in which they lie"
    assert [one.nbytes for one in source.read_run([(0, 36), (512, 36)])] == [548], "one stretch"
    source.confirm()
    assert source.next_specs() is None
    source.close()


def test_fetch_reads_memory_too(owner: FakeOwner, known: str, shared: HttpRTensorBackend) -> None:
    tensors = {"a": patterned(torch.float32, 70_000), "b": patterned(torch.bool, 3), "empty": torch.ones(0, 3)}
    put(owner, tensors)
    found = shared.fetch([TensorShardInfo(key, known) for key in tensors])
    assert all(same_bits(one, other) for one, other in zip(found, tensors.values(), strict=True))


def test_shards_that_lie_elsewhere_come_over_http_with_the_others(owner: FakeOwner, known: str) -> None:
    tensors = {f"s{number}": patterned(torch.int32, 40, seed=number) for number in range(8)}
    put(owner, dict(list(tensors.items())[:4]))
    owner.store.update(dict(list(tensors.items())[4:]))
    found = localized(known, tensors)
    assert all(same_bits(one, other) for one, other in zip(found, tensors.values(), strict=True))


def test_shards_that_lie_elsewhere_are_not_lost_when_the_path_goes(
    owner: FakeOwner, known: str, shared: HttpRTensorBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(owner, {"a": torch.ones(5)})
    owner.store["elsewhere"] = torch.zeros(3)
    put(owner, {"later": torch.ones(7)})
    monkeypatch.setattr("gpu_cache.rpc.client.same_host.MAX_IDS", 2)
    source = reader(shared, known, "a", "elsewhere", "later")
    assert [spec.key for spec in source.next_specs() or ()] == ["a"]
    assert read(source, 20) == bytes(torch.ones(5).numpy())
    source.confirm()
    assert shared.memories is not None
    way = source._way()
    assert way is not None
    shared.memories.refuse(way.path, known, "another reader found it out of reach")
    assert sorted(spec.key for spec in source.next_specs() or ()) == ["elsewhere", "later"]
    source.close()


@pytest.mark.parametrize("case", ["missing", "shape", "dtype"])
def test_failures_read_as_over_http(owner: FakeOwner, known: str, case: str) -> None:
    put(owner, {"a": torch.ones(4), "b": torch.zeros(2)})
    asked = {"missing": ("gone", torch.ones(4)), "shape": ("a", torch.ones(5)), "dtype": ("a", torch.arange(4))}[case]
    words = []
    for is_shared in (True, False):
        backend = HttpRTensorBackend(same_host=is_shared)
        backend._nodes = runtime.current().backend._nodes  # type: ignore[attr-defined]  # they know the owner
        set_backend(backend)
        with pytest.raises(FetchError) as caught:
            RTensor.localize([remote(known, *asked), remote(known, "b", torch.zeros(2))])
        words.append([(type(one), str(one)) for one in caught.value.failures.values()])
        del caught
        assert len(clear_and_list()) == 1, "the other shard is cached"
        backend.close()
    assert words[0] == words[1]


def clear_and_list() -> list[Hashable]:
    keys = list(runtime.current().cache.keys())
    clear_fetch_buffer()
    return keys


def test_an_owner_that_came_back_says_so_for_what_it_lost(processes: Nursery, shared: HttpRTensorBackend) -> None:
    told = processes.start("owner")
    fetched(told["address"])
    fetched(told["address"])
    assert transport(told["address"]) == "shm"
    processes.send(told["pid"], signal.SIGKILL)
    with pytest.raises(FetchError) as caught:
        fetched(told["address"], timeout_s=5.0)
    assert {type(one) for one in caught.value.failures.values()} == {ShardUnreachableError}
    del caught


# Where it cannot be.


Reason = tuple[Callable[[pytest.MonkeyPatch, HttpRTensorBackend, str], object], str]


def _forget_path(patch: pytest.MonkeyPatch, backend: HttpRTensorBackend, address: str) -> None:
    told = announced("/tmp/there-is-no-such-socket")
    patch.setattr(NodeState, "memory", property(lambda node: told, lambda node, value: None), raising=False)
    _drop_mapped(backend)


def _drop_mapped(backend: HttpRTensorBackend) -> None:
    assert backend.memories is not None
    backend.memories._drop(list(backend.memories._owners))


def _be_another(patch: pytest.MonkeyPatch, backend: HttpRTensorBackend, address: str) -> None:
    _drop_mapped(backend)
    patch.setattr(memory, "user_of", lambda sock: os.geteuid() + 1)


def _refuse_user(patch: pytest.MonkeyPatch, backend: HttpRTensorBackend, address: str) -> None:
    _drop_mapped(backend)
    patch.setattr(same_host, "user_of", lambda sock: os.geteuid() + 1)


def _lack_descriptors(patch: pytest.MonkeyPatch, backend: HttpRTensorBackend, address: str) -> None:
    _drop_mapped(backend)
    real = socket.socket.recvmsg_into

    def cut(sock: socket.socket, *arguments: Any) -> Any:
        count, rights, flags, location = real(sock, *arguments)
        for _, _, content in rights:
            for at in range(0, len(content), 4):
                os.close(int.from_bytes(content[at : at + 4], sys.byteorder))
        return count, [], flags | (socket.MSG_CTRUNC if rights else 0), location

    patch.setattr(socket.socket, "recvmsg_into", cut, raising=False)


def _be_silent(patch: pytest.MonkeyPatch, backend: HttpRTensorBackend, address: str) -> None:
    patch.setattr(memory, "PATIENCE_S", 0.1)
    patch.setattr(SameHostServer, "_answer", lambda *_: None)


def _answer_junk(patch: pytest.MonkeyPatch, backend: HttpRTensorBackend, address: str) -> None:
    real = SameHostServer._send
    patch.setattr(
        SameHostServer, "_send", lambda server, client, messages: real(server, client, [(messages[-1][0], b"", ())])
    )


REASONS: dict[str, Reason] = {
    "path": (_forget_path, "cannot be reached from here"),
    "another's": (_be_another, "is another user's"),
    "refused": (_refuse_user, "the owner ended the connection"),
    "descriptors": (_lack_descriptors, "no descriptor left"),
    "silent": (_be_silent, "no answer on"),
}


@pytest.mark.parametrize("reason", REASONS)
def test_shards_come_over_http_where_memory_is_out_of_reach_and_one_line_says_why(
    owner: FakeOwner,
    known: str,
    shared: HttpRTensorBackend,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tensors = {f"s{number}": patterned(torch.int32, 400, seed=number) for number in range(5)}
    put(owner, tensors)
    spoil, words = REASONS[reason]
    caplog.set_level(logging.INFO, "gpu_cache.rpc.client.memory")
    with monkeypatch.context() as patch:
        spoil(patch, shared, known)
        for _ in range(3):
            found = localized(known, tensors)
            assert all(same_bits(one, other) for one, other in zip(found, tensors.values(), strict=True))
            clear_fetch_buffer()
    assert transport(known) == "http"
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert f"shards of {known} come over HTTP" in record.getMessage()
    assert words in record.getMessage()


def test_an_old_owner_is_named_once(
    owner: FakeOwner,
    shared: HttpRTensorBackend,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "gpu_cache.rpc.client.memory")
    monkeypatch.setenv("GPU_CACHE_SHM", "0")
    put(owner, {"a": torch.ones(3)})
    with rpc_server.start(owner=owner) as server:
        for _ in range(2):
            localized(server.address, {"a": torch.ones(3)})
            clear_fetch_buffer()
    (record,) = caplog.records
    assert "offers no shared memory" in record.getMessage()
    assert transport(server.address) == "http"


def test_a_variable_turns_both_sides_off(monkeypatch: pytest.MonkeyPatch, owner: FakeOwner) -> None:
    monkeypatch.setenv("GPU_CACHE_SHM", "0")
    with contextlib.closing(HttpRTensorBackend()) as backend:
        assert backend.memories is None
        assert same_host.opened(owner.store, "a") is None


def test_an_owner_of_another_boot_is_not_looked_for(owner: FakeOwner, known: str, shared: HttpRTensorBackend) -> None:
    shared._nodes[known].memory = "another-boot /tmp/socket"
    put(owner, {"a": torch.ones(3)})
    source = reader(shared, known, "a")
    source.next_specs()
    assert not source.is_lending
    source.read_into([memoryview(bytearray(12))])
    source.close()


# Holds.


def test_a_cleared_shard_is_read_as_it_was_while_the_reader_holds_it(
    owner: FakeOwner, known: str, shared: HttpRTensorBackend
) -> None:
    tensor = patterned(torch.uint8, 1 << 20)
    put(owner, {"a": tensor})
    source = reader(shared, known, "a")
    assert source.next_specs() is not None
    owner.store.remove(["a"])
    for number in range(4):
        put(owner, {f"junk{number}": torch.full((1 << 20,), 0xEE, dtype=torch.uint8)})
    assert read(source, 1 << 20) == bytes(tensor.numpy())
    source.confirm()
    source.close()
    eventually(lambda: owner.store.segments.stats()["shared_bytes"] == (4 << 20) + 512)


def test_what_is_read_after_the_hold_ended_is_not_taken(
    owner: FakeOwner, shared: HttpRTensorBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(same_host, "Limits", lambda: Limits(hold_s=1.0))
    with rpc_server.start(owner=owner) as server:
        put(owner, {"first": torch.ones(1), "a": torch.ones(1000), "b": torch.zeros(1000)})
        shared.fetch([TensorShardInfo("first", server.address)])
        source = reader(shared, server.address, "a", "b")
        assert source.next_specs() is not None
        source.read_run([(0, 4000)])
        source.confirm()
        time.sleep(1.2)  # as if this process had been stopped
        source.read_run([(0, 4000)])
        with pytest.raises(ShardFetchError, match="ended the connection") as caught:
            source.confirm()
        assert caught.value.may_go_on
        assert [spec.key for spec in source.next_specs() or ()] == ["b"], "what was confirmed is not read again"
        assert not source.is_lending
        source.read_into([memoryview(bytearray(4000))])
        source.close()


def test_a_whole_fetch_goes_on_over_http_when_its_hold_ends(
    owner: FakeOwner, known: str, shared: HttpRTensorBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {f"s{number}": patterned(torch.uint8, 200_000, seed=number) for number in range(20)}
    put(owner, tensors)
    looks = iter([True, True])
    monkeypatch.setattr(memory.MemoryConnection, "is_open", property(lambda one: next(looks, False)))
    found = localized(known, tensors)
    assert all(same_bits(one, other) for one, other in zip(found, tensors.values(), strict=True))


def test_a_reader_that_is_cancelled_while_the_owner_is_silent_ends_at_once(
    owner: FakeOwner, known: str, shared: HttpRTensorBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(owner, {"a": torch.ones(3)})
    asked = threading.Event()
    monkeypatch.setattr(SameHostServer, "_answer", lambda *_: asked.set())
    source = reader(shared, known, "a")
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            source.next_specs()
        except FetchError as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    assert asked.wait(30)
    source.cancel()
    thread.join(30)
    assert not thread.is_alive()
    assert isinstance(errors[0], ShardUnreachableError)
    source.close()


def test_segments_that_the_owner_gave_back_are_unmapped(
    owner: FakeOwner, known: str, shared: HttpRTensorBackend
) -> None:
    assert shared.memories is not None
    large = {"large": patterned(torch.uint8, 40 << 20)}
    put(owner, large)
    localized(known, large)
    clear_fetch_buffer()
    mapped = shared.memories.stats()["mapped_bytes"]
    owner.store.remove(["large"])
    eventually(lambda: owner.store.segments.stats()["shared_bytes"] == 512)
    owner.store.segments.trim()
    localized(known, {"first": torch.ones(1)})
    assert shared.memories.stats()["mapped_bytes"] < mapped


# Processes that die, stop and fork.


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def kill_owners(processes: Nursery, shared: HttpRTensorBackend, rounds: int, seed: int) -> None:
    """Fetch from owners that are killed meanwhile: right bytes or an error, and nothing of them stays."""
    chance = random.Random(seed)
    assert shared.memories is not None
    for number in range(rounds):
        told = processes.start("owner")
        timer = threading.Timer(chance.uniform(0.0, 0.5), processes.send, (told["pid"], signal.SIGKILL))
        timer.start()
        with contextlib.suppress(FetchError):
            while True:
                fetched(told["address"], timeout_s=10.0)
        timer.join()
        clear_fetch_buffer()
        if number == 0:
            settle(shared.memories)
            before = descriptors()
    settle(shared.memories)
    assert descriptors() <= before + 1
    assert shared.memories.stats()["owners"] == 0


def settle(memories: OwnersMemory) -> None:
    """Forget owners that are gone, as the next fetch does."""
    memories._looked_at = 0.0
    memories._close_gone()
    http = runtime.current().backend._connections  # type: ignore[attr-defined]
    while http._idle:
        http._idle.pop().close()


def kill_consumers(processes: Nursery, owner: FakeOwner, address: str, rounds: int, seed: int) -> None:
    """Kill consumers in mid-fetch: what they held comes free, and no descriptor stays."""
    chance = random.Random(seed)
    fill(owner.store)
    for number in range(rounds):
        consumer = processes.start("consumer", address)
        time.sleep(chance.uniform(0.0, 0.1))
        processes.send(consumer["pid"], signal.SIGKILL)
        owner.store.remove(KEYS)
        eventually(lambda: owner.store.segments.stats()["shared_bytes"] == 0)
        fill(owner.store)
        if number == 0:
            before = descriptors()
    assert descriptors() <= before + 1


def test_owners_killed_in_mid_fetch_cost_no_wrong_byte_and_leave_nothing(
    processes: Nursery, shared: HttpRTensorBackend
) -> None:
    kill_owners(processes, shared, rounds=3, seed=1)


def test_killed_consumers_hold_no_range(processes: Nursery, owner: FakeOwner, server: ServerHandle) -> None:
    kill_consumers(processes, owner, server.address, rounds=3, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_fifty_owners_killed_in_mid_fetch(processes: Nursery, shared: HttpRTensorBackend, seed: int) -> None:
    kill_owners(processes, shared, rounds=50, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_fifty_consumers_killed_in_mid_fetch(
    processes: Nursery, owner: FakeOwner, server: ServerHandle, seed: int
) -> None:
    kill_consumers(processes, owner, server.address, rounds=50, seed=seed)


def test_a_consumer_that_was_stopped_takes_no_bytes_that_came_meanwhile(
    processes: Nursery, owner: FakeOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(same_host, "Limits", lambda: Limits(hold_s=0.05))
    fill(owner.store)
    with rpc_server.start(owner=owner) as server:
        consumer = processes.start("consumer", server.address)
        for _ in range(5):
            processes.send(consumer["pid"], signal.SIGSTOP)
            time.sleep(0.1)
            owner.store.remove(KEYS)
            eventually(lambda: owner.store.segments.stats()["shared_bytes"] == 0)
            junk = owner.store.copies([torch.full((8 << 20,), 0xEE, dtype=torch.uint8)] * 4)
            processes.send(consumer["pid"], signal.SIGCONT)
            time.sleep(0.02)
            del junk
            fill(owner.store)
            time.sleep(0.02)
        processes.send(consumer["pid"], signal.SIGKILL)
    processes.start("owner")  # which fails if the consumer has told of wrong bytes


def test_an_owner_that_was_stopped_answers_when_it_goes_on(processes: Nursery, shared: HttpRTensorBackend) -> None:
    told = processes.start("owner")
    fetched(told["address"])
    processes.send(told["pid"], signal.SIGSTOP)
    timer = threading.Timer(0.3, processes.send, (told["pid"], signal.SIGCONT))
    timer.start()
    fetched(told["address"])
    timer.join()
    processes.send(told["pid"], signal.SIGKILL)


def test_a_forked_child_of_a_consumer_has_connections_of_its_own(processes: Nursery) -> None:
    told = processes.start("owner")
    assert processes.start("forking_consumer", told["address"])["problems"] == []
    processes.send(told["pid"], signal.SIGKILL)


def test_a_killed_owner_is_gone_at_once_though_its_child_lives(processes: Nursery, shared: HttpRTensorBackend) -> None:
    told = processes.start("forking_owner")
    fetched(told["address"])
    source = reader(shared, told["address"], KEYS[0])
    assert source.next_specs() is not None
    source.confirm()
    processes.send(told["pid"], signal.SIGUSR1)
    child = processes.told()["child"]
    processes.send(told["pid"], signal.SIGKILL)
    try:
        with pytest.raises(ShardUnreachableError):
            await_loss(source)
        source.close()
    finally:
        os.kill(child, signal.SIGKILL)


def await_loss(source: SameHostReader) -> None:
    """Confirm until that fails."""
    ends = time.monotonic() + 10
    while time.monotonic() < ends:
        source.confirm()
