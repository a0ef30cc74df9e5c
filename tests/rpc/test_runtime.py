"""The one runtime of a process: made once, replaced by `configure`, made afresh in a child."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_cache import CacheClosedError, CacheConfig, FetchError
from gpu_cache.rpc import runtime
from gpu_cache.rpc.client.backend import CallSource
from gpu_cache.rpc.client.http import HttpSource
from gpu_cache.rpc.rtensor import (
    HttpRTensorBackend,
    RTensor,
    buffer_stats,
    clear_fetch_buffer,
    get_backend,
    remove,
    set_backend,
    storage_stats,
    store,
)
from gpu_cache.rpc.server import main as rpc_server
from gpu_cache.rpc.server.main import ServerHandle
from tests.support.areal_fixtures import asked_once, delete, nothing_forgotten, remote
from tests.support.fake_owner import FakeOwner
from tests.support.fault_server import FaultServer, frames_of, whole
from tests.support.free_port import free_port
from tests.support.threads import run_threads


@pytest.fixture
def server() -> Iterator[ServerHandle]:
    """Of this process's own shards."""
    with rpc_server.start() as server:
        yield server


def test_concurrent_first_callers_make_one_runtime() -> None:
    found: list[runtime.Runtime] = []
    run_threads([lambda: found.append(runtime.current())] * 20)
    assert len(set(map(id, found))) == 1
    assert found[0] is runtime.current()


def test_it_allocates_nothing_before_the_first_use() -> None:
    assert buffer_stats()["device_reserved_bytes"] == 0
    assert runtime.current().cache.device_name == ""


def test_settings_come_from_variables_and_arguments_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_CACHE_SLAB_BYTES", "2MiB")
    monkeypatch.setenv("GPU_CACHE_DEVICE", "cuda:7")
    config = runtime.configure(device="cpu").cache.config
    assert (config.device, config.slab_bytes) == ("cpu", 2 << 20)
    assert runtime.configure(CacheConfig(slab_bytes="1MiB")).cache.config.slab_bytes == 1 << 20


def test_settings_that_make_no_sense_change_nothing() -> None:
    before = runtime.current().cache
    with pytest.raises(ValueError, match="slab_bytes"):
        runtime.configure(slab_bytes="much")
    with pytest.raises(ValueError, match="not both"):
        runtime.configure(CacheConfig(), device="cpu")
    assert runtime.current().cache is before


def test_configuring_starts_a_new_cache_and_keeps_the_rest(server: ServerHandle) -> None:
    handle = RTensor.remotize(torch.ones(3), server.address)
    tensor = handle.to_local()
    before, backend = runtime.current().cache, get_backend()
    runtime.configure(device="cpu")
    assert runtime.current().cache is not before
    assert (buffer_stats()["num_entries"], storage_stats()["num_tensors"]) == (0, 1)
    assert get_backend() is backend
    assert torch.equal(tensor, torch.ones(3))
    with pytest.raises(CacheClosedError):
        before.get("a")
    remote(server.address, handle.shard.shard_id, tensor).to_local()
    assert buffer_stats()["num_entries"] == 1


def test_a_server_from_before_evicts_from_the_new_cache(server: ServerHandle) -> None:
    runtime.configure(device="cpu")
    handle = RTensor.remotize(torch.ones(3), server.address)
    handle.to_local()
    other = HttpRTensorBackend()
    assert delete(other, server.address, handle.shard.shard_id)["cleared_count"] == 1
    other.close()
    assert (buffer_stats()["num_entries"], storage_stats()["num_tensors"]) == (0, 0)


def test_own_shards_are_read_without_a_request(server: ServerHandle, monkeypatch: pytest.MonkeyPatch) -> None:
    handles = RTensor.remotize({"a": torch.arange(9)[::2], "b": torch.empty(0, 2)}, server.address)
    monkeypatch.delattr(HttpSource, "open")
    tensors = RTensor.localize(handles)
    assert torch.equal(tensors["a"], torch.arange(9)[::2])
    assert tensors["b"].shape == (0, 2)
    tensors["a"].zero_()
    assert torch.equal(runtime.current().store[handles["a"].shard.shard_id], torch.arange(9)[::2]), "it is a copy"


