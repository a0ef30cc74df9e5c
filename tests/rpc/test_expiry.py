"""An owner drops and counts shards that no client clears in time, if it was told to."""

from __future__ import annotations

import http.client
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import torch

from gpu_cache.rpc import runtime
from gpu_cache.rpc.rtensor import RTensor
from gpu_cache.rpc.server import main as rpc_server
from gpu_cache.rpc.server.expiry import ShardExpiry, parse_seconds
from gpu_cache.rpc.store import ShardStore
from gpu_cache.rpc.wire.frame import CONTENT_TYPE
from gpu_cache.rpc.wire.serialization import serialize_value
from tests.support import data_routes
from tests.support.clocks import Clock
from tests.support.fake_owner import FakeOwner

MIB = 1 << 20


@pytest.fixture
def store(clock: Clock) -> ShardStore:
    return ShardStore(clock)


def expiry_of(store: ShardStore, clock: Clock, evicted: list[Any], ttl_s: float = 10.0) -> ShardExpiry:
    return ShardExpiry(store, ttl_s, evicted.extend, clock)


def health(address: str) -> dict[str, Any]:
    connection = http.client.HTTPConnection(address, timeout=30)
    try:
        connection.request("GET", "/health")
        return dict(json.loads(connection.getresponse().read()))
    finally:
        connection.close()


def eventually(address: str, key: str, value: int) -> dict[str, Any]:
    deadline = time.monotonic() + 30
    while (found := health(address))[key] != value:
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
    return found


def test_older_shards_are_dropped_and_counted(store: ShardStore, clock: Clock) -> None:
    evicted: list[Any] = []
    expiry = expiry_of(store, clock, evicted)
    store["first"] = torch.ones(3)
    clock.now += 4
    store["second"] = torch.ones(5)
    clock.now += 6
    assert expiry.sweep() == 0, "exactly as old as it may be"
    clock.now += 0.5
    assert expiry.sweep() == 1
    assert (list(store), evicted) == (["second"], ["first"])
    assert store.stats() == {"num_tensors": 1, "total_bytes": 20}
    clock.now += 100
    assert expiry.sweep() == 1
    assert (expiry.num_shards, expiry.nbytes, len(store)) == (2, 32, 0)
    assert repr(expiry) == "ShardExpiry(ttl_s=10, 2 shards of 32 bytes dropped)"
    assert expiry.sweep() == 0


def test_a_shard_that_is_stored_again_is_young_again(store: ShardStore, clock: Clock) -> None:
    expiry = expiry_of(store, clock, [])
    for name in "abc":
        store[name] = torch.ones(1)
    clock.now += 8
    store["a"] = torch.zeros(2)
    clock.now += 8
    assert expiry.sweep() == 2
    assert (list(store), store["a"].tolist()) == (["a"], [0.0, 0.0])


def test_shards_cleared_before_do_not_count(store: ShardStore, clock: Clock) -> None:
    expiry = expiry_of(store, clock, [])
    store["a"] = torch.ones(1)
    store.remove(["a"])
    clock.now += 100
    assert (expiry.sweep(), expiry.num_shards) == (0, 0)


def test_a_sweep_looks_at_dropped_shards_and_one_more(store: ShardStore, clock: Clock) -> None:
    """However many there are."""
    for number in range(1000):
        store[number] = torch.ones(1)
        clock.now += 1
    looks = 0

    class Counting(type(store._entries)):  # type: ignore[misc]
        def items(self) -> Any:
            nonlocal looks
            looks += 1
            return super().items()

    store._entries = Counting(store._entries)
    assert expiry_of(store, clock, [], ttl_s=997.0).sweep() == 3
    assert looks == 4


