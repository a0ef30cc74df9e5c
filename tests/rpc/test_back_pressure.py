"""A server that takes on no more than it can, and clients that come back when it says so."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from gpu_cache.rpc import runtime
from gpu_cache.rpc.client.http import HttpRTensorBackend
from gpu_cache.rpc.rtensor import RTensor
from gpu_cache.rpc.server import app as data_app
from gpu_cache.rpc.server import main as rpc_server
from gpu_cache.rpc.server import turns
from gpu_cache.rpc.server.main import ServerHandle
from gpu_cache.rpc.server.turns import Place, Turns
from gpu_cache.rpc.shard import TensorShardInfo
from tests.support.areal_fixtures import remote
from tests.support.fake_owner import FakeOwner
from tests.support.interleave_stage import eventually
from tests.support.wire_tensors import patterned, same_bits

HUGE = torch.zeros(256 << 20, dtype=torch.uint8)  # more than sockets and transports take on the way
SHARDS = {f"s{number}": patterned(torch.float32, 50_000, seed=number) for number in range(24)}


@pytest.fixture
def owner() -> FakeOwner:
    owner = FakeOwner()
    owner.store.update(SHARDS | {"huge": HUGE})
    return owner


@pytest.fixture
def server(owner: FakeOwner) -> Iterator[ServerHandle]:
    with rpc_server.start(owner=owner, max_concurrent_responses=1) as server:
        yield server


class SlowClient:
    """Asks for a shard, and takes none of it."""

    def __init__(self, server: ServerHandle, name: str = "huge", accept: str = "application/vnd.safetensors") -> None:
        host, port = server.address.split(":")
        self.sock = socket.socket()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        self.sock.connect((host, int(port)))
        body = json.dumps({"shard_ids": [name]}).encode()
        headers = f"Host: localhost\r\nAccept: {accept}\r\nContent-Length: {len(body)}\r\n\r\n"
        self.sock.sendall(b"POST /data/batch HTTP/1.1\r\n" + headers.encode() + body)
        eventually(lambda: health(server)["num_responses"] >= 1)

    def take(self, nbytes: int) -> int:
        """Read so many bytes, or up to the end; returns how many. One call with MSG_WAITALL may end with fewer."""
        num_left = nbytes
        while num_left and (piece := self.sock.recv(num_left)):
            num_left -= len(piece)
        return nbytes - num_left

    def take_all(self) -> None:
        """Read until the server has nothing more."""
        self.sock.settimeout(1)
        with contextlib.suppress(TimeoutError):
            while self.sock.recv(1 << 20):
                pass


@pytest.fixture
def slow(server: ServerHandle) -> Iterator[SlowClient]:
    client = SlowClient(server)
    yield client
    client.sock.close()


def ask(server: ServerHandle, method: str, path: str, document: Any = None) -> tuple[http.client.HTTPResponse, Any]:
    connection = http.client.HTTPConnection(server.address, timeout=30)
    try:
        connection.request(method, path, None if document is None else json.dumps(document).encode())
        response = connection.getresponse()
        return response, json.loads(response.read())
    finally:
        connection.close()


def health(server: ServerHandle) -> Any:
    response, found = ask(server, "GET", "/health")
    assert response.status == 200
    return found


def test_beyond_its_limit_a_server_says_when_to_come_back(server: ServerHandle, slow: SlowClient) -> None:
    for method, path, document in [("GET", "/data/s1", None), ("POST", "/data/batch", {"shard_ids": ["s1"]})]:
        response, refusal = ask(server, method, path, document)
        assert response.status == 503
        assert refusal == {"status": "error", "message": "busy: 1 answers are under way, others were here before"}
        assert (response.headers["Retry-After"], response.headers["Retry-After-Ms"]) == ("1", "50")
    assert health(server)["num_busy_refusals"] == 2


def test_a_busy_server_is_still_told_to_clear_and_to_keep(
    server: ServerHandle, slow: SlowClient, owner: FakeOwner
) -> None:
    assert ask(server, "DELETE", "/data/clear", {"shard_ids": ["s1"]})[1]["cleared_count"] == 1
    tensor = {"type": "tensor", "data": "AACAPw==", "shape": [1], "dtype": "torch.float32"}
    assert ask(server, "PUT", "/data/new", tensor)[0].status == 200
    assert ask(server, "POST", "/data/reclaim")[0].status == 200
    assert "new" in owner.store


def test_eight_clients_of_a_server_with_one_place_are_all_served(server: ServerHandle, slow: SlowClient) -> None:
    def fetch(first: int) -> list[torch.Tensor]:
        backend = HttpRTensorBackend()
        try:
            return backend.fetch([TensorShardInfo(f"s{number}", server.address) for number in range(first, first + 3)])
        finally:
            backend.close()

    with ThreadPoolExecutor(8) as pool:
        fetched = [pool.submit(fetch, 3 * number) for number in range(8)]
        eventually(lambda: health(server)["num_busy_refusals"] >= 40)  # five times each: more than three tries
        slow.sock.close()
        tensors = [tensor for one in fetched for tensor in one.result(60)]
    assert all(map(same_bits, tensors, SHARDS.values()))
    eventually(lambda: health(server)["num_responses"] == 0)


def test_a_batch_waits_for_a_busy_owner_and_counts_no_error(server: ServerHandle, slow: SlowClient) -> None:
    runtime.configure(device="cpu")
    batch = {name: remote(server.address, name, tensor) for name, tensor in SHARDS.items()}
    future = RTensor.prefetch(batch)
    eventually(lambda: health(server)["num_busy_refusals"] >= 5)
    slow.sock.close()
    future.result(60)
    localized = RTensor.localize(batch)
    assert all(same_bits(localized[name], SHARDS[name]) for name in SHARDS)
    assert runtime.current().cache.buffer_stats()["fetch_errors"] == 0


def test_no_end_of_an_answer_keeps_its_place(server: ServerHandle) -> None:
    assert ask(server, "GET", "/data/unknown")[0].status == 404
    assert ask(server, "POST", "/data/batch", {"shard_ids": ["unknown"]})[0].status == 400
    assert ask(server, "POST", "/data/batch", {"shard_ids": 7})[0].status == 400
    assert health(server)["num_responses"] == 0
    SlowClient(server).sock.close()
    eventually(lambda: health(server)["num_responses"] == 0)


def test_a_client_that_takes_nothing_loses_its_place(server: ServerHandle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_STALLED_S", 0.3)
    monkeypatch.setattr(data_app, "_WATCH_S", 0.05)
    client = SlowClient(server)
    eventually(lambda: health(server)["num_responses"] == 0)
    client.sock.settimeout(30)
    num_received = 0
    with contextlib.suppress(ConnectionError):
        while taken := client.sock.recv(1 << 20):
            num_received += len(taken)
    assert num_received < HUGE.nbytes
    client.sock.close()


@pytest.mark.parametrize("accept", ["application/vnd.safetensors", "*/*"])
def test_a_place_is_taken_until_the_client_has_taken_the_answer(
    server: ServerHandle, owner: FakeOwner, accept: str
) -> None:
    owner.store["small"] = torch.zeros(3 << 20, dtype=torch.uint8)  # once it fitted the transport, and was forgotten
    clients = [SlowClient(server, "small", accept) for _ in range(20)]
    eventually(lambda: health(server)["num_busy_refusals"] == 19)
    assert health(server)["num_responses"] == 1
    next(client for client in clients if b" 200 OK" in client.sock.recv(100, socket.MSG_PEEK)).take_all()
    eventually(lambda: health(server)["num_responses"] == 0)
    for client in clients:
        client.sock.close()


def test_stopped_readers_in_every_place_deny_no_client(owner: FakeOwner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_STALLED_BEFORE_OTHERS_S", 0.5)
    monkeypatch.setattr(data_app, "_WATCH_S", 0.05)
    with rpc_server.start(owner=owner, max_concurrent_responses=4) as server:
        stopped = [SlowClient(server) for _ in range(4)]
        backend = HttpRTensorBackend()
        tensors = backend.fetch([TensorShardInfo(name, server.address) for name in SHARDS])
        assert all(map(same_bits, tensors, SHARDS.values()))
        backend.close()
        for client in stopped:
            client.sock.close()


def test_a_slow_reader_that_goes_on_keeps_its_place_though_others_wait(
    owner: FakeOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 MiB within a second are progress. The clock is the test's: this host may be slow, too."""
    clock, num_looks = [0.0], [0]

    class Clocked(Turns):
        def __init__(self, num_places: int) -> None:
            super().__init__(num_places, lambda: clock[0])

        def stalled(self) -> list[tuple[Place, float]]:
            num_looks[0] += 1
            return super().stalled()

    monkeypatch.setattr(turns, "_STALLED_BEFORE_OTHERS_S", 1.0)
    monkeypatch.setattr(data_app, "Turns", Clocked)
    monkeypatch.setattr(data_app, "_WATCH_S", 0.05)
    owner.store["small"] = torch.zeros(24 << 20, dtype=torch.uint8)
    with rpc_server.start(owner=owner, max_concurrent_responses=1) as server, contextlib.ExitStack() as stack:
        slow = SlowClient(server, "small")
        stack.callback(slow.sock.close)
        num_received = 0
        while num_received < 24 << 20:
            assert ask(server, "GET", "/data/s1")[0].status in (200, 503)
            num_received += slow.take(3 << 20)
            clock[0] += 0.3
            before = num_looks[0]
            eventually(lambda before=before: num_looks[0] > before + 1)  # type: ignore[misc]
            assert num_received % (3 << 20) == 0 or num_received > 24 << 20