def test_own_shards_that_are_gone_are_named(server: ServerHandle) -> None:
    handles = [remote(server.address, shard_id, torch.ones(3)) for shard_id in ("a", "b")]
    store("b", torch.ones(3))
    with pytest.raises(FetchError, match=f"Failed to fetch shard a from {server.address}") as caught:
        RTensor.localize(handles)
    assert list(caught.value.failures) == ["a"]
    assert torch.equal(handles[1].to_local(), torch.ones(3))


def test_own_and_remote_shards_come_together(server: ServerHandle) -> None:
    with FaultServer(whole(frames_of({"far": torch.zeros(3)}))) as other:
        store("near", torch.ones(3))
        near, far = remote(server.address, "near", torch.ones(3)), remote(other.address, "far", torch.ones(3))
        tensors = RTensor.localize([near, far])
        assert torch.equal(torch.stack(tensors), torch.stack([torch.ones(3), torch.zeros(3)]))
        assert other.wanted == [["far"]]


def test_the_address_of_a_stopped_server_is_no_own_address(server: ServerHandle) -> None:
    server.stop()
    assert runtime.current().own_addresses == set()
    store("a", torch.ones(3))
    with pytest.raises(FetchError, match="after 3 attempts"):
        remote(server.address, "a", torch.ones(3)).to_local()


def test_an_address_that_only_others_know_can_be_named() -> None:
    runtime.current().add_own_address("node-7.cluster:80")
    store("a", torch.ones(3))
    assert torch.equal(remote("node-7.cluster:80", "a", torch.ones(3)).to_local(), torch.ones(3))


def test_an_own_shard_may_live_on_a_device() -> None:
    class Elsewhere(torch.Tensor):
        is_cpu = False

        def cpu(self) -> torch.Tensor:  # type: ignore[override]
            return torch.ones(3)

    runtime.current().add_own_address("here:1")
    runtime.current().store.put("a", torch.zeros(3).as_subclass(Elsewhere))
    assert torch.equal(remote("here:1", "a", torch.ones(3)).to_local(), torch.ones(3))


def test_removing_an_own_shard_evicts_it(server: ServerHandle) -> None:
    handle = RTensor.remotize(torch.ones(3), server.address)
    handle.to_local()
    assert (remove(handle.shard.shard_id), remove(handle.shard.shard_id)) == (1, 0)
    assert buffer_stats()["num_entries"] == 0


def test_a_backend_that_was_chosen_here_is_closed_when_another_takes_its_place() -> None:
    with nothing_forgotten(), FaultServer(whole(frames_of({"a": torch.ones(3)}))) as server:
        backend = get_backend()
        assert isinstance(backend, HttpRTensorBackend)
        remote(server.address, "a", torch.ones(3)).to_local()
        set_backend(backend)
        connection = asked_once(server.address)
        backend._connections.release(connection)
        assert connection._sock is not None
        assert connection._sock.fileno() != -1
        set_backend(None)
        assert connection._sock.fileno() == -1


def test_a_backend_that_was_given_is_its_givers_to_close() -> None:
    with FaultServer(whole(frames_of({"a": torch.ones(3)}))) as server:
        backend = HttpRTensorBackend(max_shards_per_request=3)
        set_backend(backend)
        assert backend.shards is runtime.current().store
        remote(server.address, "a", torch.ones(3)).to_local()
        clear_fetch_buffer()
        set_backend(None)
        assert get_backend() is not backend
        set_backend(backend)
        remote(server.address, "a", torch.ones(3)).to_local()
        assert server.num_connections == 1
        backend.close()


def test_ids_that_cannot_be_ids_are_passed_over(server: ServerHandle) -> None:
    store("a", torch.ones(3))
    remote(server.address, "a", torch.ones(3)).to_local()
    ids: list[Any] = [["a"], {}, "a", None, 7]
    assert runtime.current().evict(ids) == 1


def test_closing_ends_the_cache_and_the_connections() -> None:
    with nothing_forgotten(), FaultServer(whole(frames_of({"a": torch.ones(3)}))) as server:
        current = runtime.current()
        remote(server.address, "a", torch.ones(3)).to_local()
        current.close()
        current.close()
        with pytest.raises(CacheClosedError):
            remote(server.address, "a", torch.ones(3)).to_local()


