"""`remotize` stores every tensor of a container for others, or refuses and stores none."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gpu_cache.rpc import rtensor, runtime
from gpu_cache.rpc import store as store_module
from gpu_cache.rpc.client.http import HttpRTensorBackend
from gpu_cache.rpc.rtensor import RTensor, set_backend, storage_stats, store
from gpu_cache.rpc.store import ShardStore
from gpu_cache.rpc.wire.frame import OwnedShard
from gpu_cache.rpc.wire.serialization import serialize_value
from tests.support.users_backend import UsersBackend

Pair = namedtuple("Pair", "left right")
EYE = torch.eye(3)
NOTHING = {"num_tensors": 0, "total_bytes": 0}


def freed(kept_bytes: int = 0) -> torch.Tensor:
    tensor = torch.ones(30)[3::2]
    tensor.untyped_storage().resize_(kept_bytes)
    return tensor


class DTensor(torch.Tensor):
    """As PyTorch's: values of its own it has none."""

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), options: Any = None) -> Any:
        raise NotImplementedError(function)


def sharded() -> torch.Tensor:
    return torch.Tensor._make_wrapper_subclass(DTensor, (3, 3))  # type: ignore[no-any-return,attr-defined]


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(3)


UNFIT: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "sparse": (EYE.to_sparse, "only dense tensors travel, not torch.sparse_coo; call to_dense() first"),
    "csr": (EYE.to_sparse_csr, "only dense tensors travel, not torch.sparse_csr; call to_dense() first"),
    "mkldnn": (EYE.to_mkldnn, "only dense tensors travel, not torch._mkldnn; call to_dense() first"),
    "nested": (
        lambda: torch.nested.nested_tensor([EYE[0], EYE[0, :2]]),
        "only dense tensors travel, not nested ones; call to_padded_tensor() first",
    ),
    "jagged": (
        lambda: torch.nested.nested_tensor([EYE[0], EYE[0, :2]], layout=torch.jagged),
        "only dense tensors travel, not nested ones; call to_padded_tensor() first",
    ),
    "dtensor": (sharded, "only plain tensors travel, not DTensor; call full_tensor() first"),
    "fake": (fake, "only plain tensors travel, not FakeTensor; make a plain tensor of it first"),
    "quantized": (
        lambda: torch.quantize_per_tensor(EYE, 0.1, 0, torch.qint8),
        "tensors of torch.qint8 do not travel; call dequantize() first",
    ),
    "float4": (
        lambda: torch.empty(3, dtype=torch.float4_e2m1fn_x2),
        "tensors of torch.float4_e2m1fn_x2 do not travel; call view(torch.uint8) first",
    ),
    "bits8": (
        lambda: torch.empty(3, dtype=torch.bits8),
        "tensors of torch.bits8 do not travel; call view(torch.uint8) first",
    ),
    "uint4": (
        lambda: torch.empty(3, dtype=torch.uint4),
        "tensors of torch.uint4 do not travel; call view(torch.uint8) first",
    ),
    "freed": (
        freed,
        "the tensor's memory was given back, as FSDP does with a parameter between uses; gather it first",
    ),
    "cut": (
        lambda: freed(4 * 29),
        "the tensor's memory was given back, as FSDP does with a parameter between uses; gather it first",
    ),
    "functional": (
        lambda: torch._to_functional_tensor(EYE),  # type: ignore[attr-defined]
        "tensors inside torch.func (grad, vmap, jvp) do not travel; return it from the transformed function first",
    ),
    "uninitialized": (
        torch.nn.UninitializedParameter,
        "the parameter has no values yet; call its lazy module first",
    ),
    "meta": (lambda: EYE.to("meta"), "a meta tensor has no values; store one that has"),
}
unfit = pytest.mark.parametrize("name", UNFIT)


@unfit
@pytest.mark.filterwarnings("ignore")
def test_a_tensor_that_cannot_travel_is_refused_before_anything_is_stored(name: str) -> None:
    make, said = UNFIT[name]
    batch = {"ids": torch.ones(5), "mask": [EYE, {"deep": Pair(EYE, (make(), EYE))}], "after": make()}
    with pytest.raises(TypeError) as caught:
        RTensor.remotize(batch, "me:1")
    assert str(caught.value) == f"cannot remotize obj['mask'][1]['deep'].right[0]: {said} (nothing was stored)"
    with pytest.raises(TypeError) as caught:
        RTensor.remotize(make(), "me:1")
    assert str(caught.value) == f"cannot remotize obj: {said} (nothing was stored)"
    assert storage_stats() == NOTHING


