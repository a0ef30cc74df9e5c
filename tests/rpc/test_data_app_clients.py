"""The server beside its clients: limits, tokens, connections that go on or break, and who waits for whom."""

from __future__ import annotations

import gc
import gzip
import http.client
import json
import logging
import socket
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gpu_cache.rpc.server import main as rpc_server
from gpu_cache.rpc.server.connections import use_reno_within_host
from gpu_cache.rpc.server.main import ServerHandle
from gpu_cache.rpc.wire.frame import Frame, decode_frame
from gpu_cache.rpc.wire.serialization import TensorText, serialize_value
from tests.support.data_routes import BINARY, Reply, ask, assert_refused, batch, eventually
from tests.support.fake_owner import FakeOwner
from tests.support.wire_tensors import patterned, same_bits

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


@pytest.fixture
def without_collector() -> Iterator[None]:
    """What then dies is not in a cycle. Trainers switch the collector off."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_a_body_over_the_limit_is_refused(owner: FakeOwner) -> None:
    with rpc_server.start(owner=owner, max_body_bytes=1000) as server:
        for method, path in (("PUT", "/data/a"), ("POST", "/data/batch"), ("DELETE", "/data/clear")):
            reply = ask(server, method, path, b" " * 1001)
            assert_refused(reply, 413, "a body of 1,001 bytes, the limit is 1,000")
        assert ask(server, "PUT", "/data/a", serialize_value(torch.ones(10))).status == 200


def test_a_body_of_unknown_length_is_cut_off_at_the_limit(owner: FakeOwner) -> None:
    with rpc_server.start(owner=owner, max_body_bytes=1000) as server:
        connection = http.client.HTTPConnection(server.address, timeout=30)
        connection.request("PUT", "/data/a", iter([b" " * 600] * 2), encode_chunked=True)
        response = connection.getresponse()
        assert response.status == 413
        assert json.loads(response.read())["status"] == "error"
        connection.close()


def test_a_compressed_body_is_not_unpacked(server: ServerHandle, owner: FakeOwner) -> None:
    body = gzip.compress(json.dumps(serialize_value(torch.ones(1))).encode())
    assert ask(server, "PUT", "/data/a", body, {"Content-Encoding": "gzip"}).status == 400
    assert len(owner.store) == 0


@pytest.mark.parametrize("given", [None, "Bearer wrong", "secret", "Bearer secret ", "Bearer sécretx", "Basic secret"])
def test_without_the_token_every_route_but_health_is_closed(owner: FakeOwner, given: str | None) -> None:
    owner.store["a"] = torch.ones(1)
    headers = {} if given is None else {"Authorization": given.encode().decode("latin-1")}
    routes = [("GET", "/data/a"), ("PUT", "/data/a"), ("POST", "/data/batch"), ("DELETE", "/data/clear")]
    routes += [("POST", "/data/reclaim"), ("POST", "/data/serials"), ("GET", "/nothing"), ("GET", "/health/../data/a")]
    with rpc_server.start(owner=owner, token="secretx") as server:
        for method, path in routes:
            reply = ask(server, method, path, b"", headers)
            wrong = "the bearer token is not this server's"
            assert_refused(reply, 401, "a bearer token is required" if given is None else wrong)
            assert reply.headers["WWW-Authenticate"] == "Bearer"
        assert ask(server, "GET", "/health", headers=headers).status == 200
    assert list(owner.store) == ["a"]


def test_with_the_token_the_routes_are_open(owner: FakeOwner) -> None:
    owner.store["a"] = torch.ones(1)
    with rpc_server.start(owner=owner, token="secretx") as server:
        assert batch(server, "a", headers={"Authorization": "Bearer secretx"}).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "page.example:80"},
        {"Origin": "http://page.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:9"},
        {"Origin": "http://["},
    ],
    ids=repr,
)
def test_a_web_page_gets_nothing_and_changes_nothing(
    server: ServerHandle, owner: FakeOwner, headers: dict[str, str]
) -> None:
    owner.store["a"] = torch.ones(1)
    routes = [("GET", "/health"), ("GET", "/data/a"), ("POST", "/data/batch"), ("DELETE", "/data/clear")]
    for method, path in [*routes, ("PUT", "/data/a"), ("POST", "/data/serials"), ("OPTIONS", "/data/a")]:
        reply = ask(server, method, path, {"shard_ids": ["a"]}, headers)
        assert (reply.status, reply.json["status"]) == (403, "error")
        assert reply.json["message"].endswith("allow_hosts= or --allow-host lets more names in")
    assert owner.store["a"].tolist() == [1.0]


def test_allowed_names_are_answered(owner: FakeOwner) -> None:
    with rpc_server.start("localhost", owner=owner, allow_hosts=["Node17"]) as server:
        for headers in ({"Host": "node17:80"}, {"Host": "localhost"}, {"Origin": "https://node17"}):
            assert ask(server, "GET", "/health", headers=headers).status == 200
    with rpc_server.start("0.0.0.0", owner=owner, allow_unauthenticated=True) as server:
        server.address = server.address.replace("0.0.0.0", "127.0.0.1")
        assert ask(server, "GET", "/health", headers={"Host": "anything"}).status == 200
        assert ask(server, "GET", "/health", headers={"Origin": "http://page.example"}).status == 403


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nothing", 404), ("POST", "/health", 405)])
def test_unknown_routes_are_refused_in_json(server: ServerHandle, method: str, path: str, status: int) -> None:
    reply = ask(server, method, path)
    assert (reply.status, reply.json["status"]) == (status, "error")


def test_one_connection_serves_many_requests(server: ServerHandle, owner: FakeOwner) -> None:
    owner.store["a"] = patterned(torch.float32, 500_000)
    connection = http.client.HTTPConnection(server.address, timeout=30)
    for _ in range(3):
        connection.request("POST", "/data/batch", b'{"shard_ids": ["a"]}', BINARY)
        assert same_bits(decode_frame(connection.getresponse().read())["a"], owner.store["a"])
        connected = connection.sock
        connection.request("GET", "/data/missing")
        assert connection.getresponse().read() != b""
        assert connection.sock is connected
    connection.close()


@pytest.mark.parametrize("headers", [BINARY, {}], ids=["binary", "json"])
@pytest.mark.parametrize("length", [None, 1000], ids=["to the end", "in the middle"])
def test_a_client_leaves_nothing_behind(
    server: ServerHandle,
    owner: FakeOwner,
    headers: dict[str, str],
    length: int | None,
    caplog: pytest.LogCaptureFixture,
    without_collector: None,
) -> None:
    owner.store["large"] = torch.zeros(32 << 20, dtype=torch.uint8)
    death = weakref.ref(owner.store["large"])
    connection = http.client.HTTPConnection(server.address, timeout=30)
    connection.request("POST", "/data/batch", b'{"shard_ids": ["large"]}', headers)
    connection.getresponse().read(length)
    connection.close()
    owner.store.remove(["large"])
    assert eventually(lambda: death() is None)
    owner.store["small"] = torch.ones(3)
    assert decode_frame(batch(server, "small", headers=BINARY).body)["small"].tolist() == [1, 1, 1]
    sent = ask(server, "GET", "/health").json["sent_payload_bytes"]
    assert sent == (12 if length else (32 << 20) + 12)
    server.stop()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_client_that_leaves_while_sending_costs_nothing(
    server: ServerHandle, owner: FakeOwner, caplog: pytest.LogCaptureFixture
) -> None:
    host, port = server.address.split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"PUT /data/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\nstart")
    assert ask(server, "GET", "/health").json["num_tensors"] == 0
    server.stop()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_shard_removed_while_it_is_sent_arrives_whole(server: ServerHandle, owner: FakeOwner) -> None:
    tensor = patterned(torch.float32, 4 << 20)
    owner.store["a"] = tensor
    connection = http.client.HTTPConnection(server.address, timeout=30)
    connection.request("POST", "/data/batch", b'{"shard_ids": ["a"]}', BINARY)
    response = connection.getresponse()
    start = response.read(1000)
    assert ask(server, "DELETE", "/data/clear", {"shard_ids": ["a"]}).json["cleared_count"] == 1
    assert same_bits(decode_frame(start + response.read())["a"], tensor)
    connection.close()


def test_a_fault_in_the_middle_breaks_the_connection_instead_of_posing_as_data(
    server: ServerHandle, owner: FakeOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(frame: Frame) -> Iterator[bytes]:
        yield frame.header
        raise RuntimeError("fault in the middle")

    owner.store["a"] = torch.ones(100_000)
    with monkeypatch.context() as patched:
        patched.setattr(Frame, "__iter__", broken)
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            batch(server, "a", headers=BINARY)
    assert batch(server, "a", headers=BINARY).status == 200


def test_an_encoding_under_way_does_not_keep_others_waiting(
    server: ServerHandle, owner: FakeOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, released = threading.Event(), threading.Event()

    def slow(text: TensorText) -> Iterator[bytes]:
        entered.set()
        assert released.wait(timeout=30)
        yield b" " * text.nbytes

    monkeypatch.setattr(TensorText, "__iter__", slow)
    owner.store["a"] = torch.ones(1)
    replies: list[Reply] = []
    thread = threading.Thread(target=lambda: replies.append(ask(server, "GET", "/data/a")))
    thread.start()
    assert entered.wait(timeout=30)
    assert ask(server, "GET", "/health").status == 200
    assert replies == []
    released.set()
    thread.join(timeout=30)
    assert replies[0].body.isspace()


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this host has no IPv6")
def test_shards_are_served_over_ipv6(owner: FakeOwner) -> None:
    owner.store["a"] = torch.ones(2)
    with rpc_server.start("::1", owner=owner) as server:
        assert server.address.startswith("[::1]:")
        assert decode_frame(batch(server, "a", headers=BINARY).body)["a"].tolist() == [1, 1]


class SocketTransport:
    def __init__(self, connected: socket.socket, peer_host: str) -> None:
        self.known = {
            "socket": connected,
            "peername": (peer_host, 1),
            "sockname": ("127.0.0.1", 2),
        }

    def get_extra_info(self, name: str) -> Any:
        return self.known[name]


@pytest.mark.parametrize(("peer_host", "is_tuned"), [("127.0.0.1", True), ("10.0.0.9", False)])
def test_only_connections_within_the_host_change_their_congestion_control(peer_host: str, is_tuned: bool) -> None:
    with socket.socket() as connected:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        before = connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
        use_reno_within_host(SocketTransport(connected, peer_host))
        after = connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
        assert after.rstrip(b"\0") == (b"reno" if is_tuned else before.rstrip(b"\0"))


def test_every_answer_names_the_incarnation(owner: FakeOwner) -> None:
    owner.store["a"] = torch.ones(3)
    with rpc_server.start(owner=owner, token="s3cret", max_body_bytes=1000) as server:
        known = ask(server, "GET", "/health").json["incarnation"]
        shown = {"Authorization": "Bearer s3cret"}
        asked = [
            ("GET", "/health", None, shown, 200),
            ("GET", "/data/a", None, shown, 200),
            ("GET", "/data/b", None, shown, 404),
            ("GET", "/data/a", None, {}, 401),
            ("POST", "/data/batch", {"shard_ids": ["a"]}, shown, 200),
            ("POST", "/data/batch", {"shard_ids": ["b"]}, shown, 400),
            ("PUT", "/data/c", b"x" * 2000, shown, 413),
            ("PUT", "/data/c", b"junk", shown, 400),
            ("DELETE", "/data/clear", {"shard_ids": []}, shown, 200),
            ("POST", "/data/reclaim", None, shown, 200),
        ]
        for method, path, body, headers, status in asked:
            reply = ask(server, method, path, body, headers)
            assert (reply.status, reply.headers["X-Shard-Incarnation"]) == (status, known), path
