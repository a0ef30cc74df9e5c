"""The server as a process and as a thread: what it refuses, where it listens, how it ends."""

from __future__ import annotations

import gc
import http.client
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpu_cache.process import OwnThread
from gpu_cache.rpc import runtime
from gpu_cache.rpc.server import main as rpc_server
from gpu_cache.rpc.wire.serialization import serialize_value
from tests.support.fake_owner import FakeOwner

UPSTREAM_FLAGS = ["--experiment-name", "exp", "--trial-name", "t0", "--role", "rollout", "--worker-index", "3"]


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(rpc_server.TOKEN_VARIABLE, raising=False)
    monkeypatch.delenv(rpc_server.ALLOW_VARIABLE, raising=False)


def status(address: str, path: str, token: str | None = None, method: str = "GET", body: bytes | None = None) -> int:
    connection = http.client.HTTPConnection(address, timeout=30)
    try:
        connection.request(method, path, body, {} if token is None else {"Authorization": f"Bearer {token}"})
        return connection.getresponse().status
    finally:
        connection.close()


class Served:
    """A server process; `address` is what it printed."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "gpu_cache.rpc.server", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("listening on "), self.process.communicate()[1]
        self.address = line.removeprefix("listening on ").strip()

    def end(self, signum: int) -> tuple[int, str, str]:
        """Exit status, the rest of stdout, and stderr."""
        self.process.send_signal(signum)
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("s3cret\n")
    path.chmod(0o600)
    return path


@pytest.mark.scripts
def test_a_process_serves_with_its_token_until_sigterm(token_file: Path) -> None:
    arguments = ["--host", "0.0.0.0", "--port", "0", "--token-file", str(token_file), "--max-body-bytes", "1KiB"]
    served = Served(*arguments, "--log-level", "DEBUG", *UPSTREAM_FLAGS)
    port = served.address.removeprefix("0.0.0.0:")
    address = f"127.0.0.1:{port}"
    assert status(address, "/health") == 200
    assert status(address, "/data/a") == 401
    assert status(address, "/data/a", "s3cret") == 404
    tensor = json.dumps(serialize_value(torch.ones(2))).encode()
    assert status(address, "/data/a", "s3cret", "PUT", tensor) == 200
    assert status(address, "/data/a", "s3cret") == 200
    assert status(address, "/data/b", "s3cret", "PUT", b" " * 1025) == 413
    returncode, out, err = served.end(signal.SIGTERM)
    assert (returncode, out) == (0, "")
    for flag, value in zip(UPSTREAM_FLAGS[::2], UPSTREAM_FLAGS[1::2], strict=True):
        assert f"ignoring {flag} {value}" in err
    assert "Traceback" not in err


@pytest.mark.scripts
def test_a_process_binds_only_loopback_by_default_and_ends_on_sigint() -> None:
    served = Served()
    assert served.address.startswith("127.0.0.1:")
    assert status(served.address, "/data/a") == 404
    returncode, out, err = served.end(signal.SIGINT)
    assert (returncode, out) == (0, "")
    assert "Traceback" not in err


def test_the_command_refuses_other_hosts_without_a_token_and_names_the_remedies(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rpc_server, "readable_on", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        rpc_server.main(["--host", "0.0.0.0"])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    for remedy in ("127.0.0.1", "--token-file", "AREAL_RPC_TOKEN", "--allow-unauthenticated"):
        assert remedy in err
    assert "AREAL_RPC_ALLOW_UNAUTHENTICATED=1" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]"])
def test_other_hosts_are_refused_without_a_token(owner: FakeOwner, host: str) -> None:
    with pytest.raises(ValueError, match="refusing to serve other hosts"):
        rpc_server.start(host, owner=owner)
    assert owner.own_addresses == set()


@pytest.mark.parametrize(
    ("settings", "variables"),
    [
        ({"token": "x"}, {}),
        ({"allow_unauthenticated": True}, {}),
        ({}, {"AREAL_RPC_TOKEN": "x"}),
        ({}, {"AREAL_RPC_ALLOW_UNAUTHENTICATED": "1"}),
    ],
)
def test_each_remedy_lets_other_hosts_in(
    owner: FakeOwner,
    settings: dict[str, object],
    variables: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with rpc_server.start("0.0.0.0", owner=owner, **settings) as server:
        assert status(f"127.0.0.1:{server.address.split(':')[1]}", "/health") == 200


def test_the_token_comes_from_the_environment_unless_given(owner: FakeOwner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AREAL_RPC_TOKEN", "from-env")
    with rpc_server.start(owner=owner) as server:
        assert status(server.address, "/data/a", "from-env") == 404
        assert status(server.address, "/data/a") == 401
    with rpc_server.start(owner=owner, token="given") as server:
        assert status(server.address, "/data/a", "given") == 404
        assert status(server.address, "/data/a", "from-env") == 401


def test_an_empty_token_in_the_environment_is_no_token(owner: FakeOwner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AREAL_RPC_TOKEN", "")
    with pytest.raises(ValueError, match="without a token"):
        rpc_server.start("0.0.0.0", owner=owner)


def test_the_flags_name_the_limits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given: dict[str, object] = {}

    def start(*_: object, **settings: object) -> None:
        given.update(settings)
        raise ValueError("that will do")

    monkeypatch.setattr(rpc_server, "start", start)
    monkeypatch.setattr(rpc_server, "readable_on", lambda *_: None)
    limits = ["--header-timeout", "2m", "--body-timeout", "inf", "--idle-timeout", "90", "--max-connections", "7"]
    with pytest.raises(SystemExit):
        rpc_server.main([*limits, "--allow-host", "a", "--allow-host", "b"])
    assert (given["header_timeout_s"], given["body_timeout_s"], given["idle_timeout_s"]) == (120.0, math.inf, 90.0)
    assert (given["max_connections"], given["allow_hosts"]) == (7, ["a", "b"])
    with pytest.raises(SystemExit):
        rpc_server.main(["--idle-timeout", "soon"])
    assert "'soon' is not a time above 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        rpc_server.main(["--max-body-bytes", "4X"])
    assert "--max-body-bytes: '4X' is not a size" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", " \n"])
def test_an_empty_token_file_is_refused(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "token"
    path.write_text(content)
    with pytest.raises(SystemExit) as raised:
        rpc_server.main(["--token-file", str(path)])
    assert raised.value.code == 2
    assert f"the token file {path} is empty" in capsys.readouterr().err


def test_a_missing_token_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        rpc_server.main(["--token-file", str(tmp_path / "none")])
    assert "No such file" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_it_listens_as_soon_as_it_is_started(owner: FakeOwner, host: str) -> None:
    with rpc_server.start(host, owner=owner) as server:
        assert server.address.startswith("127.0.0.1:")
        assert owner.own_addresses == {server.address}
        assert repr(server) == f"ServerHandle({server.address}, serving)"
        assert status(server.address, "/health") == 200


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this host has no IPv6")
@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_it_listens_on_ipv6(owner: FakeOwner, host: str) -> None:
    with rpc_server.start(host, owner=owner) as server:
        assert server.address.startswith("[::1]:")
        assert owner.own_addresses == {server.address}
        assert status(server.address, "/health") == 200


def test_a_port_in_use_raises_in_the_caller(owner: FakeOwner) -> None:
    other = FakeOwner()
    with rpc_server.start(owner=owner) as server:
        port = int(server.address.split(":")[1])
        with pytest.raises(OSError, match="in use"):
            rpc_server.start(port=port, owner=other)
    assert other.own_addresses == set()
    with rpc_server.start(port=port, owner=other) as again:
        assert again.address == server.address


def test_a_second_stop_takes_no_address_from_the_next_server_there(owner: FakeOwner) -> None:
    with rpc_server.start(owner=owner) as server:
        server.stop()
        with rpc_server.start(port=int(server.address.split(":")[1]), owner=owner):
            server.stop()
            assert owner.own_addresses == {server.address}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_body_bytes": -1}, "max_body_bytes=-1: must be at least 1"),
        ({"max_body_bytes": "1GiB"}, "max_body_bytes='1GiB': must be at least 1, and a whole number"),
        ({"max_connections": 1.5}, r"max_connections=1.5: must be at least 1, and a whole number"),
        ({"allow_hosts": "node17"}, "allow_hosts='node17': must be a list of names"),
        ({"allow_hosts": [17]}, "a name of a host is a text, not 17"),
    ],
)
def test_a_setting_that_is_none_is_refused_and_nothing_listens(
    owner: FakeOwner, settings: dict[str, Any], message: str
) -> None:
    before = set(os.listdir("/proc/self/fd")), threading.active_count()
    with pytest.raises((ValueError, TypeError), match=message):
        rpc_server.start(owner=owner, **settings)
    assert (set(os.listdir("/proc/self/fd")), threading.active_count()) == before


@pytest.mark.parametrize("limit", [np.int64(5), 5.0, "5"], ids=repr)
def test_a_limit_may_be_what_settings_take_for_a_whole_number(owner: FakeOwner, limit: Any) -> None:
    with rpc_server.start(owner=owner, max_connections=limit, max_body_bytes=limit) as server:
        assert server.address


def test_a_system_without_threads_leaves_nothing_of_a_server(
    owner: FakeOwner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(os.listdir("/proc/self/fd")), threading.active_count()
    start = OwnThread.start

    def refuse(thread: OwnThread) -> None:
        if thread.is_server:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(OwnThread, "start", refuse)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        rpc_server.start(owner=owner)
    assert (set(os.listdir("/proc/self/fd")), threading.active_count()) == before
    assert owner.own_addresses == set()
    monkeypatch.setattr(rpc_server, "readable_on", lambda *_: None)
    with pytest.raises(SystemExit):
        rpc_server.main([])
    assert "can't start new thread" in capsys.readouterr().err


def test_stop_ends_thread_and_listener_and_may_be_repeated(owner: FakeOwner) -> None:
    before = threading.active_count()
    server = rpc_server.start(owner=owner)
    assert status(server.address, "/data/a", method="PUT", body=b"{}") == 400
    server.stop()
    server.stop()
    assert threading.active_count() == before
    assert owner.own_addresses == set()
    assert repr(server) == f"ServerHandle({server.address}, stopped)"
    with pytest.raises(ConnectionRefusedError):
        status(server.address, "/health")


def test_stop_does_not_wait_for_idle_connections(owner: FakeOwner) -> None:
    server = rpc_server.start(owner=owner)
    connection = http.client.HTTPConnection(server.address, timeout=30)
    connection.request("GET", "/health")
    connection.getresponse().read()
    stopper = threading.Thread(target=server.stop)
    stopper.start()
    stopper.join(timeout=rpc_server._GRACE_S * 0.8)
    assert not stopper.is_alive()
    connection.close()


@pytest.mark.parametrize("accept", ["application/vnd.safetensors", "*/*"])
def test_stop_cuts_a_client_that_takes_nothing(owner: FakeOwner, accept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc_server, "_GRACE_S", 0.2)
    owner.store["huge"] = torch.zeros(64 << 20, dtype=torch.uint8)
    server = rpc_server.start(owner=owner)
    connection = http.client.HTTPConnection(server.address, timeout=30)
    connection.request("POST", "/data/batch", b'{"shard_ids": ["huge"]}', {"Accept": accept})
    response = connection.getresponse()
    stopper = threading.Thread(target=server.stop)
    stopper.start()
    stopper.join(timeout=20)
    assert not stopper.is_alive()
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        response.read()
    connection.close()


def test_stop_lets_answers_under_way_arrive(owner: FakeOwner) -> None:
    owner.store["huge"] = torch.zeros(64 << 20, dtype=torch.uint8)
    server = rpc_server.start(owner=owner)
    connection = http.client.HTTPConnection(server.address, timeout=30)
    connection.request("POST", "/data/batch", b'{"shard_ids": ["huge"]}', {"Accept": "application/vnd.safetensors"})
    response = connection.getresponse()
    stopper = threading.Thread(target=server.stop)
    stopper.start()
    assert len(response.read()) > 64 << 20
    stopper.join(timeout=20)
    assert not stopper.is_alive()
    connection.close()


@pytest.mark.scripts
def test_a_process_with_stuck_clients_ends_on_sigterm() -> None:
    served = Served()
    tensor = json.dumps(serialize_value(torch.zeros(16 << 20, dtype=torch.uint8))).encode()
    assert status(served.address, "/data/a", method="PUT", body=tensor) == 200
    host, port = served.address.split(":")
    stuck = [socket.create_connection((host, int(port))) for _ in range(4)]
    for sock in stuck:
        sock.sendall(b"GET /data/a HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 200")
    returncode, out, err = served.end(signal.SIGTERM)
    assert (returncode, out) == (0, "")
    assert "Traceback" not in err
    for sock in stuck:
        sock.close()


def test_without_an_owner_it_serves_this_processes_runtime() -> None:
    store = runtime.current().store
    store["from the runtime"] = torch.ones(2)
    try:
        with rpc_server.start() as server:
            assert status(server.address, "/data/from%20the%20runtime") == 200
            assert server.address in runtime.current().own_addresses
            assert status(server.address, "/data/clear", method="DELETE", body=b'{"shard_ids": []}') == 200
            assert status(server.address, "/data/reclaim", method="POST") == 200
        assert server.address not in runtime.current().own_addresses
    finally:
        store.remove(["from the runtime"])


def test_nothing_is_left_of_a_refused_body_when_the_server_stops(
    owner: FakeOwner, caplog: pytest.LogCaptureFixture
) -> None:
    with rpc_server.start(owner=owner, max_body_bytes=10) as server:
        host, _, port = server.address.rpartition(":")
        with socket.create_connection((host, int(port)), 10) as sock:
            sock.sendall(b"PUT /data/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nx")
            assert sock.recv(1 << 16).startswith(b"HTTP/1.1 413 ")
            server.stop()
    del server
    gc.collect()
    assert caplog.text == ""
