"""Bad input: every error names the shard and the address, nothing stays behind, and the next request works."""

from __future__ import annotations

import http.client
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gpu_cache import CacheConfig, FetchError, TensorCache
from gpu_cache.device.host import HostDevice
from gpu_cache.rpc import runtime
from gpu_cache.rpc.rtensor import HttpRTensorBackend, RTensor, buffer_stats, set_backend
from gpu_cache.rpc.server import main as rpc_server
from gpu_cache.rpc.wire.frame import CONTENT_TYPE
from tests.support.areal_fixtures import http_backend, remote, with_settings
from tests.support.bad_frames import BAD_FRAMES, PAIR
from tests.support.fake_owner import FakeOwner
from tests.support.fault_server import FaultServer, Step, cut, frame, frames_of, hanging_up, refusal, reply, whole
from tests.support.wire_tensors import same_bits

GAUGES = (
    "num_entries", "num_tensors", "total_bytes", "device_bytes", "device_quarantined_bytes", "pinned_bytes",
    "host_bytes", "outlived_entries", "outlived_bytes",
)  # fmt: skip


@pytest.fixture(params=["into the pool", "through staging"], autouse=True)
def placed(request: pytest.FixtureRequest) -> None:
    """Received straight into the pool's memory, or into staging buffers and copied; no pause before another try."""
    config = CacheConfig(device="cpu", staging_slots=2, staging_slot_bytes="64KiB", run_bytes="64KiB")
    runtime.configure(config)
    if request.param == "through staging":
        runtime.current().cache = TensorCache(config, device=HostDevice(stages=True))
    with_settings(http_backend(), retry_pause_s=0.0)


def pair(address: str) -> list[RTensor]:
    return [remote(address, shard_id, tensor) for shard_id, tensor in PAIR.items()]


def gauges() -> dict[str, Any]:
    runtime.current().cache.synchronize()
    return {name: value for name, value in buffer_stats().items() if name in GAUGES}


def check_failure(address: str, *named: str) -> None:
    """It fails by name, and leaves nothing."""
    before = gauges()
    handles = pair(address)
    with pytest.raises(FetchError) as caught:
        RTensor.localize(handles)
    assert address in str(caught.value)
    assert all(repr(name) in str(caught.value) for name in named or PAIR)
    assert all(address in str(error) and name in str(error) for name, error in caught.value.failures.items())
    assert all(handle.data.is_meta for handle in handles)
    del caught, handles
    assert gauges() == before


def check_success(server: FaultServer) -> None:
    """The same request, answered well."""
    server.script = [whole(frames_of(PAIR))]
    tensors = RTensor.localize(pair(server.address))
    assert all(same_bits(got, want) for got, want in zip(tensors, PAIR.values(), strict=True))


