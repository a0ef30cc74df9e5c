"""Shards in Ray's object store as a process without Ray knows them. With a real Ray: tests/beside_ray."""

from __future__ import annotations

import copy
import json
import pickle
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpu_cache import FetchError
from gpu_cache.rpc import runtime
from gpu_cache.rpc.client import ray_objects
from gpu_cache.rpc.client.ray import RayRTensorBackend
from gpu_cache.rpc.rtensor import (
    HttpRTensorBackend,
    RTensor,
    TensorShardInfo,
    clear_batches,
    get_backend,
    handle_to_json,
    set_backend,
)
from gpu_cache.rpc.wire.serialization import serialize_value
from gpu_cache.source import joined_places
from tests.support.wire_tensors import WIRE_DTYPES, raw_bytes

OF_RAY = "ray:00ff.1234/7"


def handle(shard_id: str = OF_RAY) -> RTensor:
    return RTensor(TensorShardInfo(shard_id, ""), torch.empty(2, device="meta"))


def test_without_ray_a_fetch_says_what_is_missing() -> None:
    for one in (handle(), [handle(), handle("ray:00ff.1234/8")]):
        with pytest.raises(FetchError, match=r"in Ray's object store.*Ray is not initialised here: call ray.init"):
            RTensor.localize(one)
    clear_batches([OF_RAY])


@pytest.mark.parametrize("dumps", [serialize_value, handle_to_json])
def test_rays_handles_have_no_text_form(dumps: object) -> None:
    with pytest.raises(
        TypeError, match=r"shard ray:00ff.1234/7 cannot be written as text.*pass the handle to a method"
    ):
        dumps(handle())  # type: ignore[operator]
    assert json.dumps(serialize_value(handle("another")))


def test_without_ray_the_backend_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # importing it would fail
    assert isinstance(get_backend(), HttpRTensorBackend)
    with pytest.raises(ImportError):
        RayRTensorBackend()


def test_nothing_is_stored_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    set_backend(RayRTensorBackend(SimpleNamespace()))
    with pytest.raises(RuntimeError, match="cannot store 1 shards in Ray's object store: Ray is not initialised"):
        RTensor.remotize(torch.ones(2), "")
    with pytest.raises(FetchError, match=f"shard {OF_RAY} from ray: Ray is not initialised in this process"):
        RTensor.localize(handle())


def test_the_choice_is_made_again_when_ray_is_shut_down(monkeypatch: pytest.MonkeyPatch) -> None:
    is_on = [True]
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: is_on[0]))
    first = get_backend()
    assert isinstance(first, RayRTensorBackend)
    assert get_backend() is first
    is_on[0] = False
    assert isinstance(get_backend(), HttpRTensorBackend)
    chosen = RayRTensorBackend()
    set_backend(chosen)
    assert get_backend() is chosen
    monkeypatch.setattr(runtime, "may_use_ray", False)
    set_backend(None)
    assert isinstance(get_backend(), HttpRTensorBackend)


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
def test_a_copy_of_a_cleared_handle_does_not_bring_its_shard_back() -> None:
    made = ray_objects.RayObject("ray:00aa.1", object(), 2)
    first, second = (ray_objects.info_of(made, number, "a:1") for number in range(2))
    ray_objects.clear([first.shard_id])
    assert copy.deepcopy(first)._object is made
    assert made.reference_for(0) is None
    copied = copy.deepcopy(second)
    assert (copied.shard_id, copied.node_addr) == ("ray:00aa.1/1", "a:1")
    assert made.reference_for(1) is made.ref is not None
    num_known, whole = ray_objects.clear([second.shard_id])
    assert (num_known, len(whole)) == (1, 1), "its last shard went, so the object may go"
    assert made.ref is None


def test_a_handle_that_arrives_after_the_clear_brings_its_shard_back() -> None:
    made = ray_objects.RayObject("ray:00aa.2", object(), 1)
    first = ray_objects.info_of(made, 0)
    ray_objects.clear([first.shard_id])
    again = ray_objects.Sent(made.name, object(), 1)
    assert ray_objects.info_of(again, 0)._object is made
    assert made.reference_for(0) is again.ref