@pytest.mark.parametrize("tensor", [torch.ones(30)[3::2], torch.ones(1).expand(9), torch.ones(4)[4:], torch.tensor(1)])
def test_a_storage_that_just_has_all_elements_travels(tensor: torch.Tensor) -> None:
    tensor = tensor.detach()
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    tensor.untyped_storage().resize_((tensor.storage_offset() + last + 1) * tensor.itemsize if tensor.numel() else 0)
    assert torch.equal(rtensor.fetch(RTensor.remotize(tensor, "me:1").shard.shard_id), tensor)


def test_a_mask_that_does_not_travel_is_refused_before_padding_is_trimmed() -> None:
    batch = {"input_ids": torch.ones(2, 5), "attention_mask": torch.ones(2, 5).to_sparse()}
    for _ in range(50):
        with pytest.raises(TypeError, match=r"cannot remotize obj\['attention_mask'\]: only dense tensors travel"):
            RTensor.remotize(batch, "me:1")
    assert storage_stats() == NOTHING


@unfit
@pytest.mark.filterwarnings("ignore")
def test_a_store_refuses_tensors_that_no_client_could_fetch(name: str) -> None:
    make, said = UNFIT[name]
    tensor, shards = make(), ShardStore()
    calls: list[Callable[[], object]] = [
        lambda: store("a", tensor),
        lambda: rtensor._storage.__setitem__("a", tensor),
        lambda: rtensor._store_local("a", tensor),
        lambda: HttpRTensorBackend(shards=shards).store(tensor),
    ]
    for call in calls:
        with pytest.raises(TypeError) as caught:
            call()
        assert str(caught.value) == said
    assert (storage_stats(), shards.stats()) == (NOTHING, NOTHING)


