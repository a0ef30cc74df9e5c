"""The doctor's findings about this process and a server; with AReaL: tests/beside_areal."""

from __future__ import annotations

import json

import pytest
import torch

import gpu_cache
from gpu_cache.rpc import doctor
from gpu_cache.rpc.server import main as rpc_server
from tests.support.fault_server import Exchange, FaultServer, Step
from tests.support.free_port import free_port


@pytest.fixture(autouse=True)
def off(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GPU_CACHE_AREAL", "GPU_CACHE_DEVICE", "AREAL_RPC_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def texts(address: str | None = None) -> dict[str, tuple[bool, str]]:
    return {one.what: (one.is_good, one.text) for one in doctor.findings(address)}


def test_versions_and_the_device_with_its_reason_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found = texts()
    assert found["gpu_cache"][1].startswith(gpu_cache.__version__)
    assert found["torch"] == (True, torch.__version__)
    assert "server" not in found
    monkeypatch.setenv("GPU_CACHE_DEVICE", "cpu")
    assert texts()["device"] == (True, "cpu: device='cpu'")
    monkeypatch.setenv("GPU_CACHE_DEVICE", "gpu0")
    is_good, text = texts()["device"]
    assert not is_good
    assert "'gpu0'" in text


def test_a_missing_areal_is_bad_only_where_the_switch_asks_for_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gpu_cache.rpc.adopt.find_areal", lambda: None)
    assert doctor.main([]) == 0
    assert "ok  AReaL      not installed here (GPU_CACHE_AREAL=)\n" in capsys.readouterr().out
    monkeypatch.setenv("GPU_CACHE_AREAL", "1")
    assert doctor.main([]) == 1
    assert "BAD AReaL      not installed here (GPU_CACHE_AREAL=1)\n" in capsys.readouterr().out


def test_a_server_of_ours_speaks_binary_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    with rpc_server.start(token="s3cret") as server:
        found = texts(server.address)
        said = f"{server.address} answers /health with 200, 0 tensors of 0 bytes"
        assert found["server"] == (True, said)
        assert found["frames"] == (False, "refused: the token in AREAL_RPC_TOKEN is not the server's")
        monkeypatch.setenv("AREAL_RPC_TOKEN", "s3cret")
        is_good, text = texts(server.address)["frames"]
        assert is_good
        assert text.startswith("binary, incarnation ")


def test_a_server_that_is_not_there_is_bad() -> None:
    address = f"127.0.0.1:{free_port()}"
    is_good, text = texts(address)["server"]
    assert not is_good
    assert text.startswith(f"{address} cannot be reached: ConnectionRefusedError")


@pytest.mark.parametrize("address", ["a..b:80", "localhost:99999", "localhost", "http://localhost:80", ""])
def test_an_address_that_is_none_is_named(address: str) -> None:
    said = f"{address} cannot be asked: {address!r} is not an address: write host:port or [ipv6]:port"
    assert texts(address)["server"] == (False, said)


def test_a_token_that_cannot_be_sent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AREAL_RPC_TOKEN", "a b")
    is_good, text = texts("localhost:80")["server"]
    assert not is_good
    assert "cannot be asked: the token in AREAL_RPC_TOKEN has a space" in text


def test_a_server_of_areals_own_speaks_json() -> None:
    health, batch = json.dumps({"status": "healthy"}).encode(), b"[]"
    answers = [answer_of("application/json", health), answer_of("application/octet-stream", batch)]
    with FaultServer(*answers) as server:
        found = texts(server.address)
    assert found["server"] == (True, f"{server.address} answers /health with 200")
    assert found["frames"] == (True, "JSON: the server is AReaL's own, and its process has the switch off")


def answer_of(content_type: str, body: bytes) -> Step:
    def send(exchange: Exchange) -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
        exchange.send(head.encode() + body)

    return send