def test_one_line_a_minute_counts_dropped_shards(
    store: ShardStore, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    expiry = expiry_of(store, clock, [])
    for number in range(30):
        store[f"shard-{number}"] = torch.ones(1)
        clock.now += 5
        expiry.sweep()
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert lines[0].startswith("dropped 1 shards of 4 bytes that were not cleared for 10 s (--shard-ttl), 'shard-0'")
    assert lines[1].startswith("dropped 12 shards of 48 bytes")
    assert len(lines) == 3
    clock.now += 60
    expiry.sweep()
    assert "30 so far" in caplog.records[-1].getMessage(), "nothing goes unsaid"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [(5, 5.0), (0.5, 0.5), ("90", 90.0), ("10m", 600.0), ("2h", 7200.0), (" 1.5 d ", 129600.0), ("30s", 30.0)],
)
def test_times_are_seconds_or_have_a_unit(text: Any, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", [0, -1, "", "0m", "soon", "1w", "-5m", "nan", "-inf", True, None])
def test_a_text_that_is_no_time_is_refused(text: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="is not a time above 0"):
        parse_seconds(text)
    if text is not None:
        with pytest.raises(ValueError, match="is not a time above 0"):
            rpc_server.start(owner=FakeOwner(), shard_ttl_s=text)
        with pytest.raises(SystemExit):
            rpc_server.main([f"--shard-ttl={text}"])
        assert "is not a time above 0" in capsys.readouterr().err


def test_a_server_drops_old_shards_of_its_process_from_store_and_cache() -> None:
    with rpc_server.start(shard_ttl_s=0.2) as server:
        handle = RTensor.remotize(torch.ones(4), server.address)
        held = handle.to_local()
        found = eventually(server.address, "expired_shards", 1)
        assert (found["expired_bytes"], found["num_tensors"]) == (16, 0)
        assert data_routes.eventually(lambda: len(runtime.current().cache) == 0)  # evicted behind the count
        assert torch.equal(held, torch.ones(4)), "who holds it keeps it"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("asyncio_")]


def test_without_it_shards_stay() -> None:
    owner = FakeOwner()
    with rpc_server.start(owner=owner) as server:
        owner.store["a"] = torch.ones(4)
        owner.store._entries["a"].stored_at -= 1e9
        time.sleep(0.2)
        assert health(server.address)["expired_shards"] == 0
        assert len(owner.store) == 1


def test_a_shard_that_is_being_sent_is_sent_to_its_end() -> None:
    owner = FakeOwner()
    tensor = torch.arange(64 * MIB // 8)  # more than all buffers on the way
    owner.store["large"] = tensor
    body = json.dumps({"shard_ids": ["large"]}).encode()
    head = (
        f"POST /data/batch HTTP/1.1\r\nHost: localhost\r\nAccept: {CONTENT_TYPE}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with rpc_server.start(owner=owner, shard_ttl_s=3600) as server:
        host, port = server.address.split(":")
        with socket.create_connection((host, int(port)), timeout=30) as sock:
            sock.sendall(head.encode() + body)
            received = bytearray(sock.recv(1000))  # it is on its way
            owner.store._entries["large"].stored_at -= 7200
            assert ShardExpiry(owner.store, 3600, owner.evict).sweep() == 1
            assert len(owner.store) == 0
            while len(received) < tensor.nbytes + received.index(b"\r\n\r\n"):
                piece = sock.recv(4 * MIB)
                assert piece, "cut off"
                received += piece
            assert received.endswith(tensor[-1000:].numpy().tobytes())


def test_an_eviction_that_fails_does_not_end_the_sweeping(caplog: pytest.LogCaptureFixture) -> None:
    owner = FakeOwner()
    owner.eviction_error = OSError("broken")
    with rpc_server.start(owner=owner, shard_ttl_s=0.05) as server:
        owner.store["a"] = torch.ones(1)
        assert data_routes.eventually(lambda: "dropping old shards failed" in caplog.text)
        owner.eviction_error = None
        owner.store["b"] = torch.ones(1)
        eventually(server.address, "expired_shards", 2)
        eventually(server.address, "num_tensors", 0)


def test_a_process_drops_old_shards() -> None:
    command = [sys.executable, "-m", "gpu_cache.rpc.server", "--shard-ttl", "0.3s"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().removeprefix("listening on ").strip()
            for shard_id in ("a", "b"):
                connection = http.client.HTTPConnection(address, timeout=30)
                connection.request("PUT", f"/data/{shard_id}", json.dumps(serialize_value(torch.ones(2))).encode())
                assert connection.getresponse().status == 200
                connection.close()
            found = eventually(address, "expired_shards", 2)
            assert (found["expired_bytes"], found["num_tensors"], found["total_bytes"]) == (16, 0, 0)
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0
    assert "that were not cleared for 0.3 s (--shard-ttl)" in errors


def test_a_thread_sweeps_until_it_is_asked_to_end(caplog: pytest.LogCaptureFixture) -> None:
    store = ShardStore()
    store["old"] = torch.ones(3)
    has_failed = threading.Event()

    def evict(shard_ids: Any) -> None:
        if not has_failed.is_set():
            has_failed.set()
            raise RuntimeError("once")

    thread = ShardExpiry(store, 0.1, evict).sweep_in_thread()
    assert has_failed.wait(30)
    store["later"] = torch.ones(3)
    deadline = time.monotonic() + 30
    while len(store):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    thread.ask_to_end()
    thread.join(30)
    assert "dropping old shards failed" in caplog.text