def test_the_last_reference_to_an_object_goes_outside_the_lock() -> None:
    class Reference:
        def __del__(self) -> None:
            free.append(not ray_objects._lock.locked())

    free: list[bool] = []
    info = ray_objects.info_of(ray_objects.RayObject("ray:00aa.3", Reference(), 1), 0)
    ray_objects.clear([info.shard_id])
    assert free == [True]


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_a_pickled_handle_has_no_tensor_in_it() -> None:
    for dtype in WIRE_DTYPES:
        for shape in [(), (3,), (0, 2), (4, 1, 5)]:
            made = RTensor(TensorShardInfo("a", "node:1"), torch.empty(shape, dtype=dtype, device="meta"))
            text = pickle.dumps(made)
            assert b"_rebuild_meta_tensor_no_storage" in text
            back = pickle.loads(text)
            assert (back.data.dtype, back.data.shape, back.data.stride()) == (dtype, shape, made.data.stride())
            assert back.data.is_meta
            assert back.shard == made.shard


def test_short_shards_are_laid_side_by_side_and_long_ones_are_arrays_of_their_own() -> None:
    whole, long = ray_objects.GROUP_BYTES, ray_objects.ALONE_BYTES
    sizes = [1, 0, 513, long, long - 1, whole // 2, whole // 2, 7, 2 * whole, 9]
    tensors = [torch.empty(1, dtype=torch.uint8).expand(size) for size in sizes]
    groups = list(ray_objects.packed(tensors))
    together = [[tensor.nbytes for tensor in group.tensors] for group in groups]
    assert together == [sizes[:6], sizes[6:8], [2 * whole], [9]]
    assert groups[0].places == [(0, 0), (0, 512), (0, 512), (1, 0), (0, 1536), (2, 0)]
    alone = [[tensor.nbytes for tensor in group.alone] for group in groups]
    assert alone == [[long, whole // 2], [whole // 2], [2 * whole], []]
    assert [group.shared_bytes for group in groups] == [1536 + long, 512, 0, 512]
    assert list(ray_objects.packed([])) == []


def test_a_tensor_that_was_stored_may_be_resized_afterwards() -> None:
    tensor = torch.arange(ray_objects.ALONE_BYTES // 8)
    (group,) = ray_objects.packed([tensor, torch.ones(3)])
    stored: list[Any] = []

    def put(value: Any) -> Any:
        stored.append([array.tobytes() for array in value[-1]])
        return SimpleNamespace(hex=lambda: "00aa")

    ray_objects.Writer(SimpleNamespace(put=put))._put_group(group)
    assert stored[0][1] == raw_bytes(tensor)
    tensor.untyped_storage().resize_(0)  # as FSDP does


def test_neighbours_are_one_stretch() -> None:
    a, b = object(), object()
    listed = [(a, 0, 512), (a, 512, 100), (a, 1024, 50), (b, 0, 10), (b, 4096, 10)]
    places = [(0, 512), (512, 100), (1024, 50), (1536, 10), (2048, 10)]
    runs, number, start = joined_places(listed, 0, 0, places)
    assert runs == [(0, a, 0, 1074), (1536, b, 0, 10), (2048, b, 4096, 10)]
    assert (number, start) == (5, 0)
    runs, number, start = joined_places(listed, 0, 500, [(0, 12), (12, 40)])
    assert runs == [(0, a, 500, 52)]
    assert (number, start) == (1, 40)


def test_a_tensor_that_areals_backend_stored_on_a_device_comes_through_the_host() -> None:
    class Elsewhere(torch.Tensor):
        is_cpu = False

        def cpu(self) -> torch.Tensor:  # type: ignore[override]
            return torch.ones(4)

    dtypes, shapes, places, (array,) = ray_objects._parts(torch.zeros(4).as_subclass(Elsewhere))
    assert (dtypes, shapes, places) == (["float32"], [(4,)], [(0, 0)])
    assert array.tobytes() == torch.ones(4).numpy().tobytes()