BODY = frame(PAIR)
BROKEN: dict[str, Step] = {
    **{f"bad frame: {name}": whole(reply(body)) for name, body in BAD_FRAMES.items()},
    **{f"truncated at {n}": cut(reply(BODY), n) for n in range(0, len(BODY), 23)},
    "truncated in its last shard": cut(reply(BODY), len(BODY) - 1),
    "reset in mid-body": cut(reply(BODY), len(BODY) - 5, by_reset=True),
    "reset at once": lambda exchange: exchange.reset(),
    "hung up": hanging_up,
    "oversized HTTP header": whole(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n"),
    "too many HTTP headers": whole(b"HTTP/1.1 200 OK\r\n" + b"X: x\r\n" * 1000 + b"\r\n"),
    "no HTTP": whole(b"220 smtp.example.org ready\r\n"),
    "too long": whole(reply(BODY, length=1 << 60)),
    "announced too short": whole(reply(BODY, length=len(BODY) - 4)),
    "JSON of nothing": whole(reply(b"null", content_type="application/json")),
    "refused": whole(refusal(500, "oops")),
}


@pytest.mark.parametrize("step", BROKEN.values(), ids=BROKEN.keys())
def test_an_answer_that_is_broken_leaves_nothing(serve: Callable[..., FaultServer], step: Step) -> None:
    server = serve(step)
    check_failure(server.address)
    check_success(server)
    assert buffer_stats()["fetch_errors"] == 2
    check_other_shards(server)


def check_other_shards(server: FaultServer) -> None:
    server.script = [whole(frames_of({"c": torch.arange(7)}))]
    assert torch.equal(remote(server.address, "c", torch.arange(7)).to_local(), torch.arange(7))


def test_a_fault_leaves_earlier_shards_cached(serve: Callable[..., FaultServer]) -> None:
    server = serve(whole(frames_of({"c": torch.arange(7)})), cut(reply(BODY), len(BODY) - 1))
    kept = remote(server.address, "c", torch.arange(7)).to_local()
    check_failure(server.address)
    assert torch.equal(kept, torch.arange(7))
    check_success(server)


def test_shards_that_came_before_the_fault_are_cached(serve: Callable[..., FaultServer]) -> None:
    large = {name: torch.full((50_000,), number) for number, name in enumerate("abc")}  # 400,000 bytes each
    server = serve(cut(frames_of(large), len(frame(large)) - 600_000), hanging_up)
    handles = [remote(server.address, name, tensor) for name, tensor in large.items()]
    with pytest.raises(FetchError, match=r"after 3 attempts.*\[2 of 3 shards failed: 'b', 'c'; the others are cached"):
        RTensor.localize(handles)
    assert gauges()["num_entries"] == 1
    assert gauges()["device_bytes"] == 400_384
    server.script = [whole(frames_of(large))]
    assert all(map(same_bits, RTensor.localize(handles), large.values()))
    assert server.wanted[-1] == ["b", "c"]


def test_a_missing_shard_is_named_and_the_other_is_cached(serve: Callable[..., FaultServer]) -> None:
    server = serve(whole(frames_of({"b": PAIR["b"]})))
    with pytest.raises(
        FetchError, match=f"Failed to fetch shard a from {server.address}: the owner does not"
    ) as caught:
        RTensor.localize(pair(server.address))
    assert list(caught.value.failures) == ["a"]
    assert buffer_stats()["num_entries"] == 1
    check_success(server)
    assert server.wanted == [["a", "b"], ["b"], ["a"]]


def test_a_handle_whose_address_is_no_text_fails_alone(serve: Callable[..., FaultServer]) -> None:
    server = serve(whole(frames_of({"a": PAIR["a"]})))
    wrong: Any = 7
    with pytest.raises(FetchError, match="expected string") as caught:
        RTensor.localize([remote(server.address, "a", PAIR["a"]), remote(wrong, "b", PAIR["b"])])
    assert list(caught.value.failures) == ["b"]
    assert buffer_stats()["num_entries"] == 1
    check_success(server)


def test_an_owner_that_vanishes_and_comes_back_empty(serve: Callable[..., FaultServer]) -> None:
    first = serve(whole(frames_of(PAIR)))
    remote(first.address, "a", PAIR["a"]).to_local()
    first.close()
    with pytest.raises(FetchError, match=r"after 3 attempts\. Last error: ConnectionRefusedError.*'b'"):
        RTensor.localize(pair(first.address))
    with FaultServer(whole(frames_of({})), port=first.port):
        with pytest.raises(FetchError, match=f"Failed to fetch shard b from {first.address}"):
            RTensor.localize(pair(first.address))
        assert same_bits(remote(first.address, "a", PAIR["a"]).to_local(), PAIR["a"])


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"junk", "application/json"),
        (b'{"type":"tensor","data":null,"shape":[2],"dtype":"torch.float32"}', "application/json"),
        (b'{"type":"tensor","data":"AAAA","shape":[-2],"dtype":"torch.float32"}', "application/json"),
        (
            b'{"type":"tensor","data":"AAAA","shape":[4611686018427387904,4],"dtype":"torch.float32"}',
            "application/json",
        ),
        (b"[" * 100_000, "application/json"),
        (b"junk", CONTENT_TYPE),
        (frame({"another": PAIR["a"]}), CONTENT_TYPE),
        (frame(PAIR), CONTENT_TYPE),
    ],
    ids=["junk", "no data", "negative", "overflow", "deep", "no frame", "another's", "two"],
)
def test_junk_that_was_put_is_not_kept(body: bytes, content_type: str) -> None:
    owner = FakeOwner()
    with rpc_server.start(owner=owner) as server:
        connection = http.client.HTTPConnection(server.address, timeout=30)
        connection.request("PUT", "/data/a", body, {"Content-Type": content_type})
        assert connection.getresponse().status == 400
        connection.close()
        assert len(owner.store) == 0
        check_failure(server.address)
        owner.store.update(PAIR)
        assert same_bits(RTensor.localize(pair(server.address))[0], PAIR["a"])


def test_a_wrong_token_opens_nothing() -> None:
    owner = FakeOwner()
    owner.store.update(PAIR)
    with rpc_server.start(owner=owner, token="s3cret") as server:
        check_failure(server.address)
        backend = HttpRTensorBackend(token="s3cret")
        set_backend(backend)
        assert same_bits(RTensor.localize(pair(server.address))[0], PAIR["a"])
        set_backend(None)
        backend.close()


@pytest.mark.parametrize("address", ["node-7", "node-7:port", ""])
def test_an_address_that_is_none_is_named(address: str) -> None:
    check_failure(address)
