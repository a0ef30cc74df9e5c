"""The Ray backend over a Ray that is a dict."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from gpu_cache import FetchError, FetchTimeoutError
from gpu_cache.rpc import runtime
from gpu_cache.rpc.client.backend import RTensorBackend
from gpu_cache.rpc.client.ray import RayRTensorBackend
from gpu_cache.rpc.rtensor import HttpRTensorBackend, RTensor, TensorShardInfo, buffer_stats, get_backend, set_backend
from tests.support.wire_tensors import patterned, same_bits


class ObjectRef:
    """Opaque, as Ray's: hashable by identity, in no way a string."""


class FakeRay(ModuleType):
    def __init__(self, *, is_initialized: bool = True) -> None:
        super().__init__("ray")
        self.objects: dict[ObjectRef, Any] = {}
        self.asked: list[Any] = []
        self.timeouts: list[Any] = []
        error = type("RayError", (Exception,), {})
        self.exceptions = SimpleNamespace(
            RayError=error,
            ObjectLostError=type("ObjectLostError", (error,), {}),
            GetTimeoutError=type("GetTimeoutError", (error, TimeoutError), {}),
        )
        self.internal = SimpleNamespace(free=self._free)
        self.is_initialized = lambda: is_initialized

    def put(self, value: Any) -> ObjectRef:
        ref = ObjectRef()
        self.objects[ref] = value
        return ref

    def get(self, refs: Any, timeout: float | None = None) -> Any:
        self.asked.append(refs)
        self.timeouts.append(timeout)
        return [self._get(ref) for ref in refs] if isinstance(refs, list) else self._get(refs)

    def _get(self, ref: ObjectRef) -> Any:
        if ref not in self.objects:
            raise self.exceptions.ObjectLostError(f"{ref} is lost")
        return self.objects[ref]

    def _free(self, refs: Sequence[ObjectRef]) -> None:
        for ref in refs:
            self.objects.pop(ref, None)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    """Imported and initialised, as far as anybody can tell."""
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    return fake


def as_remote(obj: Any) -> Any:
    """The handles as another process has them."""
    return [RTensor(handle.shard, handle.data.to("meta")) for handle in obj]


def test_where_ray_is_initialised_it_is_used(ray: FakeRay) -> None:
    assert isinstance(get_backend(), RayRTensorBackend)
    assert isinstance(get_backend(), RTensorBackend)


def test_the_choice_is_made_once(ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = get_backend()
    monkeypatch.setitem(sys.modules, "ray", FakeRay(is_initialized=False))
    assert get_backend() is backend
    set_backend(None)
    assert isinstance(get_backend(), HttpRTensorBackend)


def test_ray_is_never_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # importing it would fail
    assert isinstance(get_backend(), HttpRTensorBackend)


def test_without_ray_the_backend_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError):
        RayRTensorBackend()


def test_a_batch_goes_round(ray: FakeRay) -> None:
    tensors = [patterned(torch.float32, 3, 4), torch.empty(0, 2), patterned(torch.bfloat16), torch.arange(6)[::2]]
    handles = RTensor.remotize(tensors, "")
    assert all(isinstance(handle.shard.shard_id, ObjectRef) for handle in handles)
    assert all(handle.shard.node_addr == "" for handle in handles)
    localized = RTensor.localize(as_remote([*handles, handles[0]]))
    assert all(same_bits(got, want) for got, want in zip(localized, [*tensors, tensors[0]], strict=True))
    assert ray.asked == [[handle.shard.shard_id for handle in handles]]
    RTensor.localize(as_remote(handles))
    assert len(ray.asked) == 1


@pytest.mark.parametrize("tensor", [torch.eye(2).to_sparse(), torch.empty(2, device="meta")])
def test_a_tensor_that_others_could_not_use_is_not_put(ray: FakeRay, tensor: torch.Tensor) -> None:
    with pytest.raises(TypeError):
        get_backend().store(tensor)
    assert ray.objects == {}


