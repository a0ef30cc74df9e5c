"""Leased tensors die, by garbage collection, inside the critical sections of the data plane: nothing hangs."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import threading
from pathlib import Path

import pytest
import torch

from gpu_cache import CacheConfig, FetchError, TensorCache
from gpu_cache.device.host import HostDevice
from gpu_cache.rpc import clearing, node_cache, runtime, segments, store
from gpu_cache.rpc.client import connection, memory, pool, ray_objects
from gpu_cache.rpc.client.http import Checked
from gpu_cache.rpc.rtensor import HttpRTensorBackend, RTensor, clear_fetch_buffer, set_backend
from gpu_cache.rpc.server import expiry, requests, same_host
from gpu_cache.rpc.server import main as rpc_server
from gpu_cache.rpc.shard import ShardUnreachableError
from gpu_cache.rpc.store import ShardStore
from gpu_cache.rpc.wire.records import MEMORY_HEADER, announced
from tests.support.areal_fixtures import delete, remote
from tests.support.fake_owner import FakeOwner
from tests.support.interleave_actors import in_background
from tests.support.interleave_garbage import CollectingLock, Garbage, critical_sections
from tests.support.interleave_stage import eventually
from tests.support.sources import DictSource
from tests.support.wire_tensors import same_bits

pytestmark = pytest.mark.usefixtures("quick_collections")

DEADLOCK_S = 60.0
SPARE = {f"spare-{n}": torch.ones(1) for n in range(600)}


@pytest.fixture
def garbage(monkeypatch: pytest.MonkeyPatch) -> Garbage:
    """Garbage that locks collect if they are made from here on."""
    garbage = Garbage()
    modules = runtime, store, clearing, expiry, requests, connection, pool, segments, memory, same_host, node_cache
    for module in modules:
        monkeypatch.setattr(module, "threading", garbage.threading())
    for module in (runtime, ray_objects):
        monkeypatch.setattr(module, "_lock", CollectingLock(module._lock, garbage))
    donor = TensorCache(CacheConfig(slab_bytes="1MiB", pool_bytes="1MiB"), device=HostDevice())
    garbage.stock += donor.get_many(list(SPARE), DictSource(SPARE))
    donor.clear()
    return garbage


def use_everything(garbage: Garbage, folder: Path) -> None:
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
        backend._connections.make_room(pool.Place())
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
    share_memory(garbage)
    offer_memory(own)
    keep_for_the_host(folder / "node-cache")
    hold_an_object_of_ray()


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


def share_memory(garbage: Garbage) -> None:
    """Read an owner's shards from its memory, over HTTP where that is out of reach, and give every byte back."""
    owner, backend = FakeOwner(), HttpRTensorBackend(same_host=True)
    stock_ranges(owner.store, garbage)
    set_backend(backend)
    with rpc_server.start(owner=owner) as server, contextlib.closing(backend):
        read_back(owner.store, server.address, "over HTTP")
        for name in ("in a new segment", "in a known one"):
            read_back(owner.store, server.address, name)
            assert transport(server.address) == "shm"
        assert backend.memories is not None
        assert backend.memories.stats()["segments"] == 1
        backend._nodes[server.address].memory = announced("/there-is-no-such-socket")
        read_back(owner.store, server.address, "out of reach")
        assert transport(server.address) == "http"
        lack_pages(owner.store)
    assert backend.memories.stats() == {"owners": 0, "segments": 0, "mapped_bytes": 0}
    set_backend(None)
    del garbage.stock[1::2]  # the ranges that are left
    give_back(owner.store)


def stock_ranges(store: ShardStore, garbage: Garbage) -> None:
    """Let ranges of shared memory die in turn with leased tensors: every second one in stock."""
    ranges = store.copies([torch.ones(1)] * len(garbage.stock))
    garbage.stock[:] = [one for pair in zip(garbage.stock, ranges, strict=False) for one in pair]


def read_back(store: ShardStore, address: str, name: str) -> None:
    """Store a shard, and localize it."""
    (copy,) = store.copies([torch.arange(5)])
    store.put(name, copy)
    assert same_bits(RTensor.localize(remote(address, name, copy)), torch.arange(5))


def transport(address: str) -> object:
    """How the latest answer of an owner came."""
    return runtime.current().cache._index.report()["sources"][address]["transport"]


def lack_pages(store: ShardStore) -> None:
    """Store a shard for which the system has no shared pages."""
    before = store.segments.stats()["shared_bytes"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(segments, "advise", lambda *_: errno.ENOMEM)
        store.put("plain", *store.copies([torch.ones(1 << 20)]))
    assert store.segments.stats()["shared_bytes"] <= before, "the range was given back"


def give_back(store: ShardStore) -> None:
    """Drop every shard of a store, and give all of its memory back."""
    store.clear()
    eventually(lambda: not store.segments.stats()["shared_bytes"])
    store.segments.trim()
    assert repr(store.segments) == "Segments(0 of 0 bytes in use, 0 segments)"


def offer_memory(own: ShardStore) -> None:
    """Serve memory beside an HTTP server that is not ours."""
    offer = same_host.Offer("another")
    server = offer.server()
    assert server is not None
    assert offer.server() is server
    assert server.path in same_host.headers(server)[MEMORY_HEADER]
    give_back(own)


def keep_for_the_host(path: Path) -> None:
    """Read shards by way of a node cache, whose owner then does not say what it has cleared."""
    owner, backend = FakeOwner(), HttpRTensorBackend(same_host=True, node_cache=str(path))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(segments.VARIABLE, "0")
        patched.setattr(node_cache, "_MAX_FORGOTTEN", 0)
        with rpc_server.start(owner=owner) as server, node_cache.Running(path, 8 << 20) as running:
            set_backend(backend)
            for name in "ab":
                read_back(owner.store, server.address, name)
                assert transport(server.address) == "node cache"
            told, forget = list[None](), running.cache.forget
            patched.setattr(running.cache, "forget", lambda shard_ids: told.append(forget(shard_ids)))
            clear_fetch_buffer(["a"])
            eventually(lambda: len(told) > 0)
            patched.setattr(running.cache, "_drop_gone", unreachable)
            with pytest.raises(ShardUnreachableError):
                running.cache._sweep(server.address, Checked("another", "1", "", {}))
            patched.setattr(node_cache, "_MAX_UNDER_WAY", 0)  # it leaves what it is asked for to the owner
            read_back(owner.store, server.address, "c")
            backend.close()
    set_backend(None)


def unreachable(address: str) -> None:
    raise ShardUnreachableError(address)


def hold_an_object_of_ray() -> None:
    """Have a handle of one of its shards, and clear that."""
    info = ray_objects.info_of(ray_objects.Sent("ray:object", object(), 2), 1)
    assert ray_objects.clear([info.shard_id]) == (1, [])


def test_tensors_die_in_every_critical_section_of_the_data_plane(garbage: Garbage, tmp_path: Path) -> None:
    in_background(lambda: use_everything(garbage, tmp_path)).result(DEADLOCK_S)
    assert garbage.stock, "there was always one to die"
    never = critical_sections("gpu_cache/rpc") - {place for place, count in garbage.collected.items() if count}
    assert not never, "nothing died there"
    garbage.stock.clear()
