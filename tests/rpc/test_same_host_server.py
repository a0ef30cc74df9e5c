"""The owner's side of one host: records, descriptors, holds; and nothing that a client does hurts the owner."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_cache.device.hostmem import mapped
from gpu_cache.rpc.segments import Segments, socket_folder
from gpu_cache.rpc.server import same_host
from gpu_cache.rpc.server.same_host import Limits, Located, SameHostServer
from gpu_cache.rpc.store import ShardStore
from gpu_cache.rpc.wire.records import (
    COUNT,
    ELSEWHERE,
    FETCH,
    FETCH_FOR,
    HEADER,
    HELLO,
    MAX_IDS_BYTES,
    NUMBER,
    RECORDS,
    RELEASE,
    SEGMENT,
    SEGMENTS,
    UNKNOWN_COUNT,
    Answer,
    Header,
    Proxied,
    joined_ids,
    proxied_text,
    record_of,
)
from tests.support.interleave_stage import eventually
from tests.support.reading import parse_records
from tests.support.wire_tensors import patterned, raw_bytes

LONG_S = 30.0


def keys_of(answer: Answer) -> list[Hashable]:
    return [spec.key for spec, _, _ in answer.found]


class Client:
    """Speaks the protocol by hand."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(LONG_S)
        self.sock.connect(path)
        self.segments: dict[int, Any] = {}
        self.alive: list[int] = []
        self.removals = 0

    def receive(self) -> tuple[Header, bytes, list[int]]:
        data, descriptors = b"", array.array("i")
        while len(data) < HEADER.size:
            part, rights, _, _ = self.sock.recvmsg(HEADER.size - len(data), socket.CMSG_SPACE(1012))
            assert part, "the connection ended"
            for _, _, content in rights:
                descriptors.frombytes(content)
            data += part
        header, body = Header.decoded(data), b""
        while len(body) < header.nbytes:
            part = self.sock.recv(header.nbytes - len(body))
            assert part, "the connection ended"
            body += part
        return header, body, list(descriptors)

    def ask(self, *ids: str, hold_s: float = LONG_S) -> Answer:
        text = joined_ids(ids)
        assert text is not None
        self.sock.sendall(Header(FETCH, len(ids), int(hold_s * 1000), len(text)).encoded() + text)
        while (received := self.receive())[0].kind == SEGMENTS:
            for (number, nbytes), descriptor in zip(SEGMENT.iter_unpack(received[1]), received[2], strict=True):
                self.segments[number] = mapped(descriptor, nbytes, is_writable=False)
                os.close(descriptor)
        header, body, _ = received
        assert (header.kind, header.number) == (RECORDS, len(ids))
        at = COUNT.size + NUMBER.size * header.more
        (self.removals,) = COUNT.unpack(body[: COUNT.size])
        self.alive = [number for (number,) in NUMBER.iter_unpack(body[COUNT.size : at])]
        return parse_records(body[at:], ids)

    def bytes_of(self, answer: Answer, key: str) -> bytes:
        ((spec, segment, place),) = (one for one in answer.found if one[0].key == key)
        return bytes(self.segments[segment][place : place + spec.nbytes])

    def release(self) -> None:
        self.sock.sendall(Header(RELEASE, 0, 0, 0).encoded())

    def is_closed(self) -> bool:
        with contextlib.suppress(ConnectionError):
            while self.sock.recv(1 << 16):
                pass
        return True