@unfit
@pytest.mark.filterwarnings("ignore")
def test_the_wire_says_the_same(name: str) -> None:
    make, said = UNFIT[name]
    if name == "meta":
        assert serialize_value(make())["data"] is None
        return
    with pytest.raises(TypeError) as caught:
        serialize_value({"x": make()})
    assert str(caught.value) == f"value['x']: {said}"


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_tensors_inside_a_transform_are_refused_and_those_around_it_are_stored(transform: Callable[..., Any]) -> None:
    def inside(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        with pytest.raises(TypeError, match=r"obj\['y'\]: tensors inside torch.func \(grad, vmap, jvp\) do not travel"):
            RTensor.remotize({"x": EYE, "y": y}, "me:1")
        RTensor.remotize(EYE, "me:1")
        return y.sum()

    transform(inside)(EYE)
    (kept,) = runtime.current().store.values()
    assert torch.equal(kept, EYE)


def test_plain_tensors_of_any_kind_are_stored() -> None:
    with torch.inference_mode():
        born_inside = torch.ones(3)
    batch = [
        EYE.t(), EYE[:, 1], EYE.expand(2, 3, 3), EYE.to(torch.complex64).conj(), torch.nn.Parameter(EYE), EYE[:0],
        torch.tensor(1), torch._efficientzerotensor(3), born_inside,
    ]  # fmt: skip
    for handle, tensor in zip(RTensor.remotize(batch, "me:1"), batch, strict=True):
        assert torch.equal(rtensor.fetch(handle.shard.shard_id), tensor.detach())


# A failure half-way.


class FullBackend(UsersBackend):
    """Has room for two tensors."""

    def store(self, tensor: torch.Tensor) -> Any:
        if len(self.tensors) == 10:
            raise MemoryError("full")
        return super().store(tensor)


BATCH = {"a": EYE, "b": [EYE, EYE, EYE]}


@pytest.fixture
def users() -> Iterator[FullBackend]:
    users = FullBackend()
    set_backend(users)
    yield users
    set_backend(None)


def test_tensors_stored_before_a_failure_are_deleted(users: FullBackend) -> None:
    with pytest.raises(MemoryError, match="full"):
        RTensor.remotize(BATCH, "me:1")
    assert users.deleted == [("me:1", ["user-8", "user-9"])]


def test_a_failure_inside_a_running_loop_is_cleaned_up_alike(users: FullBackend) -> None:
    async def scenario() -> None:
        with pytest.raises(MemoryError, match="full"):
            RTensor.remotize(BATCH, "me:1")

    asyncio.run(scenario())
    assert users.deleted == [("me:1", ["user-8", "user-9"])]


def test_a_deletion_that_fails_too_is_logged_and_hides_nothing(
    users: FullBackend, caplog: pytest.LogCaptureFixture
) -> None:
    users.fault = RuntimeError("gone")
    with pytest.raises(MemoryError, match="full"):
        RTensor.remotize(BATCH, "me:1")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "2 shards stay stored, as the call that had stored them failed and they could not be deleted: "
        "RuntimeError('gone')"
    )


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt()], ids=repr)
def test_a_replaced_method_of_our_backend_is_called_and_what_it_stored_is_taken_back(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = HttpRTensorBackend(shards=runtime.current().store)
    set_backend(backend)
    stored, num_left = backend.store, [2]

    def failing(tensor: torch.Tensor) -> Any:
        num_left[0] -= 1
        if num_left[0] < 0:
            raise error
        return stored(tensor)

    monkeypatch.setattr(type(backend), "store", lambda self, tensor: failing(tensor))
    with pytest.raises(type(error)):
        RTensor.remotize(BATCH, "me:1")
    assert storage_stats() == NOTHING
    assert gc.isenabled()
    set_backend(None)


class Picky(list[Any]):
    """A container that Ctrl-C keeps from taking handles, and that looks whether the collector is on."""

    def __setitem__(self, place: Any, items: Any) -> None:
        assert gc.isenabled()
        if any(isinstance(one, RTensor) for one in items):
            raise KeyboardInterrupt
        super().__setitem__(place, items)


def test_containers_are_built_outside_of_the_pause_and_one_that_is_not_completed_leaves_nothing() -> None:
    set_backend(HttpRTensorBackend(shards=runtime.current().store))
    with pytest.raises(KeyboardInterrupt):
        RTensor.remotize({"a": EYE, "b": Picky([EYE, EYE])}, "me:1")
    assert storage_stats() == NOTHING
    set_backend(None)


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt()], ids=repr)
def test_a_copy_that_fails_leaves_nothing(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[OwnedShard] = []
    copied = store_module.copied

    def copy(tensor: torch.Tensor, memory: object = None) -> OwnedShard:
        assert not gc.isenabled()  # thousands of handles would set off a collection of the whole process
        if len(copies) == 3:
            raise error
        copies.append(copied(tensor, memory))
        return copies[-1]

    monkeypatch.setattr(store_module, "copied", copy)
    with pytest.raises(type(error)):
        RTensor.remotize(BATCH, "me:1")
    assert (len(copies), storage_stats(), gc.isenabled()) == (3, NOTHING, True)


def test_a_users_backend_gets_copies_that_it_may_resize(users: FullBackend) -> None:
    handle = RTensor.remotize(EYE, "me:1")
    assert users.tensors[handle.shard.shard_id].resize_(100).shape == (100,)


def test_a_store_that_a_caller_replaced_in_one_backend_is_called() -> None:
    backend, seen = rtensor.get_backend(), list[torch.Tensor]()
    own = backend.store

    def watched(tensor: torch.Tensor) -> Any:
        seen.append(tensor)
        return own(tensor)

    backend.store = watched  # type: ignore[method-assign]
    handles = RTensor.remotize([EYE, EYE[:1]], "me:1")
    assert [rtensor.fetch(handle.shard.shard_id) for handle in handles] == seen
    assert len(seen) == 2


def test_containers_keep_their_classes() -> None:
    padded = OrderedDict(input_ids=EYE, attention_mask=torch.tensor([[1, 1, 0]] * 3))
    batch = defaultdict(list, x=EYE, by_name=padded, pair=Pair([EYE], (1, EYE)))
    handles = RTensor.remotize(batch, "node-a:1")
    assert (type(handles), handles.default_factory) == (defaultdict, list)
    assert (type(handles["by_name"]), type(handles["pair"])) == (OrderedDict, Pair)
    assert [tuple(handle.shape) for handle in handles["by_name"].values()] == [(3, 2), (3, 2)]
    assert padded["input_ids"] is EYE, "the caller's own stay as they are"
    assert type(serialize_value(handles["by_name"])) is dict


class Sized(OrderedDict[str, Any]):
    """A dict that `copy` cannot copy."""

    def __init__(self, size: int) -> None:
        super().__init__(size=size)


def test_a_dict_that_cannot_be_copied_becomes_a_plain_one() -> None:
    batch = Sized(7)
    batch["x"] = EYE
    handles = RTensor.remotize([batch], "node-a:1")
    assert type(handles[0]) is dict
    assert (list(handles[0]), handles[0]["size"]) == (["size", "x"], 7)
    batch["x"] = handles[0]["x"]
    assert type(RTensor.localize(batch)) is dict


class TensorsByName(dict[str, torch.Tensor]):
    """A dict that takes tensors only."""

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        if not isinstance(tensor, torch.Tensor):
            raise AssertionError("tensors only")
        super().__setitem__(name, tensor)


class Tensors(list[torch.Tensor]):
    """A list that takes tensors only."""

    def __setitem__(self, place: Any, tensors: Any) -> None:
        super().__setitem__(place, [tensor.detach() for tensor in tensors])


def test_a_dict_or_list_that_takes_no_handles_becomes_a_plain_one() -> None:
    batch = [TensorsByName(x=EYE, mask=EYE), Tensors([EYE, EYE])]
    by_name, listed = RTensor.remotize(batch, "node-a:1")
    assert (type(by_name), list(by_name), type(listed), len(listed)) == (dict, ["x", "mask"], list, 2)
    assert [type(handle) for handle in (*by_name.values(), *listed)] == [RTensor] * 4
