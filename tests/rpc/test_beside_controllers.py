"""What AReaL's controllers do not do themselves: tell every consumer, say what a process is, want host memory."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_cache import TensorCache
from gpu_cache.device.placement import Placement
from gpu_cache.rpc import runtime
from gpu_cache.rpc.client.http import HttpRTensorBackend
from gpu_cache.rpc.rtensor import RTensor, buffer_stats, clear_fetch_buffer, fetch_buffer_stats, set_backend
from gpu_cache.rpc.server import main as rpc_server
from gpu_cache.rpc.server.main import ServerHandle
from gpu_cache.rpc.shard import answer_error
from tests.support.areal_fixtures import remote
from tests.support.cuda_devices import cuda_device
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_owner import FakeOwner
from tests.support.users_backend import UsersBackend
from tests.support.wire_tensors import same_bits


async def clear_together(*clears: tuple[str, list[str]]) -> None:
    await asyncio.gather(*(RTensor.clear_node(*clear) for clear in clears))


def test_clears_that_begin_together_tell_each_owner_of_all_shards(
    server: ServerHandle, owner: FakeOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, list[Any]] = {}

    async def note(backend: object, node_addr: str, shard_ids: list[Any]) -> None:
        told[node_addr] = shard_ids

    monkeypatch.setattr(HttpRTensorBackend, "delete", note)
    asyncio.run(clear_together(("a:1", ["x", "y"]), ("b:1", ["z"])))
    assert told == {"a:1": ["x", "y", "z"], "b:1": ["z", "x", "y"]}
    asyncio.run(clear_together(("a:1", ["w"])))
    assert told["a:1"] == ["w"], "a later step is another"
    monkeypatch.setattr("gpu_cache.rpc.clearing.MAX_IDS", 2)
    asyncio.run(clear_together(("a:1", ["x", "y"]), ("b:1", ["z"])))
    assert told == {"a:1": ["x", "y"], "b:1": ["z"]}, "a request has room for so many"


def test_an_owner_evicts_what_it_read_of_others(server: ServerHandle, owner: FakeOwner) -> None:
    owner.store.put("own", torch.ones(3))
    with rpc_server.start(owner=(other := FakeOwner())) as second:
        other.store.put("read", torch.ones(3))
        asyncio.run(clear_together((server.address, ["own"]), (second.address, ["read"])))
    assert (owner.evicted, other.evicted) == (["own", "read"], ["read", "own"])
    assert len(owner.store) == len(other.store) == 0


def test_a_users_backend_is_told_of_its_own_shards_only() -> None:
    set_backend(backend := UsersBackend())
    asyncio.run(clear_together(("a:1", ["x"]), ("b:1", ["z"])))
    assert sorted(backend.deleted) == [("a:1", ["x"]), ("b:1", ["z"])]


def read_step(server: ServerHandle, owner: FakeOwner, step: int) -> None:
    """Read a shard, which its owner removes at the end of the step."""
    owner.store.put(f"s{step}", torch.ones(10))
    remote(server.address, f"s{step}", torch.ones(10)).to_local()
    owner.store.remove([f"s{step}"])


def test_a_consumer_that_is_never_told_to_clear_shows_a_leak(server: ServerHandle, owner: FakeOwner) -> None:
    outlived = []
    for step in range(4):
        read_step(server, owner, step)
        outlived.append(buffer_stats()["outlived_entries"])
    assert outlived == [0, 0, 1, 2]
    assert fetch_buffer_stats() == {"num_entries": 4}
    assert buffer_stats()["clears"] == 3


def test_a_consumer_that_is_told_counts_its_own_clears(server: ServerHandle, owner: FakeOwner) -> None:
    for step in range(4):
        read_step(server, owner, step)
        clear_fetch_buffer([f"s{step}"])
    assert buffer_stats()["clears"] == 4
    assert buffer_stats()["outlived_entries"] == 0


def test_a_process_has_the_name_that_it_was_given_unless_a_setting_has_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    current = runtime.current()
    current.name_process("ref", 3)
    assert (current.cache.config.role, current.cache.config.rank) == ("ref", 3)
    assert runtime.configure(device="cpu").cache.config.role == "ref", "also after other settings"
    assert runtime.configure(role="mine").cache.config.role == "mine"
    monkeypatch.setenv("GPU_CACHE_ROLE", "variable")
    config = runtime.configure().cache.config
    assert (config.role, config.rank) == ("variable", 3)


def test_a_cache_in_use_is_not_given_up_for_a_name(server: ServerHandle, owner: FakeOwner) -> None:
    owner.store.put("a", torch.ones(3))
    remote(server.address, "a", torch.ones(3)).to_local()
    runtime.current().name_process("ref", 0)
    assert fetch_buffer_stats() == {"num_entries": 1}


@pytest.fixture
def on_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TensorCache:
    """This process's cache, on a fake GPU."""
    device = cuda_device(FakeCuda(), tmp_path)
    cache = TensorCache(device=device, broken=answer_error)
    monkeypatch.setattr(runtime.current(), "cache", cache)
    monkeypatch.setattr(runtime, "choose_device", lambda setting: Placement(device, "a fake"))
    return cache


def test_reads_that_want_host_memory_go_past_a_cache_on_a_device(
    server: ServerHandle, owner: FakeOwner, on_gpu: TensorCache
) -> None:
    owner.store.put("a", torch.arange(5.0))
    runtime.current().store.put("own", torch.arange(3))
    handles = [remote(server.address, "a", torch.ones(5)), remote("here:1", "own", torch.arange(3))]
    runtime.current().add_own_address("here:1")
    with runtime.host_reads():
        read, own = RTensor.localize(handles)
    assert same_bits(read, torch.arange(5.0))
    assert same_bits(own, torch.arange(3))
    assert (len(on_gpu), on_gpu.device_name) == (0, ""), "no device is asked for anything"
    remote(server.address, "a", torch.ones(5)).to_local()
    assert (len(on_gpu), on_gpu.device_name) == (1, "cuda:1")


def test_reads_that_want_host_memory_are_cached_where_the_cache_has_it(server: ServerHandle, owner: FakeOwner) -> None:
    owner.store.put("a", torch.arange(5.0))
    with runtime.host_reads():
        first = remote(server.address, "a", torch.ones(5)).to_local()
    assert remote(server.address, "a", torch.ones(5)).to_local().data_ptr() == first.data_ptr()