def test_fetching_past_the_cache(ray: FakeRay) -> None:
    backend = get_backend()
    refs = [ray.put(torch.tensor([number])) for number in range(3)]
    assert [int(tensor) for tensor in backend.fetch([TensorShardInfo(ref, "") for ref in refs])] == [0, 1, 2]
    assert buffer_stats()["requested"] == 0


def test_a_lost_object_fails_alone(ray: FakeRay) -> None:
    handles = RTensor.remotize([torch.ones(2), torch.zeros(2), torch.ones(3)], "")
    lost = handles[1].shard.shard_id
    del ray.objects[lost]
    with pytest.raises(FetchError, match="is lost") as caught:
        RTensor.localize(as_remote(handles))
    assert list(caught.value.failures) == [lost]
    assert repr(lost) in str(caught.value)
    assert buffer_stats()["num_entries"] == 2
    assert torch.equal(RTensor.localize(as_remote(handles)[2]), torch.ones(3))


def test_clearing_frees_the_objects(ray: FakeRay) -> None:
    handles = RTensor.remotize([torch.ones(2), torch.zeros(2)], "")
    RTensor.localize(as_remote(handles))
    report = asyncio.run(RTensor.clear_everywhere(handles))
    assert report.is_complete
    assert report.owners[""]["cleared_count"] == 2
    assert ray.objects == {}
    assert buffer_stats()["num_entries"] == 0
    assert asyncio.run(RTensor.clear_node("", []))["cleared_count"] == 0
    assert runtime.current().store.stats()["num_tensors"] == 0


def test_an_id_that_is_no_reference_keeps_none_of_the_others(ray: FakeRay) -> None:
    handles = RTensor.remotize([torch.ones(2), torch.zeros(2)], "")
    ids = [handles[0].shard.shard_id, "no reference", handles[1].shard.shard_id]

    def free(refs: Sequence[Any]) -> None:
        if not all(isinstance(ref, ObjectRef) for ref in refs):
            raise TypeError("Attempting to call `free` on the value no reference")
        ray._free(refs)

    ray.internal.free = free
    with pytest.raises(FetchError, match=r"Failed to clear 1 of 3 shards in ray: TypeError\(.*no reference") as caught:
        asyncio.run(RTensor.clear_node("", ids))
    assert caught.value.shard_ids == ["no reference"]
    assert ray.objects == {}


def test_tensors_on_a_device_come_through_the_host(ray: FakeRay) -> None:
    """As Ray gives back what was put; the cache takes tensors from host memory only."""

    class Elsewhere(torch.Tensor):
        is_cpu = False

        def cpu(self) -> torch.Tensor:  # type: ignore[override]
            return torch.ones(4)

    ref = ray.put(torch.zeros(4).as_subclass(Elsewhere))
    handle = RTensor(TensorShardInfo(ref, ""), torch.empty(4, device="meta"))
    with pytest.raises(FetchError):
        RTensor.localize(RTensor(TensorShardInfo(ObjectRef(), ""), torch.empty(4, device="meta")))
    assert torch.equal(handle.to_local(), torch.ones(4))


def test_an_object_that_does_not_come_in_time_fails_alone(ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    handles = RTensor.remotize([torch.ones(2), torch.zeros(2)], "")
    late = handles[1].shard.shard_id

    def get(ref: ObjectRef, whole: Any = ray._get) -> Any:
        if ref is late:
            raise ray.exceptions.GetTimeoutError("not here yet")
        return whole(ref)

    monkeypatch.setattr(ray, "_get", get)
    with pytest.raises(FetchError) as caught:
        RTensor.localize(as_remote(handles), timeout_s=20)
    assert list(caught.value.failures) == [late]
    assert isinstance(caught.value.failures[late], FetchTimeoutError)
    assert all(0 < timeout < 20 for timeout in ray.timeouts)
    assert buffer_stats()["num_entries"] == 1