def test_a_refused_client_goes_before_a_new_one(
    server: ServerHandle, slow: SlowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "_KEPT_S", 60.0)
    first, second = (http.client.HTTPConnection(server.address, timeout=30) for _ in range(2))

    def status(connection: http.client.HTTPConnection) -> int:
        connection.request("GET", "/data/s1")
        response = connection.getresponse()
        response.read()
        return response.status

    assert status(first) == 503
    slow.sock.close()
    eventually(lambda: health(server)["num_responses"] == 0)
    assert status(second) == 503, "the place is free, but was refused to another"
    assert [status(first), status(second)] == [200, 200]
    first.close()
    second.close()


def test_a_refused_client_that_stays_away_is_forgotten() -> None:
    time_s = [0.0]
    places = Turns(1, lambda: time_s[0])
    with places.take("a"):
        assert not places.take("b")
    time_s[0] = 0.1
    assert not places.take("c"), "b may come back"
    time_s[0] = 0.25
    assert not places.take("d"), "c may"
    time_s[0] = 1.0
    assert places.take("e")
    assert places.num_refusals == 3


def test_places_beyond_those_that_were_refused_are_free_for_all() -> None:
    places = Turns(3, lambda: 0.0)
    first, second, _ = map(places.take, "abc")
    assert not places.take("d")
    places.leave(first)
    places.leave(second)
    assert places.take("e"), "two are free, and only one was refused"
    assert not places.take("f")
    assert places.take("d")
    assert (places.num_taken, places.num_refusals) == (3, 2)


