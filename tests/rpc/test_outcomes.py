"""Calls of which some shards do not arrive: each is named in the error, and the others are cached."""

from __future__ import annotations

import logging
import pickle
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import pytest
import torch

from gpu_cache import CacheClosedError, FetchError, FetchTimeoutError
from gpu_cache.rpc import runtime
from gpu_cache.rpc.client import requester as http_requester
from gpu_cache.rpc.client.requester import NUM_TRIES, back_off_s
from gpu_cache.rpc.rtensor import (
    RTensor,
    ShardAnswerError,
    ShardFetchError,
    ShardMissingError,
    ShardRefusedError,
    ShardTimeoutError,
    ShardUnreachableError,
    buffer_stats,
    set_backend,
)
from gpu_cache.rpc.server import main as rpc_server
from gpu_cache.rpc.store import ShardStore
from gpu_cache.rpc.wire.frame import OwnedShard
from tests.support.areal_fixtures import http_backend, nothing_forgotten, remote, with_settings
from tests.support.bad_frames import BAD_FRAMES, PAIR
from tests.support.fake_owner import FakeOwner
from tests.support.fault_server import (
    FaultServer,
    Step,
    cut,
    dripping,
    frame,
    frames_of,
    hanging_up,
    refusal,
    reply,
    silent,
    whole,
)
from tests.support.interleave_stage import eventually
from tests.support.reading import reader_of
from tests.support.users_backend import UsersBackend, handle
from tests.support.wire_tensors import same_bits

BODY = frame(PAIR)


@pytest.fixture(autouse=True)
def on_the_host() -> None:
    runtime.configure(device="cpu", staging_slots=2, staging_slot_bytes="64KiB", run_bytes="64KiB")
    with_settings(http_backend(), retry_pause_s=0.0)


def pair(address: str) -> dict[str, RTensor]:
    return {shard_id: remote(address, shard_id, tensor) for shard_id, tensor in PAIR.items()}


def failed(*args: Any, **kwargs: Any) -> FetchError:
    """The error of `localize`, without the frames that led there."""
    with pytest.raises(FetchError) as caught:
        RTensor.localize(*args, **kwargs)
    return caught.value.with_traceback(None)


OUTCOMES: dict[str, tuple[Step, type[ShardFetchError], str]] = {
    "missing": (whole(frames_of({})), ShardMissingError, "missing"),
    "404": (whole(refusal(404)), ShardMissingError, "missing"),
    "400": (whole(refusal(400)), ShardRefusedError, "refused"),
    "401": (whole(refusal(401)), ShardRefusedError, "refused"),
    "413": (whole(refusal(413)), ShardRefusedError, "refused"),
    "500": (whole(refusal(500)), ShardAnswerError, "answer"),
    "302": (whole(refusal(302)), ShardAnswerError, "answer"),
    "broken frame": (whole(reply(next(iter(BAD_FRAMES.values())))), ShardAnswerError, "answer"),
    "broken JSON": (whole(reply(b"[7", content_type="application/json")), ShardAnswerError, "answer"),
    "too few": (whole(reply(b"[]", content_type="application/json")), ShardAnswerError, "answer"),
    "no HTTP": (whole(b"220 smtp.example.org ready\r\n"), ShardAnswerError, "answer"),
    "too many headers": (whole(b"HTTP/1.1 200 OK\r\n" + b"X: x\r\n" * 1000 + b"\r\n"), ShardAnswerError, "answer"),
    "hung up": (hanging_up, ShardUnreachableError, "connection"),
    "cut in the status line": (
        lambda exchange: (exchange.send(b"HTTP/1."), exchange.hang_up()),
        ShardUnreachableError,
        "connection",
    ),
    "cut in the headers": (
        lambda exchange: (exchange.send(reply(BODY)[:40]), exchange.hang_up()),
        ShardUnreachableError,
        "connection",
    ),
    "cut in the body": (cut(reply(BODY), 7), ShardUnreachableError, "connection"),
    "reset": (lambda exchange: exchange.reset(), ShardUnreachableError, "connection"),
}


