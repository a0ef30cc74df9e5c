"""Leased tensors die, by garbage collection, inside the critical sections of the data plane: nothing hangs."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch

from gpu_cache import CacheConfig, FetchError, TensorCache
from gpu_cache.device.host import HostDevice
from gpu_cache.rpc import clearing, runtime, store
from gpu_cache.rpc.client import connection
from gpu_cache.rpc.rtensor import HttpRTensorBackend, RTensor, clear_fetch_buffer, set_backend
from gpu_cache.rpc.server import expiry, requests
from gpu_cache.rpc.server import main as rpc_server
from tests.support.areal_fixtures import delete, remote
from tests.support.fake_owner import FakeOwner
from tests.support.interleave_actors import in_background
from tests.support.interleave_garbage import CollectingLock, Garbage, critical_sections
from tests.support.sources import DictSource
from tests.support.wire_tensors import same_bits

pytestmark = pytest.mark.usefixtures("quick_collections")

DEADLOCK_S = 60.0
SPARE = {f"spare-{n}": torch.ones(1) for n in range(300)}


@pytest.fixture
def garbage(monkeypatch: pytest.MonkeyPatch) -> Garbage:
    """Garbage that locks collect if they are made from here on."""
    garbage = Garbage()
    for module in (runtime, store, clearing, expiry, requests, connection):
        monkeypatch.setattr(module, "threading", garbage.threading())
    monkeypatch.setattr(runtime, "_lock", CollectingLock(runtime._lock, garbage))
    donor = TensorCache(CacheConfig(slab_bytes="1MiB", pool_bytes="1MiB"), device=HostDevice())
    garbage.stock += donor.get_many(list(SPARE), DictSource(SPARE))
    donor.clear()
    return garbage


def use_everything() -> None:
    """Store, fetch from a server and from this process, lose a connection, clear, and start again."""
    owner, own = FakeOwner(), runtime.current().store
    with rpc_server.start(owner=owner) as server:
        owner.store.update({"a": torch.arange(5), "b": torch.ones(2)})
        handles = [remote(server.address, name, owner.store[name]) for name in "ab"]
        assert all(map(same_bits, RTensor.localize(handles), [torch.arange(5), torch.ones(2)]))
        clear_fetch_buffer()
        backend = HttpRTensorBackend()
        set_backend(backend)
        with pytest.raises(FetchError):
            RTensor.localize([remote(server.address, "x", torch.ones(1)), *handles])
        assert delete(backend, server.address, "a")["cleared_count"] == 1
        (reader,) = backend.source({"b": handles[1].shard}, {}).open(["b"], DEADLOCK_S)
        assert reader.next_specs()
        assert reader.num_received
        reader.cancel()
        reader.close()
        backend._connections.wake()
        backend._connections.make_room(connection.Place())
        backend._connections.forget(server.address)
        backend.close()
    set_backend(None)
    mine = RTensor.remotize({"x": torch.ones(3)}, "nowhere:1")
    shard_id = mine["x"].shard.shard_id
    assert shard_id in own
    assert list(own) == [shard_id]
    assert len(own) == own.stats()["num_tensors"] == 1
    assert torch.equal(own[shard_id], torch.ones(3))
    own.clear()
    own["old"] = torch.ones(3)
    assert expiry.ShardExpiry(own, -DEADLOCK_S, runtime.current().evict).sweep() == 1
    clear_in_vain()
    refuse_the_second(requests.Sending(1))


def refuse_the_second(sending: requests.Sending) -> None:
    """Of two answers at once."""
    place = sending.begin("first")
    with pytest.raises(requests.RefusedError):
        sending.begin("")
    sending.end(place, None, 0)
    assert sending.figures()["num_busy_refusals"] == 1


def clear_in_vain() -> None:
    """At a consumer that hangs."""
    clearer, is_over = clearing.StepClearer(timeout_s=0.05), threading.Event()
    handle = remote("127.0.0.1:1", "a", torch.ones(1))
    asyncio.run(RTensor.clear_everywhere(handle, [lambda ids: is_over.wait(DEADLOCK_S)], clearer=clearer))
    is_over.set()
    assert clearer.num_owed >= 1


def test_tensors_die_in_every_critical_section_of_the_data_plane(garbage: Garbage) -> None:
    in_background(use_everything).result(DEADLOCK_S)
    assert garbage.stock, "there was always one to die"
    never = critical_sections("gpu_cache/rpc") - {place for place, count in garbage.collected.items() if count}
    assert not never, "nothing died there"
    garbage.stock.clear()
