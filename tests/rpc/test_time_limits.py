"""Time limits: none is a wish that works, in every kind of wait; what is no time is refused by name."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from gpu_cache import CacheConfig, TensorCache
from gpu_cache.config import LONGEST_S, seconds
from gpu_cache.device.host import HostDevice
from gpu_cache.rpc import runtime
from gpu_cache.rpc.clearing import StepClearer
from gpu_cache.rpc.rtensor import RTensor, set_backend
from gpu_cache.rpc.server import main as rpc_server
from gpu_cache.rpc.server.expiry import parse_seconds
from gpu_cache.smi.options import parse
from tests.support.areal_fixtures import fault_servers, remote
from tests.support.fake_owner import FakeOwner
from tests.support.fault_server import FaultServer, frames_of, hanging_up, whole
from tests.support.interleave_actors import in_background
from tests.support.interleave_stage import eventually
from tests.support.sources import DictSource, gated
from tests.support.users_backend import UsersBackend, handle

UNLIMITED = [math.inf, 1e10, 1e300]
NO_TIMES = [math.nan, -1, -math.inf, "soon"]
SHARDS = {"a": torch.arange(5), "b": torch.ones(7)}
LONG_S = 60.0


@pytest.mark.parametrize("limit_s", [*UNLIMITED, "inf", "Infinity"])
def test_no_limit_is_a_time_that_every_wait_takes(limit_s: Any) -> None:
    assert seconds(limit_s) == LONGEST_S
    assert CacheConfig(fetch_timeout_s=limit_s).fetch_timeout_s == LONGEST_S
    assert CacheConfig.from_env({"GPU_CACHE_FETCH_TIMEOUT_S": str(limit_s)}).fetch_timeout_s == LONGEST_S
    assert parse_seconds(limit_s) == LONGEST_S
    assert StepClearer(limit_s).timeout_s == LONGEST_S


@pytest.fixture
def serve() -> Iterator[Callable[..., FaultServer]]:
    runtime.configure(CacheConfig(device="cpu"))
    with fault_servers() as start:
        yield start


@pytest.mark.parametrize("limit_s", UNLIMITED)
def test_shards_come_over_http_without_a_limit(serve: Callable[..., FaultServer], limit_s: float) -> None:
    server = serve(hanging_up, whole(frames_of(SHARDS)))
    handles = [remote(server.address, key, tensor) for key, tensor in SHARDS.items()]
    assert RTensor.prefetch(handles[:1], timeout_s=limit_s).result(LONG_S) == 1
    found = RTensor.localize(handles, timeout_s=limit_s)
    assert all(map(torch.equal, found, SHARDS.values()))
    assert torch.equal(remote(server.address, "b", SHARDS["b"]).to_local(timeout_s=limit_s), SHARDS["b"])


@pytest.mark.parametrize("limit_s", UNLIMITED)
def test_the_setting_and_a_users_backend_take_no_limit(limit_s: float) -> None:
    runtime.configure(device="cpu", fetch_timeout_s=limit_s)
    set_backend(UsersBackend())
    assert handle(3).to_local().tolist() == [3.0] * 4


@pytest.mark.parametrize("scarce", ["staging_slots", "max_inflight_bytes"])
def test_turns_staging_buffers_joins_and_puts_are_waited_for_without_a_limit(scarce: str) -> None:
    config = CacheConfig(staging_slot_bytes="4KiB", run_bytes="4KiB", **{scarce: 512 if "bytes" in scarce else 1})
    cache, source, quick = TensorCache(config, device=HostDevice(stages=True)), DictSource(SHARDS), DictSource(SHARDS)
    readers = gated(source)
    fetches = [in_background(lambda: cache.get_many(["a"], source, timeout_s=math.inf))]
    eventually(lambda: readers and readers[0].has_arrived.is_set())
    fetches += [
        in_background(lambda: cache.get_many(["a"], quick, timeout_s=math.inf)),
        in_background(lambda: cache.get_many(["b"], quick, timeout_s=1e10)),
        in_background(lambda: cache.put("c", torch.ones(3), timeout_s=math.inf)),
    ]
    eventually(lambda: len(cache._tasks) == 3)
    readers[0].gate.set()
    assert [fetch.result(LONG_S) is not None for fetch in fetches] == [True] * 4
    assert cache.get_many(["a", "b", "c"], quick)[2].tolist() == [1.0] * 3


def test_a_clear_has_no_limit() -> None:
    owner = FakeOwner()
    owner.store.put("a", SHARDS["a"])
    with rpc_server.start(owner=owner, shard_ttl_s=math.inf) as server:
        obj = remote(server.address, "a", SHARDS["a"])
        report = asyncio.run(RTensor.clear_everywhere(obj, clearer=StepClearer(math.inf)))
    assert report.is_complete
    assert len(owner.store) == 0


@pytest.mark.parametrize("limit_s", NO_TIMES)
def test_a_value_that_is_no_time_is_refused_by_name(limit_s: Any) -> None:
    cache, source = TensorCache(CacheConfig(device="cpu")), DictSource(SHARDS)
    told = rf"timeout_s={limit_s!r}: must be a number of seconds, at least 0; math.inf means no limit"
    calls: list[Callable[[], object]] = [
        lambda: cache.get_many(["a"], source, timeout_s=limit_s),
        lambda: cache.prefetch(["a"], source, timeout_s=limit_s),
        lambda: cache.put("a", torch.ones(1), timeout_s=limit_s),
        lambda: StepClearer(limit_s),
        lambda: RTensor.localize([remote("node-a:1", "a", SHARDS["a"])], timeout_s=limit_s),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=told):
            call()
    with pytest.raises(ValueError, match=r"CacheConfig.fetch_timeout_s=.*at least 0.001"):
        CacheConfig(fetch_timeout_s=limit_s)
    assert len(cache) == 0
    assert source.asked == []


@pytest.mark.parametrize("text", ["nan", "-inf", "0.1", "soon"])
def test_the_tool_refuses_a_bad_interval(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse([f"--loop={text}"])
    assert "is no number of seconds, 0.25 or more" in capsys.readouterr().err
