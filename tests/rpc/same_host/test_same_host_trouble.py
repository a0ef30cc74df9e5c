"""Shards come over HTTP where memory is out of reach, and what is read after a hold ended is not taken."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_cache import FetchError
from gpu_cache.rpc.client import memory
from gpu_cache.rpc.client import same_host as client
from gpu_cache.rpc.client.http import HttpRTensorBackend
from gpu_cache.rpc.client.pool import NodeState
from gpu_cache.rpc.rtensor import TensorShardInfo, clear_fetch_buffer
from gpu_cache.rpc.server import main as rpc_server
from gpu_cache.rpc.server import same_host
from gpu_cache.rpc.server.same_host import Limits, SameHostServer
from gpu_cache.rpc.shard import ShardFetchError, ShardUnreachableError
from gpu_cache.rpc.wire.records import announced
from tests.support.fake_owner import FakeOwner
from tests.support.interleave_stage import eventually
from tests.support.same_host_reads import localized, read, reader, transport
from tests.support.wire_tensors import patterned, same_bits


def test_a_connection_whose_answer_was_not_read_serves_no_other_reader(
    owner: FakeOwner, known: str, shared: HttpRTensorBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {f"s{number}": torch.full((5,), number) for number in range(8)}
    owner.put(tensors)
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
    owner.put(tensors)
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


def test_a_socket_that_an_owner_left_behind_says_that_it_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's name is short
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("left")
    with pytest.raises(ConnectionRefusedError) as caught:
        memory.MemoryConnection("left", time.monotonic() + 10)
    assert memory.reason_of(caught.value, "left") == "nothing listens on left any more: its process has ended"


def test_an_old_owner_is_named_once(
    owner: FakeOwner,
    shared: HttpRTensorBackend,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "gpu_cache.rpc.client.memory")
    monkeypatch.setenv("GPU_CACHE_SHM", "0")
    owner.put({"a": torch.ones(3)})
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
    owner.put({"a": torch.ones(3)})
    source = reader(shared, known, "a")
    source.next_specs()
    assert not source.is_lending
    source.read_into([memoryview(bytearray(12))])
    source.close()


def test_a_cleared_shard_is_read_as_it_was_while_the_reader_holds_it(
    owner: FakeOwner, known: str, shared: HttpRTensorBackend
) -> None:
    tensor = patterned(torch.uint8, 1 << 20)
    owner.put({"a": tensor})
    source = reader(shared, known, "a")
    assert source.next_specs() is not None
    owner.store.remove(["a"])
    for number in range(4):
        owner.put({f"junk{number}": torch.full((1 << 20,), 0xEE, dtype=torch.uint8)})
    assert read(source, 1 << 20) == bytes(tensor.numpy())
    source.confirm()
    source.close()
    eventually(lambda: owner.store.segments.stats()["shared_bytes"] == (4 << 20) + 512)


def test_what_is_read_after_the_hold_ended_is_not_taken(
    owner: FakeOwner, shared: HttpRTensorBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(same_host, "Limits", lambda: Limits(hold_s=1.0))
    with rpc_server.start(owner=owner) as server:
        owner.put({"first": torch.ones(1), "a": torch.ones(1000), "b": torch.zeros(1000)})
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
    owner.put(tensors)
    looks = iter([True, True])
    monkeypatch.setattr(memory.MemoryConnection, "is_open", property(lambda one: next(looks, False)))
    found = localized(known, tensors)
    assert all(same_bits(one, other) for one, other in zip(found, tensors.values(), strict=True))


def test_a_reader_that_is_cancelled_while_the_owner_is_silent_ends_at_once(
    owner: FakeOwner, known: str, shared: HttpRTensorBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner.put({"a": torch.ones(3)})
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
    owner.put(large)
    localized(known, large)
    clear_fetch_buffer()
    mapped = shared.memories.stats()["mapped_bytes"]
    owner.store.remove(["large"])
    eventually(lambda: owner.store.segments.stats()["shared_bytes"] == 512)
    owner.store.segments.trim()
    localized(known, {"first": torch.ones(1)})
    assert shared.memories.stats()["mapped_bytes"] < mapped
