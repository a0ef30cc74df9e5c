"""The Ray backend over a real Ray of one node."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gpu_cache import CacheConfig, FetchError, FetchTimeoutError, TensorCache
from gpu_cache.device.host import HostDevice
from gpu_cache.rpc import rtensor, runtime
from gpu_cache.rpc.client import ray_objects
from gpu_cache.rpc.client.ray import RayRTensorBackend
from gpu_cache.rpc.rtensor import (
    HttpRTensorBackend,
    RTensor,
    ShardAnswerError,
    ShardFetchError,
    ShardMissingError,
    TensorShardInfo,
    buffer_stats,
    get_backend,
    set_backend,
)
from gpu_cache.rpc.wire.serialization import serialize_value
from tests.beside_ray.conftest import ROOT
from tests.support.ray_actors import AsyncWorker, Worker, every_tensor, remote
from tests.support.wire_tensors import patterned, raw_bytes, same_bits

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore:ComplexHalf support"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def worker(ray: Any) -> Any:
    return ray.remote(Worker).remote()


def clear(handles: Any, *consumers: Callable[[list[Any]], Any]) -> rtensor.ClearReport:
    return asyncio.run(RTensor.clear_everywhere(handles, consumers))


def pending_shard(ray: Any) -> tuple[Any, TensorShardInfo]:
    """A shard in an object that takes longer than any test, and its reference."""

    def make() -> None:
        time.sleep(60)

    pending = ray.remote(make).remote()
    return pending, placed("pending", pending)


def placed(name: str, ref: Any) -> TensorShardInfo:
    """The place of the first shard in an object of whatever kind."""
    place = TensorShardInfo(f"ray:{name}/0", "")
    place._object = ray_objects.RayObject(f"ray:{name}", ref, 1)
    return place


def is_readable(handles: list[RTensor]) -> bool:
    """Whether they can be fetched, again."""
    rtensor.clear_fetch_buffer()
    try:
        RTensor.localize(remote(handles))
    except FetchError:
        return False
    return True


def test_where_ray_is_initialised_it_is_used(ray: Any) -> None:
    assert isinstance(get_backend(), RayRTensorBackend)
    assert isinstance(get_backend(), rtensor.RTensorBackend)
    assert repr(get_backend()) == "RayRTensorBackend()"


@pytest.mark.parametrize("stages", [False, True], ids=["into the pool", "through staging"])
def test_every_dtype_and_shape_goes_round(ray: Any, nothing_stored: Callable[[], None], stages: bool) -> None:
    runtime.configure(device="cpu")
    if stages:
        config = CacheConfig(staging_slots=2, staging_slot_bytes="4MiB", run_bytes="1MiB")
        runtime.current().cache = TensorCache(config, device=HostDevice(stages=True))
    tensors = every_tensor()
    handles = RTensor.remotize({"all": tensors}, "me:1")["all"]
    assert len({handle.shard.shard_id.partition("/")[0] for handle in handles}) == 1, "one object for all"
    assert all(handle.shard.node_addr == "" for handle in handles)
    found = RTensor.localize(remote([*handles, handles[0]]))
    assert all(same_bits(one, other) for one, other in zip(found, [*tensors, tensors[0]], strict=True))
    assert buffer_stats()["num_entries"] == len(tensors)
    assert clear(handles).owners[""]["cleared_count"] == len(tensors)
    assert buffer_stats()["num_entries"] == 0
    nothing_stored()


def test_an_actor_reads_what_the_driver_stored(ray: Any, worker: Any, nothing_stored: Callable[[], None]) -> None:
    handles = RTensor.remotize(every_tensor(), "")
    assert ray.get(worker.read.remote(handles)) == [raw_bytes(tensor) for tensor in every_tensor()]
    clear(handles, lambda ids: ray.get(worker.clear.remote(ids)))
    assert ray.get(worker.sizes.remote()) == {"num_tensors": 0, "total_bytes": 0, "num_entries": 0}
    nothing_stored()


def test_the_driver_reads_what_an_actor_stored(ray: Any, worker: Any, nothing_stored: Callable[[], None]) -> None:
    handles = ray.get(worker.store_every.remote())
    found = RTensor.localize(handles)
    assert all(same_bits(one, other) for one, other in zip(found, every_tensor(), strict=True))
    clear(handles)
    nothing_stored()


def test_objects_go_with_their_last_handle(
    ray: Any, worker: Any, stored: Callable[[int], None], nothing_stored: Callable[[], None]
) -> None:
    handles = ray.get(worker.store.remote(3, 1 << 20))
    RTensor.localize(handles)
    kept = handles.pop()
    del handles
    stored(3 << 20)
    del kept
    nothing_stored()
    assert buffer_stats()["num_entries"] == 3, "what is cached keeps no object"


def test_an_object_goes_when_its_last_shard_is_cleared(
    ray: Any, worker: Any, stored: Callable[[int], None], nothing_stored: Callable[[], None]
) -> None:
    handles = ray.get(worker.store.remote(3, 1 << 20))
    clear(handles[:2])
    stored(3 << 20)
    assert RTensor.localize(handles[2]).tolist()[:2] == [2, 2]
    with pytest.raises(FetchError, match="it was cleared, here or before its handle was sent") as caught:
        RTensor.localize(remote(handles[:1]))
    assert isinstance(caught.value.__cause__, ShardMissingError)
    clear(handles[2])
    nothing_stored()


def test_the_clear_of_a_consumer_drops_what_its_handles_hold(
    ray: Any, worker: Any, nothing_stored: Callable[[], None]
) -> None:
    handles = ray.get(worker.store.remote(2, 1 << 20))
    ray.get(worker.read.remote(handles))  # which keeps them
    ids = rtensor.flatten_shard_ids(handles)
    assert ray.get(worker.clear.remote(ids)) == 2
    del handles
    nothing_stored()


def test_steps_leave_nothing_in_the_store(ray: Any, worker: Any, nothing_stored: Callable[[], None]) -> None:
    for step in range(5):
        handles = ray.get(worker.store.remote(100, 9000 + step))
        sums = [int(tensor.sum()) for tensor in RTensor.localize(handles)]
        assert sums == [number * (9000 + step) for number in range(100)]
        clear(handles, lambda ids: ray.get(worker.clear.remote(ids)))
        nothing_stored()
    assert buffer_stats()["num_entries"] == 0


def test_long_shards_are_arrays_of_their_own_in_objects_of_bounded_length(
    ray: Any, nothing_stored: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_objects, "ALONE_BYTES", 700_000)
    monkeypatch.setattr(ray_objects, "GROUP_BYTES", 2 << 20)
    sizes = [100, 1 << 20, 600_000, 700_000, 700_000, 700_000, 3 << 20, 5]
    tensors = [patterned(torch.uint8, size, seed=size) for size in sizes]
    tensors[4] = tensors[4].reshape(1000, 700).T  # has no bytes in one piece
    handles = RTensor.remotize(tensors, "")
    names = [handle.shard.shard_id.partition("/")[0] for handle in handles]
    assert [names.index(name) for name in names] == [0, 0, 0, 3, 3, 5, 6, 7]
    found = RTensor.localize(remote(handles))
    assert all(same_bits(one, other) for one, other in zip(found, tensors, strict=True))
    clear(handles)
    nothing_stored()
    assert runtime.current().trim() is True


def test_an_id_of_store_is_kept_until_it_is_deleted(
    ray: Any, stored: Callable[[int], None], nothing_stored: Callable[[], None]
) -> None:
    tensor = patterned(torch.float32, 1 << 18)
    backend = get_backend()
    shard_id = backend.store(tensor)
    assert json.loads(json.dumps(shard_id)) == shard_id
    stored(1 << 20)
    place = TensorShardInfo(shard_id, "")
    assert same_bits(backend.fetch([place, place])[1], tensor)
    assert buffer_stats()["requested"] == 0
    del place
    ids = [shard_id, "unknown", 7, [1], shard_id, shard_id + "x", shard_id[:-2]]
    assert asyncio.run(RTensor.clear_node("", ids))["cleared_count"] == 1
    nothing_stored()


def test_bad_tensors_store_nothing(ray: Any, nothing_stored: Callable[[], None]) -> None:
    for bad in (torch.eye(2).to_sparse(), torch.empty(2, device="meta")):
        with pytest.raises(TypeError):
            RTensor.remotize([torch.ones(1 << 18), bad], "")
        with pytest.raises(TypeError):
            get_backend().store(bad)
    nothing_stored()


def test_a_call_that_fails_half_way_stores_nothing(
    ray: Any, nothing_stored: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_objects, "GROUP_BYTES", 1 << 20)
    puts, put = [1, 2], ray.put

    def failing(value: Any) -> Any:
        if not puts:
            raise MemoryError
        puts.pop()
        return put(value)

    with monkeypatch.context() as patch:
        patch.setattr(ray, "put", failing)
        with pytest.raises(MemoryError):
            RTensor.remotize([torch.ones(1 << 18) for _ in range(3)], "")
    nothing_stored()


def test_handles_do_not_travel_but_by_rays_serializer(ray: Any) -> None:
    cloudpickle = __import__("ray.cloudpickle").cloudpickle
    handles = RTensor.remotize([torch.ones(3)], "")
    for dumps in (pickle.dumps, cloudpickle.dumps, serialize_value, rtensor.handle_to_json):
        value = handles[0] if dumps is rtensor.handle_to_json else handles
        with pytest.raises(TypeError, match=r"shard.* of ray:|shard ray:") as caught:
            dumps(value)
        assert "pass the handle to a method of an actor" in str(caught.value)
    assert RTensor.localize(remote(copy.deepcopy(handles)))[0].tolist() == [1, 1, 1]
    assert ray.get(ray.put(handles))[0].shard == handles[0].shard


def test_handles_stay_small(ray: Any) -> None:
    handles = RTensor.remotize([torch.ones(1000) for _ in range(100)], "")
    RTensor.localize(handles)
    context = ray._private.worker.global_worker.get_serialization_context()
    assert context.serialize(handles).total_bytes < 100 * 120
    assert all(handle.data.is_meta for handle in ray.get(ray.put(handles)))


def test_an_object_whose_owner_died_fails_with_a_reason(ray: Any) -> None:
    worker = ray.remote(Worker).remote()
    mine, lost = RTensor.remotize([torch.ones(2)], ""), ray.get(worker.store.remote(2, 1 << 20))
    os.kill(ray.get(worker.pid.remote()), signal.SIGKILL)
    deadline = time.monotonic() + 20
    while is_readable(lost):
        assert time.monotonic() < deadline
    with pytest.raises(FetchError) as caught:
        RTensor.localize(remote([*lost, *mine]))
    assert buffer_stats()["num_entries"] == 1
    assert RTensor.localize(remote(mine))[0].tolist() == [1, 1]
    assert set(caught.value.failures) == {one.shard.shard_id for one in lost}
    for key, error in caught.value.failures.items():
        assert isinstance(error, ShardMissingError)
        assert f"shard {key} from ray: OwnerDiedError: Failed to retrieve object" in str(error)


def test_a_pending_object_fails_alone(ray: Any) -> None:
    number = 3000
    handles = RTensor.remotize([torch.full((16,), float(one)) for one in range(number)], "")
    pending, late = pending_shard(ray)
    with pytest.raises(FetchError) as caught:
        RTensor.localize([*remote(handles), RTensor(late, torch.empty(1, device="meta"))], timeout_s=2)
    ray.cancel(pending, force=True)
    assert list(caught.value.failures) == ["ray:pending/0"]
    error = caught.value.failures["ray:pending/0"]
    assert isinstance(error, FetchTimeoutError)
    assert re.search(r"1 of 2 objects are not in this node's store within \d\.\d s$", str(error)), error
    assert buffer_stats()["num_entries"] == number


def test_a_fetch_that_is_given_up_ends_soon(ray: Any) -> None:
    pending, late = pending_shard(ray)
    reader = ray_objects.RayReader(ray, {"ray:pending/0": late}, {}, 60)
    reader.cancel()
    with pytest.raises(FetchError, match="the fetch was given up"):
        reader.next_specs()
    reader.close()
    ray.cancel(pending, force=True)


def test_a_coroutine_of_an_actor_reads_and_stores(ray: Any, nothing_stored: Callable[[], None]) -> None:
    worker = ray.remote(AsyncWorker).remote()
    handles = RTensor.remotize(every_tensor(), "")
    doubled = ray.get(worker.handed_on.remote(handles))
    clear(handles)
    found = RTensor.localize(doubled)
    assert all(same_bits(one, other) for one, other in zip(found, every_tensor(), strict=True))
    clear(doubled)
    ray.kill(worker)
    nothing_stored()


def test_a_prefetch_brings_shards(ray: Any, worker: Any) -> None:
    handles = ray.get(worker.store.remote(5, 1000))
    assert RTensor.prefetch(handles).result(60) == 5
    assert buffer_stats()["num_entries"] == 5


def test_what_was_stored_by_areals_own_backend_is_read(ray: Any) -> None:
    ref = ray.put(torch.arange(4))
    handle = RTensor(TensorShardInfo(ref, ""), torch.empty(4, dtype=torch.int64, device="meta"))
    assert RTensor.localize(handle).tolist() == [0, 1, 2, 3]
    assert asyncio.run(RTensor.clear_node("", [ref]))["cleared_count"] == 0


def test_a_shard_that_a_reader_wrote_into_is_read_again(ray: Any) -> None:
    (handle,) = RTensor.remotize([torch.arange(6)], "")
    RTensor.localize(remote([handle]))[0].zero_()
    assert RTensor.localize(remote([handle]))[0].tolist() == list(range(6))


def test_two_handles_that_disagree_get_what_each_promises_or_an_error(ray: Any) -> None:
    (right,) = RTensor.remotize([torch.zeros(6)], "")
    wrong = RTensor(right.shard, torch.ones(3, device="meta"))
    with pytest.raises(FetchError, match=r"of shape \[3\] is promised"):
        RTensor.localize([*remote([right]), wrong])
    assert right.to_local().tolist() == [0] * 6


@pytest.mark.parametrize("is_cached", [False, True], ids=["not cached", "cached"])
@pytest.mark.parametrize("wrong", [torch.ones(3), torch.ones(2, 3), torch.ones(6).double()], ids=str)
def test_a_handle_gets_nothing_but_what_it_promises(ray: Any, wrong: torch.Tensor, is_cached: bool) -> None:
    good, bad = RTensor.remotize([torch.zeros(6), torch.zeros(6)], "")
    if is_cached:
        RTensor.localize(remote([bad]))
    bad.data = wrong.to("meta")
    with pytest.raises(FetchError) as caught:
        RTensor.localize([bad, good])
    (error,) = caught.value.failures.values()
    assert isinstance(error, ShardAnswerError)
    assert f"{wrong.dtype} of shape {list(wrong.shape)} is promised" in str(error)
    assert good.to_local().tolist() == [0] * 6


def test_objects_of_others_are_no_shards(ray: Any) -> None:
    refs = {"number": ray.put(7), "raises": ray.put(_Raising())}
    for name, ref in refs.items():
        place = placed(name, ref)
        with pytest.raises(FetchError) as caught:
            RTensor.localize(RTensor(place, torch.empty(1, device="meta")))
        assert isinstance(caught.value.__cause__, ShardFetchError)
        assert f"shard ray:{name}/0 from ray: " in str(caught.value)


class _Raising:
    def __reduce__(self) -> Any:
        return _raise, ()


def _raise() -> None:
    raise ZeroDivisionError


def test_ids_of_http_are_told_from_rays(ray: Any) -> None:
    handle = RTensor(TensorShardInfo("uuid", "node-a:1"), torch.empty(1, device="meta"))
    with pytest.raises(FetchError, match="shard uuid from ray: it is not in Ray's object store; if node-a:1 serves it"):
        RTensor.localize(handle)
    (of_ray,) = RTensor.remotize([torch.ones(1)], "")
    set_backend(HttpRTensorBackend())
    with pytest.raises(FetchError, match=r"in Ray's object store, and the backend of this process is HTTP: call set_b"):
        RTensor.localize(remote([of_ray]))
    set_backend(None)
    assert RTensor.localize(remote([of_ray]))[0].tolist() == [1]


def test_an_id_that_came_as_text_says_so(ray: Any) -> None:
    handle = RTensor(TensorShardInfo("ray:00ff.1234/5", ""), torch.empty(1, device="meta"))
    with pytest.raises(FetchError, match=r"shard ray:00ff.1234/5 from ray: this process has no reference of its"):
        RTensor.localize(handle)


def test_restarts_children_and_tensors_without_a_copy() -> None:
    """A process that starts Ray twice, with its option for tensors; tests/beside_ray/program.py says what it does."""
    environ = os.environ | {"RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.beside_ray.program"]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["good"]), done.stdout + done.stderr