FORKING = """
    import os, sys, threading, warnings
    import torch
    from gpu_cache.rpc.server import main as rpc_server
    from gpu_cache.rpc import runtime
    from gpu_cache.rpc.rtensor import *
    from gpu_cache.rpc.rtensor import RTensor, TensorShardInfo
    import gpu_cache

    warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads, which is what this is about
    server = rpc_server.start()
    handle = RTensor.remotize(torch.arange(5.0), server.address)
    kept = handle.to_local()
    parent = runtime.current()

    def in_child(work):
        pid = os.fork()
        if not pid:
            try:
                work()
            except BaseException as error:
                print(type(error).__name__, error, file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0

    def child():
        current = runtime.current()
        assert current is not parent and current is runtime.current()
        assert current.cache.config.device == "cpu"
        assert storage_stats() == {"num_tensors": 0, "total_bytes": 0} and fetch_buffer_stats() == {"num_entries": 0}
        assert current.own_addresses == set()
        try:
            parent.cache.get("a")
            raise AssertionError("the parent's cache works in its child")
        except gpu_cache.CacheClosedError:
            pass
        assert torch.equal(kept, torch.arange(5.0))
        fresh = RTensor(TensorShardInfo(handle.shard.shard_id, server.address), torch.empty(5, device="meta"))
        assert torch.equal(fresh.to_local(), torch.arange(5.0))
        assert buffer_stats()["fetches"] == 1
        os.environ["GPU_CACHE_POOL_BYTES"] = "8MiB"
        assert runtime.configure(device="cpu").cache.config.pool_bytes == 8 << 20
        runtime.current().close()

    in_child(child)
    with runtime._lock, parent._lock, parent.store._lock:  # as a thread may hold them when another forks
        in_child(lambda: runtime.current().store.put("x", torch.ones(2)))
        in_child(lambda: get_backend())
    assert runtime.current() is parent
    assert torch.equal(RTensor(handle.shard, torch.empty(5, device="meta")).to_local(), torch.arange(5.0))
    server.stop()
    print("done")
"""


def test_a_forked_child_starts_afresh_on_the_host() -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(FORKING)]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


def test_clearing_everywhere_reaches_this_processs_own_server(server: ServerHandle) -> None:
    handles = RTensor.remotize([torch.ones(3), torch.ones(4)], server.address)
    RTensor.localize(handles)
    report = asyncio.run(RTensor.clear_everywhere(handles, [clear_fetch_buffer]))
    assert report.is_complete
    assert (buffer_stats()["num_entries"], storage_stats()["num_tensors"]) == (0, 0)


def test_an_owner_reads_what_it_remotized_without_a_request() -> None:
    port = free_port()  # no server answers there
    handle = RTensor.remotize(torch.arange(5.0), f"127.0.0.1:{port}")
    assert torch.equal(handle.to_local(), torch.arange(5.0))


def test_a_shard_that_is_not_here_is_asked_for_at_an_address_that_remotize_was_given() -> None:
    owner = FakeOwner()
    owner.store["there"] = torch.ones(3)
    with rpc_server.start(owner=owner) as server:
        here = RTensor.remotize(torch.zeros(3), server.address)
        there = remote(server.address, "there", torch.ones(3))
        assert [tensor.sum() for tensor in RTensor.localize([here, there])] == [0, 3]


def test_a_step_of_several_owners_is_one_clear_for_a_process_that_was_told() -> None:
    current = runtime.configure(device="cpu")
    source = CallSource("of the next step", lambda keys, _: [torch.ones(3) for _ in keys], {})
    current.cache.get_many(["first"], source)
    current.evict(["first"])
    before = current.cache.buffer_stats()["clears"]
    for owner in ("a:1", "b:2"):
        current.cache.get_many([f"shard of {owner}"], source)
        current.note_removal(owner)
    assert current.cache.buffer_stats()["clears"] == before
    current.note_removal("a:1")
    assert current.cache.buffer_stats()["clears"] == before + 1, "it was told of the first removal alone"
