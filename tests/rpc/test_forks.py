"""A forked child keeps no socket of its parent's: a killed owner is gone at once, and so is a killed consumer."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_cache.rpc.client.http import HttpRTensorBackend
from gpu_cache.rpc.server import main as rpc_server
from gpu_cache.rpc.shard import ShardUnreachableError, TensorShardInfo
from tests.support.areal_fixtures import fault_servers
from tests.support.fake_owner import FakeOwner
from tests.support.fault_server import frames_of, whole

pytestmark = pytest.mark.scripts  # whole processes, some seconds each

ROOT = Path(__file__).parents[2]
SHARDS = {"a": torch.arange(4.0)}
LONG_S = 30.0


class Forking:
    """A process of `tests.support.forking`, and the child that it forked."""

    def __init__(self, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forking", *arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._child = 0

    def told(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def fork(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("fork\n")
        self._process.stdin.flush()
        self.note_child()

    def note_child(self) -> None:
        self._child = self.told()["child"]

    def kill(self) -> None:
        """The parent alone."""
        self._process.kill()
        self._process.wait(LONG_S)

    def close(self) -> None:
        if self._child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child, signal.SIGKILL)
        self.kill()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()


@pytest.fixture
def owner() -> Iterator[Forking]:
    with contextlib.closing(Forking("owner")) as process:
        yield process


def request(sock: socket.socket) -> bytes:
    """Ask for the owner's shard, and read the first bytes of the answer."""
    body = json.dumps({"shard_ids": ["a"]}).encode()
    head = f"POST /data/batch HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
    sock.sendall(f"{head}Accept: application/vnd.safetensors\r\n\r\n".encode() + body)
    return sock.recv(1000)


def is_cut(sock: socket.socket) -> bool:
    """Whether the peer's end comes, behind what is on its way; a peer that lives sends nothing more, for ever."""
    sock.settimeout(LONG_S)
    with contextlib.suppress(ConnectionResetError):
        while sock.recv(1 << 20):
            pass
    return True


def test_a_killed_owner_refuses_at_once_and_its_port_is_free_while_its_child_lives(owner: Forking) -> None:
    address = owner.told()["address"]
    owner.fork()
    owner.kill()
    with contextlib.closing(HttpRTensorBackend()) as backend:
        with pytest.raises(ShardUnreachableError, match="Connection refused"):
            backend.fetch([TensorShardInfo("a", address)])
        other = FakeOwner()
        other.store.put("a", SHARDS["a"])
        with rpc_server.start(port=int(address.rpartition(":")[2]), owner=other):
            assert torch.equal(backend.fetch([TensorShardInfo("a", address)])[0], SHARDS["a"])


def test_a_child_finds_connections_that_the_loop_has_not_told_of_yet() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as client,
        listener.accept()[0] as accepted,
    ):
        found = rpc_server._sockets_at(listener.getsockname()[1])
        assert found == {listener.fileno(), accepted.fileno()}
        client.sendall(b"x")
        assert accepted.recv(1) == b"x", "it is still open"


def test_a_consumer_learns_in_mid_answer_that_an_owner_was_killed_whose_child_lives(owner: Forking) -> None:
    host, _, port = owner.told()["address"].rpartition(":")
    with socket.create_connection((host, int(port)), LONG_S) as sock:
        assert request(sock).startswith(b"HTTP/1.1 200")
        owner.fork()
        owner.kill()
        assert is_cut(sock)


def test_an_owner_learns_that_a_consumer_was_killed_whose_child_lives() -> None:
    with fault_servers() as serve:
        server = serve(whole(frames_of(SHARDS)))
        with contextlib.closing(Forking("consumer", server.address)) as consumer:
            consumer.note_child()
            (sock,) = server._sockets
            consumer.kill()
            server._threads[1].join(LONG_S)
            assert sock.fileno() == -1, "its thread reads until the connection ends"


def test_a_child_drops_inherited_connections_without_harm_to_its_files_or_its_parent() -> None:
    with fault_servers() as serve:
        server = serve(whole(frames_of(SHARDS)))
        done = subprocess.run(
            [
                sys.executable,
                "-W",
                "ignore::DeprecationWarning",
                "-m",
                "tests.support.forking",
                "child",
                server.address,
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.stderr == ""
    fetched = "tensor([0., 0.]) tensor([0., 1., 2., 3.])"
    assert done.stdout.splitlines() == ["[0.0, 1.0, 2.0, 3.0]", "3", fetched]
    assert server.num_connections == 2, "the parent's, which it used again, and the child's"