@pytest.mark.parametrize(("step", "kind", "reason"), OUTCOMES.values(), ids=OUTCOMES)
def test_each_failure_has_its_type_and_its_word(
    serve: Callable[..., FaultServer], step: Step, kind: type[ShardFetchError], reason: str
) -> None:
    server = serve(step)
    failures = failed(pair(server.address)).failures
    assert [type(error) for error in failures.values()] == [kind, kind]
    (source,) = runtime.current().cache.source_stats().values()
    assert source["fetch_errors_by_reason"] == {reason: 2}
    again = pickle.loads(pickle.dumps(failures["a"]))
    assert (type(again), str(again), again.reason) == (kind, str(failures["a"]), reason)


@pytest.mark.parametrize("step", [silent, dripping(reply(BODY), len(reply(BODY)) - 20, every_s=60)])
def test_an_owner_that_is_too_slow_is_told_from_one_that_is_gone(serve: Callable[..., FaultServer], step: Step) -> None:
    server = serve(step)
    failures = failed(pair(server.address), timeout_s=0.2).failures
    assert all(isinstance(error, FetchTimeoutError) for error in failures.values())
    assert all(server.address in str(error) for error in failures.values())
    eventually(lambda: not runtime.current().cache._tasks)
    assert {count["fetch_errors_by_reason"]["timeout"] for count in runtime.current().cache.source_stats().values()}


@pytest.mark.parametrize("address", ["node-7", "node-7:port", "127.0.0.1:1"])
def test_an_address_without_a_server(address: str) -> None:
    failures = failed(pair(address)).failures
    assert all(type(error) is ShardUnreachableError for error in failures.values())


def test_every_time_out_is_a_fetch_time_out() -> None:
    assert issubclass(ShardTimeoutError, FetchTimeoutError)
    assert issubclass(ShardTimeoutError, ShardFetchError)