def test_a_client_that_has_been_refused_for_long_has_a_place_kept_for_it() -> None:
    time_s = [0.0]
    places = Turns(1, lambda: time_s[0])
    place = places.take("a")
    for _ in range(21):
        assert not places.take("b")
        time_s[0] += 0.1
        assert not places.take("c")
    places.leave(place)
    assert not places.take("c"), "b was refused before it"
    with places.take("b"):
        assert not places.take("b")
    time_s[0] += 0.05
    with places.take("c"):
        assert not places.take("d")


def test_no_place_waits_for_the_first_of_those_that_were_refused_just_now() -> None:
    places = Turns(1, lambda: 0.0)
    with places.take("a"):
        assert not places.take("b")
        assert not places.take("c")
    assert places.take("c")


class Taker:
    """A place whose client takes as much as it is told to."""

    def __init__(self, places: Turns) -> None:
        self.num_taken, self.place = 0, places.take(self)
        self.place.send(lambda: self.num_taken, lambda: 0, lambda: None)


def test_a_place_that_makes_no_progress_is_freed_soon_only_while_others_wait() -> None:
    time_s = [0.0]
    places = Turns(2, lambda: time_s[0])
    idle, busy = Taker(places), Taker(places)
    for _ in range(11):
        time_s[0] += 10
        busy.num_taken += 8 << 20
        assert places.stalled() == []
    assert not places.take("another")
    assert places.stalled() == [(idle.place, 110.0)]
    time_s[0] += 5
    assert places.stalled() == [], "the other stays away"
    time_s[0] += 10
    assert [place for place, _ in places.stalled()] == [idle.place]


@pytest.mark.parametrize("bytes_per_second", [1000, 320_000])
def test_a_client_that_takes_a_trickle_makes_no_progress(bytes_per_second: int) -> None:
    time_s = [0.0]
    places = Turns(1, lambda: time_s[0])
    trickle = Taker(places)
    for _ in range(7):
        time_s[0] += 1
        trickle.num_taken += bytes_per_second
        assert not places.take("another")
        assert places.stalled() == []
    time_s[0] += 2
    assert places.stalled() == [(trickle.place, 9.0)]


def test_a_place_is_kept_until_the_client_has_taken_the_answer_or_asks_again() -> None:
    places = Turns(1, lambda: 0.0)
    left = [1 << 20]
    with places.take("a") as place:
        place.send(lambda: 1 << 20, lambda: left[0], lambda: None)
    assert (places.num_taken, places.take("b")) == (1, None)
    left[0] = 1 << 10
    assert places.num_taken == 0
    with places.take("b") as place:
        place.send(lambda: 1 << 20, lambda: 1 << 20, lambda: None)
    assert places.take("b"), "it asks again"
    assert places.num_taken == 1


def test_making_an_answer_is_no_stall_of_its_client() -> None:
    time_s = [0.0]
    places = Turns(1, lambda: time_s[0])
    place = places.take("a")
    time_s[0] = 1000.0
    assert not places.take("another")
    assert places.stalled() == []
    place.send(lambda: 0, lambda: 0, lambda: None)
    assert places.stalled() == []


def test_not_even_one_answer_is_a_mistake(owner: FakeOwner) -> None:
    with pytest.raises(ValueError, match="max_concurrent_responses=0: must be at least 1"):
        rpc_server.start(owner=owner, max_concurrent_responses=0)