@pytest.fixture
def store() -> ShardStore:
    return ShardStore(segments=Segments(is_wanted=lambda: True))


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder for sockets, whose paths have few characters: `tmp_path` may be too long."""
    with tempfile.TemporaryDirectory(dir="/tmp") as path:
        yield Path(path)


@pytest.fixture
def serve(store: ShardStore, folder: Path) -> Iterator[Callable[..., SameHostServer]]:
    with contextlib.ExitStack() as stack:

        def start(**limits: float) -> SameHostServer:
            server = SameHostServer(store, "a" * 32, Limits(**limits), folder)  # type: ignore[arg-type]
            stack.callback(server.stop)
            return server

        yield start
    assert list(folder.iterdir()) == []


@pytest.fixture
def connect() -> Iterator[Callable[[SameHostServer], Client]]:
    with contextlib.ExitStack() as stack:

        def start(server: SameHostServer) -> Client:
            client = Client(server.path)
            stack.callback(client.sock.close)
            header, incarnation, _ = client.receive()
            assert (header.kind, incarnation) == (HELLO, b"a" * 32)
            return client

        yield start


Serve = Callable[..., SameHostServer]
Connect = Callable[[SameHostServer], Client]


def put(store: ShardStore, ids: Sequence[str], nbytes: int = 1000) -> dict[str, bytes]:
    tensors = [patterned(torch.uint8, nbytes, seed=number) for number in range(len(ids))]
    for key, copy in zip(ids, store.copies(tensors), strict=True):
        store.put(key, copy)
    return {key: raw_bytes(tensor) for key, tensor in zip(ids, tensors, strict=True)}


def test_an_answer_says_where_each_shard_is_and_brings_each_segment_once(
    store: ShardStore, serve: Serve, connect: Connect
) -> None:
    originals = put(store, ["a", "b"])
    store.put("plain", torch.ones(3))
    client = connect(serve())
    answer = client.ask("b", "missing", "plain", "a")
    assert (keys_of(answer), answer.absent, answer.elsewhere) == (["a", "b"], ["missing"], ["plain"])
    assert {key: client.bytes_of(answer, key) for key in "ab"} == originals
    before = dict(client.segments)
    assert keys_of(client.ask("a")) == ["a"]
    assert client.segments == before
    assert client.alive == store.segments.numbers() == list(before)


def test_held_shards_keep_their_range_until_they_are_released(
    store: ShardStore, serve: Serve, connect: Connect
) -> None:
    originals = put(store, ["a"])
    client = connect(serve())
    answer = client.ask("a")
    store.remove(["a"])
    put(store, ["b"])
    assert client.bytes_of(answer, "a") == originals["a"]
    assert store.segments.stats()["shared_bytes"] == 2048
    client.release()
    eventually(lambda: store.segments.stats()["shared_bytes"] == 1024)
    assert client.ask("a").absent == ["a"]
    assert client.removals == 1


@pytest.mark.parametrize("way", ["asks", "goes"])
def test_a_hold_ends_when_the_client_asks_for_other_shards_or_is_gone(
    store: ShardStore, serve: Serve, connect: Connect, way: str
) -> None:
    put(store, ["a"])
    client = connect(serve())
    client.ask("a")
    store.remove(["a"])
    if way == "asks":
        client.ask("none")
    else:
        client.sock.close()
    eventually(lambda: store.segments.stats()["shared_bytes"] == 0)


def test_a_hold_that_lasts_too_long_ends_with_its_connection_first(
    store: ShardStore, serve: Serve, connect: Connect
) -> None:
    put(store, ["a"])
    server = serve(hold_s=0.05)
    client = connect(server)
    client.ask("a")
    store.remove(["a"])
    assert client.is_closed()
    eventually(lambda: store.segments.stats()["shared_bytes"] == 0)
    patient = connect(serve())
    patient.ask("b", hold_s=0.01)  # nothing to hold
    assert patient.ask("b").absent == ["b"]


BROKEN = {
    "garbage": b"GET / HTTP/1.1\r\n\r\n      ",
    "kind": Header(99, 0, 0, 0).encoded(),
    "length": Header(FETCH, 1, 0, MAX_IDS_BYTES + 1).encoded(),
    "number": Header(FETCH, 1 << 20, 0, 4).encoded(),
    "ids": Header(FETCH, 3, 0, 1).encoded() + b"a",
    "text": Header(FETCH, 1, 0, 1).encoded() + b"\xff",
    "release": Header(RELEASE, 0, 0, 5).encoded() + b"12345",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=list(BROKEN))
def test_a_broken_request_ends_its_connection_and_no_other(
    store: ShardStore, serve: Serve, connect: Connect, text: bytes
) -> None:
    originals = put(store, ["a"])
    server = serve()
    other, client = connect(server), connect(server)
    client.sock.sendall(text)
    assert client.is_closed()
    assert other.bytes_of(other.ask("a"), "a") == originals["a"]


def test_a_request_may_come_byte_by_byte_but_not_for_ever(store: ShardStore, serve: Serve, connect: Connect) -> None:
    put(store, ["a"])
    client = connect(serve())
    for byte in Header(FETCH, 1, 1000, 1).encoded() + b"a":
        client.sock.sendall(bytes([byte]))
    assert client.receive()[0].kind == SEGMENTS
    assert client.receive()[0].kind == RECORDS
    hurried = connect(serve(request_s=0.3))
    hurried.sock.sendall(b"gcm1")
    assert hurried.is_closed()


class HeldProxy:
    """A `Proxy` that answers when the test says so."""

    def __init__(self) -> None:
        self.is_asked = threading.Event()
        self.answer: Callable[[Located], None] = lambda _: None

    def begin(self, asked: Proxied, answer: Callable[[Located], None]) -> None:
        self.answer = answer
        self.is_asked.set()

    def forget(self, shard_ids: Sequence[str]) -> None: ...


def test_a_request_that_begins_while_a_proxy_works_has_no_more_time_than_others(
    store: ShardStore, folder: Path, connect: Connect
) -> None:
    proxy = HeldProxy()
    server = SameHostServer(store, "a" * 32, Limits(request_s=0.3), folder, proxy)
    try:
        client = connect(server)
        text = proxied_text("host:1", {"a": record_of(torch.uint8, (3,), 0, 0)})
        assert text is not None
        client.sock.sendall(Header(FETCH_FOR, 1, 30_000, len(text)).encoded() + text)
        assert proxy.is_asked.wait(LONG_S)
        client.sock.sendall(b"gcm1")  # and then no more
        time.sleep(0.4)
        assert len(server._clients) == 1, "the wait for the proxy does not count"
        proxy.answer(Located(ELSEWHERE, (), UNKNOWN_COUNT))
        assert client.receive()[0].kind == RECORDS
        assert client.is_closed()
    finally:
        server.stop()


def test_without_a_thread_there_is_no_server_and_nothing_is_left(
    store: ShardStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(same_host.OwnThread, "start", refuse)
    monkeypatch.setattr(same_host, "socket_folder", lambda: folder)
    monkeypatch.setenv("GPU_CACHE_SHM", "1")
    before = len(os.listdir("/proc/self/fd"))
    assert same_host.opened(store, "a" * 32) is None
    assert len(os.listdir("/proc/self/fd")) <= before
    assert list(folder.iterdir()) == []


def test_a_client_that_takes_no_answer_is_given_up(store: ShardStore, serve: Serve, connect: Connect) -> None:
    ids = [f"{number:032}" for number in range(60_000)]  # 3.8 MB of records: more than a socket buffers
    server = serve(answer_s=0.2)
    client = connect(server)
    text = joined_ids(ids)
    assert text is not None
    client.sock.sendall(Header(FETCH, len(ids), 1000, len(text)).encoded() + text)
    eventually(lambda: not server._clients)
    assert client.is_closed()


def test_many_requests_at_once_are_answered_in_order(store: ShardStore, serve: Serve, connect: Connect) -> None:
    put(store, ["a", "b"])
    client = connect(serve())
    for key in "ab":
        client.sock.sendall(Header(FETCH, 1, 1000, 1).encoded() + key.encode())
    kinds = [client.receive()[0].kind for _ in range(3)]
    assert kinds == [SEGMENTS, RECORDS, RECORDS]


def test_the_longest_idle_client_makes_room_and_one_that_holds_does_not(
    store: ShardStore, serve: Serve, connect: Connect
) -> None:
    put(store, ["a"])
    server = serve(num_clients=2)
    holder, idle = connect(server), connect(server)
    holder.ask("a")
    other = connect(server)
    assert idle.is_closed()
    other.ask("a")
    refused = Client(server.path)
    assert refused.is_closed()
    refused.sock.close()
    assert server.num_refused == 1
    holder.ask("a")


def test_another_users_process_is_refused(store: ShardStore, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()
    monkeypatch.setattr(same_host, "user_of", lambda sock: os.geteuid() + 1)
    with contextlib.closing(Client(server.path).sock) as sock:
        assert sock.recv(1) == b""


def test_descriptors_beyond_one_message_come_in_several(
    store: ShardStore, serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(same_host, "MAX_DESCRIPTORS", 2)
    monkeypatch.setattr("gpu_cache.rpc.segments.FIRST_BYTES", 1 << 20)
    monkeypatch.setattr("gpu_cache.rpc.segments.SEGMENT_BYTES", 1 << 20)
    originals = {}
    for key in "abcde":
        originals |= put(store, [key], nbytes=1 << 20)
    client = connect(serve())
    answer = client.ask(*"abcde")
    assert len(client.segments) == 5
    assert {key: client.bytes_of(answer, key) for key in "abcde"} == originals


def test_the_socket_is_in_a_folder_of_this_user_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as base:
        folder = socket_folder({"XDG_RUNTIME_DIR": base})
        assert folder.parent == Path(base)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        folder.chmod(0o755)
        monkeypatch.setattr("tempfile.tempdir", base)
        assert socket_folder({"XDG_RUNTIME_DIR": base}).parent != Path(base), "others can look into that one"


def test_sockets_of_killed_owners_are_removed_and_those_of_living_ones_stay(
    store: ShardStore, serve: Serve, folder: Path
) -> None:
    dead = folder / "1-dead.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(dead))
    first = serve()
    assert not dead.exists()
    serve()
    assert os.path.exists(first.path)


def test_clients_come_and_go_and_leave_no_descriptor(store: ShardStore, serve: Serve, connect: Connect) -> None:
    put(store, ["a"])
    server = serve()
    connect(server).ask("a")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        client = Client(server.path)
        client.receive()
        client.ask("a")
        client.sock.close()
    eventually(lambda: len(server._clients) == 1)
    eventually(lambda: len(os.listdir("/proc/self/fd")) <= before)