class CountingStore(ShardStore):
    """Notes what it is asked for, and lacks what a test says."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[list[Any]] = []

    def get_many(self, shard_ids: Iterable[Any]) -> tuple[list[tuple[Any, OwnedShard]], list[Any]]:
        self.asked.append(list(shard_ids))
        return super().get_many(self.asked[-1])


def test_arrived_shards_stay_and_a_retry_asks_for_the_rest_only() -> None:
    tensors = {f"s{number}": torch.full((1000,), number) for number in range(6)}
    owner = FakeOwner()
    store = owner.store = CountingStore()
    store.update({key: tensors[key] for key in ("s0", "s2", "s3", "s5")})
    with nothing_forgotten(), rpc_server.start(owner=owner) as server:
        handles = {key: remote(server.address, key, tensor) for key, tensor in tensors.items()}
        error = failed(handles)
        assert list(error.failures) == ["s1", "s4"]
        assert "2 of 6 shards failed: 's1', 's4'; the others are cached" in str(error)
        assert store.asked == [list(tensors), ["s0", "s2", "s3", "s5"]]
        assert all(tensor.data.is_meta for tensor in handles.values())
        store.update(tensors)
        localized = RTensor.localize(handles)
        assert store.asked[2:] == [["s1", "s4"]]
        assert all(same_bits(localized[key], tensors[key]) for key in tensors)
        runtime.current().close()


def test_a_shard_that_does_not_arrive_can_be_none(
    serve: Callable[..., FaultServer], caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = serve(whole(frames_of(PAIR))), serve(whole(frames_of({})))
    lost = remote(bad.address, "x", torch.ones(3))
    batch = {"there": pair(good.address), "lost": [lost, (lost, 7)], "plain": torch.ones(1)}
    with caplog.at_level(logging.WARNING):
        localized = RTensor.localize(batch, on_error="none")
    assert all(same_bits(localized["there"][key], PAIR[key]) for key in PAIR)
    assert localized["lost"] == [None, (None, 7)]
    assert localized["plain"] is batch["plain"]
    assert lost.data.is_meta
    (record,) = caplog.records
    assert f"Failed to fetch shard x from {bad.address}" in record.getMessage()
    assert "1 of 3 shards failed: 'x'" in record.getMessage()
    assert RTensor.localize(lost, on_error="none") is None
    bad.script = [whole(frames_of({"x": torch.ones(3)}))]
    assert torch.equal(RTensor.localize(batch, on_error="none")["lost"][0], torch.ones(3))
    assert len(good.asked) == 1


def test_repeated_keys_and_holes_go_together(serve: Callable[..., FaultServer]) -> None:
    server = serve(whole(frames_of({"a": PAIR["a"]})))
    handles = list(pair(server.address).values())
    source = runtime._HandleSource(runtime.current(), handles, {one.shard.shard_id: one.promise for one in handles})
    got = runtime.current().cache.get_many(["a", "b", "a"], source, on_error="none")
    assert got[1] is None
    assert got[0] is not got[2]
    assert same_bits(got[0], PAIR["a"])  # type: ignore[arg-type]


def test_a_caller_may_not_make_up_ways_to_fail() -> None:
    with pytest.raises(ValueError, match="on_error='ignore': must be 'raise' or 'none'"):
        RTensor.localize(handle(0), on_error="ignore")  # type: ignore[arg-type]


def test_a_closed_cache_is_never_a_hole() -> None:
    cache = runtime.current().cache
    cache.close()
    with pytest.raises(CacheClosedError):
        RTensor.localize(handle(0), on_error="none")


def test_pauses_between_tries_grow_and_differ(serve: Callable[..., FaultServer], monkeypatch: Any) -> None:
    server, pauses = serve(hanging_up), list[float]()
    reader = reader_of(server.address, ["a"], retry_pause_s=1.0)
    monkeypatch.setattr(reader._requester._cancelled, "wait", lambda pause_s: pauses.append(pause_s))
    monkeypatch.setattr(http_requester, "_chance", iter([0.25, 0.75, 0.5]).__next__)
    with pytest.raises(ShardUnreachableError, match=f"after {NUM_TRIES} attempts"):
        reader.next_specs()
    assert pauses == [0.75, 2.5]
    reader.close()
    assert back_off_s(0.1, 1, 0.0) == 0.05
    assert back_off_s(0.1, 3, 0.5) == 0.4


class StuckBackend(UsersBackend):
    """Its fetches hang until a test lets them go."""

    def __init__(self) -> None:
        super().__init__()
        self.go, self.num_returned = threading.Event(), 0

    def fetch(self, shards: list[Any]) -> list[torch.Tensor]:
        tensors = super().fetch(shards)
        assert self.go.wait(60)
        self.num_returned += 1
        return tensors


@pytest.fixture
def stuck() -> Iterator[StuckBackend]:
    backend = StuckBackend()
    set_backend(backend)
    yield backend
    backend.go.set()
    set_backend(None)


CALLS: dict[str, Callable[[], object]] = {
    "localize": lambda: RTensor.localize([handle(0), handle(1)], timeout_s=0.05),
    "to_local": lambda: handle(0).to_local(timeout_s=0.05),
    "prefetch": lambda: RTensor.prefetch([handle(0), handle(1)], timeout_s=0.05).result(60),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_backend_that_hangs_is_waited_for_no_longer_than_the_call_says(
    stuck: StuckBackend, call: Callable[[], object], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(FetchError) as caught:
        call()
    assert all(isinstance(error, FetchTimeoutError) for error in caught.value.failures.values())
    assert all("node-a:1" in str(error) for error in caught.value.failures.values())
    del caught
    eventually(lambda: not runtime.current().cache._tasks)
    assert stuck.num_returned == 0, "everything of ours has ended; the call has not"
    stuck.go.set()
    eventually(lambda: "areal-call" not in [thread.name for thread in threading.enumerate()])
    assert stuck.num_returned == 1
    assert (len(runtime.current().cache), caplog.records) == (0, []), "the late answer is dropped"
    assert torch.equal(handle(1).to_local(), torch.ones(2))
    assert buffer_stats()["device_bytes"] > 0


def test_closing_does_not_wait_for_a_backend_that_hangs(stuck: StuckBackend) -> None:
    future = RTensor.prefetch(handle(0))
    eventually(lambda: stuck.fetched)
    began = time.monotonic()
    runtime.current().cache.close()
    assert not runtime.current().cache._tasks
    assert time.monotonic() - began < 4, "its patience with reads that were cut off is 5 s"
    assert future.exception(60) is not None


def test_a_backends_error_is_the_outcome(stuck: StuckBackend) -> None:
    stuck.fault = LookupError("no such thing")
    failures: dict[Hashable, BaseException] = failed([handle(0)]).failures
    assert isinstance(failures["s0"], LookupError)
