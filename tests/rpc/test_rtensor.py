"""The names that AReaL users call, and what each of them does."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import json
import pickle
import uuid
from collections import OrderedDict, namedtuple
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

import gpu_cache.rpc
from gpu_cache import FetchError
from gpu_cache.report.counters import BufferStats
from gpu_cache.rpc import rtensor, runtime
from gpu_cache.rpc.rtensor import (
    HttpRTensorBackend,
    RTensor,
    RTensorBackend,
    TensorShardInfo,
    buffer_stats,
    clear_batches,
    clear_fetch_buffer,
    fetch,
    fetch_buffer_stats,
    flatten_shard_ids,
    get_backend,
    remove,
    set_backend,
    storage_stats,
    store,
)
from gpu_cache.rpc.wire.serialization import deserialize_value, serialize_value
from tests.support.areal_fixtures import remote
from tests.support.users_backend import UsersBackend, handle

Pair = namedtuple("Pair", "left right")


def test_the_names_that_users_import() -> None:
    assert set(rtensor.__all__) >= {
        "RTensor", "TensorShardInfo", "RTensorBackend", "HttpRTensorBackend", "RayRTensorBackend", "get_backend",
        "set_backend", "store", "fetch", "remove", "storage_stats", "clear_fetch_buffer", "flatten_shard_ids",
        "fetch_buffer_stats", "buffer_stats",
    }  # fmt: skip
    assert all(hasattr(rtensor, name) for name in rtensor.__all__)
    assert all(hasattr(rtensor, f"_{name}") for name in ("fetch_buffer", "storage", "store_local"))
    assert gpu_cache.rpc.RTensor is RTensor
    assert gpu_cache.rpc.TensorShardInfo is TensorShardInfo
    assert gpu_cache.rpc.serialize_value is serialize_value
    assert gpu_cache.rpc.deserialize_value is deserialize_value


def test_the_fields_are_upstreams() -> None:
    assert [field.name for field in dataclasses.fields(TensorShardInfo)] == ["shard_id", "node_addr"]
    assert [field.name for field in dataclasses.fields(RTensor)] == ["shard", "data"]
    info = TensorShardInfo("a", "node-a:1")
    assert (info, info == TensorShardInfo(shard_id="a", node_addr="node-a:1")) == (info, True)


def test_a_handle_has_the_properties_of_its_data(users_backend: UsersBackend) -> None:
    found = remote("node-a:1", "s3", torch.empty(2, 2, dtype=torch.bfloat16))
    assert (found.shape, found.dtype, found.device.type, found.ndim) == ((2, 2), torch.bfloat16, "meta", 2)
    found = handle(3)
    found.to_local()
    assert (found.shape, found.dtype, found.device.type, found.ndim) == ((4,), torch.float32, "cpu", 1)


def test_to_local_fetches_once_and_keeps_the_tensor(users_backend: UsersBackend) -> None:
    first, second = handle(3), handle(3)
    tensor = first.to_local()
    assert torch.equal(tensor, users_backend.tensors["s3"])
    assert first.to_local() is first.data is tensor
    assert second.to_local().data_ptr() == tensor.data_ptr()
    assert users_backend.fetched == [[TensorShardInfo("s3", "node-a:1")]]


def test_data_that_is_here_is_not_looked_up(users_backend: UsersBackend) -> None:
    data = torch.ones(3)
    assert RTensor(TensorShardInfo("nowhere", ""), data).to_local() is data
    assert (users_backend.fetched, buffer_stats()["requested"]) == ([], 0)


def test_localize_rebuilds_the_containers(users_backend: UsersBackend) -> None:
    other = object()
    nest = {
        "a": [handle(0), (handle(1), other)],
        "p": Pair(handle(2), {"x": handle(3)}),
        7: None,
        "o": OrderedDict(z=1),
    }
    found = RTensor.localize(nest)
    assert list(found) == list(nest)
    assert (type(found["p"]), type(found["o"]), type(found["a"][1])) == (Pair, OrderedDict, tuple)
    assert found["a"][1][1] is other
    assert found is not nest
    assert found["a"] is not nest["a"]
    got = [found["a"][0], found["a"][1][0], found["p"].left, found["p"].right["x"]]
    assert all(torch.equal(tensor, users_backend.tensors[f"s{number}"]) for number, tensor in enumerate(got))
    assert nest["p"].left.data is found["p"].left
    assert torch.equal(RTensor.localize(handle(5)), users_backend.tensors["s5"])
    assert RTensor.localize(other) is other
    assert RTensor.localize([]) == []


def test_localize_asks_once_for_distinct_misses_in_order(users_backend: UsersBackend) -> None:
    RTensor.localize([handle(1), handle(4)])
    nest = [handle(3), handle(1), handle(0), handle(3), handle(4), handle(6, "node-c:1"), handle(0)]
    found = RTensor.localize(nest)
    assert [[info.shard_id for info in shards] for shards in users_backend.fetched] == [
        ["s1", "s4"],
        ["s3", "s0", "s6"],
    ]
    assert [len(tensor) - 1 for tensor in found] == [3, 1, 0, 3, 4, 6, 0]


def test_localize_works_inside_a_running_loop(users_backend: UsersBackend) -> None:
    async def scenario() -> torch.Tensor:
        return RTensor.localize(handle(2))

    assert torch.equal(asyncio.run(scenario()), users_backend.tensors["s2"])


def test_a_users_backend_that_fails_is_quoted(users_backend: UsersBackend) -> None:
    users_backend.fault = OSError("no route to node-a")
    with pytest.raises(FetchError, match=r"no route to node-a \[2 of 2 shards failed: 's1', 's2'") as caught:
        RTensor.localize([handle(1), handle(2)])
    assert caught.value.failures == {"s1": users_backend.fault, "s2": users_backend.fault}
    users_backend.fault = None
    assert torch.equal(RTensor.localize(handle(1)), users_backend.tensors["s1"])


@pytest.mark.parametrize(
    ("wrong", "named"), [([0.0, 1.0], "not list"), (None, "not NoneType"), (torch.ones(2).to_sparse(), "sparse")]
)
def test_an_object_that_is_no_tensor_fails_alone(users_backend: UsersBackend, wrong: Any, named: str) -> None:
    users_backend.tensors["s1"] = wrong
    handles = [handle(n) for n in range(3)]
    with pytest.raises(gpu_cache.FetchError, match="1 of 3 shards failed: 's1'") as caught:
        RTensor.localize(handles)
    assert named in str(caught.value.failures["s1"])
    assert [tensor.tolist() for tensor in RTensor.localize([handles[0], handles[2]])] == [[0.0], [2.0] * 3]
    assert len(users_backend.fetched) == 1, "the others are cached"


@pytest.mark.parametrize(
    ("found", "said"), [(None, "a NoneType"), (torch.ones(2, 2), "one tensor")], ids=["none", "rows"]
)
def test_a_backend_that_fetches_no_list_is_named(users_backend: UsersBackend, found: Any, said: str) -> None:
    users_backend.fetch = lambda shards: found  # type: ignore[method-assign]
    handles = [remote("node-a:1", name, torch.ones(2)) for name in ("a", "b")]
    with pytest.raises(FetchError, match=f"node-a:1 returned {said}: a list with a tensor for each shard is expected"):
        RTensor.localize(handles)


class WithSource(UsersBackend):
    """A backend whose source opens something else than readers."""

    def source(self, shards: Any, expected: Any) -> Any:
        return SimpleNamespace(open=lambda keys, timeout_s: None)


def test_a_backend_whose_source_opens_no_readers_is_told_so() -> None:
    set_backend(WithSource())
    with pytest.raises(TypeError, match="open of the source SimpleNamespace returned a NoneType: a list of ShardR"):
        RTensor.localize(handle(1))


def test_results_are_paired_with_requests_strictly(users_backend: UsersBackend) -> None:
    users_backend.fetch = lambda shards: [torch.ones(1)]  # type: ignore[method-assign]
    with pytest.raises(FetchError, match="node-a:1, node-b:1 returned 1 shards for 2 requested"):
        RTensor.localize([handle(1), handle(2, "node-b:1")])
    assert fetch_buffer_stats() == {"num_entries": 0}


@pytest.mark.parametrize("make", [lambda fetch: SimpleNamespace(fetch=fetch), lambda fetch: MagicMock(fetch=fetch)])
def test_anything_with_a_fetch_will_do(make: Any) -> None:
    set_backend(make(lambda shards: [torch.full((2,), 7.0) for _ in shards]))
    assert torch.equal(RTensor.localize(handle(1)), torch.full((2,), 7.0))
    set_backend(None)


def test_prefetching_needs_no_waiting(users_backend: UsersBackend) -> None:
    RTensor.localize(handle(1))
    coming = RTensor.prefetch([handle(1), handle(2), {"x": handle(3)}, handle(2)])
    found = RTensor.localize([handle(2), handle(3)])
    assert [len(tensor) for tensor in found] == [3, 4]
    assert coming.result(30) == 2
    assert len(users_backend.fetched) == 2
    assert RTensor.prefetch([]).result(30) == 0


def test_remotize_stores_copies_and_leaves_handles(users_backend: UsersBackend) -> None:
    set_backend(None)
    source = torch.arange(12.0).view(3, 4).requires_grad_()
    found = RTensor.remotize({"t": source.t(), "deep": [(source, "text"), None], "p": Pair(1, source)}, "me:1")
    assert (found["deep"][0][1], found["deep"][1], found["p"].left) == ("text", None, 1)
    made = found["t"]
    assert (made.shape, made.dtype, made.device.type, made.shard.node_addr) == ((4, 3), torch.float32, "meta", "me:1")
    assert uuid.UUID(made.shard.shard_id).version == 4
    kept = fetch(made.shard.shard_id)
    with torch.no_grad():
        source.zero_()
    assert torch.equal(kept, torch.arange(12.0).view(3, 4).t())
    assert kept.is_contiguous()
    assert not kept.requires_grad
    assert storage_stats() == {"num_tensors": 3, "total_bytes": 3 * 48}
    assert RTensor.remotize(None, "me:1") is None
    assert RTensor.remotize(made, "me:1") is made


def test_remotize_trims_padding(users_backend: UsersBackend) -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    found = RTensor.remotize([{"attention_mask": mask, "ids": torch.arange(8).view(2, 4), "r": torch.ones(2)}], "")[0]
    assert {name: tuple(made.shape) for name, made in found.items()} == {
        "attention_mask": (2, 2),
        "ids": (2, 2),
        "r": (2,),
    }
    assert torch.equal(users_backend.tensors[found["ids"].shard.shard_id], torch.tensor([[0, 1], [4, 5]]))


def test_ids_are_collected_by_node_and_flat() -> None:
    nest = {"a": [handle(1), handle(2, "node-b:1")], "b": (handle(1), Pair(handle(3), None))}
    assert RTensor.collect_shards(nest) == {"node-a:1": ["s1", "s3"], "node-b:1": ["s2"]}
    assert flatten_shard_ids(nest) == ["s1", "s2", "s1", "s3"]
    assert (RTensor.collect_shards("none"), flatten_shard_ids(None)) == ({}, [])


def test_a_localized_handle_stays_small_on_the_wire(users_backend: UsersBackend) -> None:
    users_backend.tensors["large"] = torch.ones(1 << 20)
    large = remote("node-a:1", "large", users_backend.tensors["large"])
    before = len(pickle.dumps(large)), len(json.dumps(serialize_value(large)))
    large.to_local()
    after = pickle.dumps(large), json.dumps(serialize_value(large))
    assert (len(after[0]), len(after[1])) == before
    for copied in (pickle.loads(after[0]), deserialize_value(json.loads(after[1]))):
        assert (copied.shard, copied.shape, copied.dtype) == (large.shard, large.shape, torch.float32)
        assert copied.device.type == "meta"
    assert not large.data.is_meta
    nested = deserialize_value(serialize_value({"x": [large]}))
    assert nested["x"][0].shard == large.shard


def test_a_copy_within_the_process_keeps_the_values(users_backend: UsersBackend) -> None:
    found = handle(3)
    tensor = found.to_local()
    shallow, deep = copy.copy(found), copy.deepcopy({"x": found})["x"]
    assert shallow.data is tensor
    assert torch.equal(deep.data, tensor)
    assert deep.data.data_ptr() != tensor.data_ptr()
    assert deep.shard == found.shard


def test_handles_of_one_shard_are_equal_also_when_localized_or_copied(users_backend: UsersBackend) -> None:
    found, other = handle(3), handle(4)
    copied = pickle.loads(pickle.dumps(found))
    found.to_local()
    assert found == copied == copy.copy(found)
    assert found != other
    assert [other, found].index(copied) == 1
    assert found != RTensor(found.shard, torch.empty(1, device="meta"))
    assert found != found.data.shape
    with pytest.raises(TypeError, match="unhashable"):
        hash(found)


def test_a_handle_without_a_tensor_is_compared_shown_and_cleared_and_refused_for_all_else(
    users_backend: UsersBackend,
) -> None:
    emptied, without = handle(3), RTensor(handle(3).shard, None)  # type: ignore[arg-type]
    emptied.to_local()
    emptied.data = None  # type: ignore[assignment]
    assert emptied == without == copy.deepcopy(without)
    assert emptied != handle(3)
    assert repr(emptied) == "RTensor(data None, shard 's3' of node-a:1)"
    for use in (RTensor.localize, RTensor.to_local, RTensor.prefetch):
        with pytest.raises(AttributeError, match="`data` of the handle of shard 's3' is None: a tensor is expected"):
            use(emptied)
    report = asyncio.run(RTensor.clear_everywhere([emptied, handle(4)]))
    assert (report.num_shards, report.failures) == (2, [])


def test_the_cache_is_cleared_by_ids_or_flushed(users_backend: UsersBackend) -> None:
    RTensor.localize([handle(number) for number in range(5)])
    assert fetch_buffer_stats() == {"num_entries": 5}
    assert clear_fetch_buffer(["s0", "unknown", "s1", "s0"]) == 2
    assert clear_fetch_buffer([]) == 0
    assert clear_fetch_buffer(iter(["s2"])) == 1
    assert clear_fetch_buffer() == 2
    assert fetch_buffer_stats() == {"num_entries": 0}


def test_clearing_batches_never_flushes(users_backend: UsersBackend) -> None:
    RTensor.localize([handle(number) for number in range(3)])
    assert [clear_batches(), clear_batches(None), clear_batches([]), clear_batches(())] == [0, 0, 0, 0]
    assert clear_batches(["s0", "unknown"]) == 1
    assert fetch_buffer_stats() == {"num_entries": 2}


def test_one_id_is_no_list_of_ids(users_backend: UsersBackend) -> None:
    RTensor.localize(handle(1))
    calls = [
        lambda: clear_batches("s1"),
        lambda: clear_fetch_buffer("s1"),
        lambda: asyncio.run(RTensor.clear_node("node-a:1", "s1")),
        lambda: runtime.current().store.remove("s1"),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="'s1' is one key, where several are expected: put it into a list"):
            call()
    assert (fetch_buffer_stats(), users_backend.deleted) == ({"num_entries": 1}, [])


def test_clearing_a_node_evicts_first_and_then_deletes(users_backend: UsersBackend) -> None:
    RTensor.localize([handle(1), handle(2)])
    assert asyncio.run(RTensor.clear_node("node-a:1", ["s1", "unknown"])) == {"deleted": 2}
    assert users_backend.deleted == [("node-a:1", ["s1", "unknown"])]
    users_backend.fault = OSError("gone")
    with pytest.raises(OSError, match="gone"):
        asyncio.run(RTensor.clear_node("node-a:1", ["s2"]))
    assert fetch_buffer_stats() == {"num_entries": 0}


def test_statistics_name_every_figure() -> None:
    assert buffer_stats().keys() == BufferStats.__annotations__.keys()
    assert {"num_tensors", "total_bytes"} <= buffer_stats().keys()
    assert type(buffer_stats()) is dict
    assert (fetch_buffer_stats(), storage_stats()) == ({"num_entries": 0}, {"num_tensors": 0, "total_bytes": 0})


def test_the_store_by_name() -> None:
    store("mine", torch.ones(4))
    rtensor._store_local("yours", torch.ones(2))
    assert torch.equal(fetch("mine"), torch.ones(4))
    assert storage_stats() == {"num_tensors": 2, "total_bytes": 24}
    assert (remove("mine"), remove("mine"), remove(["no id"])) == (1, 0, 0)
    with pytest.raises(KeyError, match="Shard mine not found in storage"):
        fetch("mine")


def test_a_backend_is_set_and_picked() -> None:
    assert isinstance(get_backend(), HttpRTensorBackend)
    assert get_backend() is get_backend()
    users = UsersBackend()
    assert isinstance(users, RTensorBackend)
    set_backend(users)
    assert get_backend() is users
    set_backend(None)
    assert isinstance(get_backend(), HttpRTensorBackend)


@pytest.mark.parametrize(
    "look",
    [lambda handle: handle.shape, lambda handle: handle.promise, pickle.dumps, serialize_value],
    ids=["shape", "promise", "pickle", "message"],
)
def test_a_handle_without_a_tensor_describes_none(look: Any) -> None:
    for address in ("", "me:1"):
        handle = RTensor(TensorShardInfo("a", address), None)  # type: ignore[arg-type]
        with pytest.raises(AttributeError, match="NoneType"):
            look(handle)
        assert copy.copy(handle).data is None


def test_a_deleted_tensor_is_described_again_only_if_the_handle_was_remote() -> None:
    local = RTensor(TensorShardInfo("a", "me:1"), torch.ones(3))
    remote = RTensor(TensorShardInfo("a", "me:1"), torch.ones(3, device="meta"))
    del local.data, remote.data
    assert remote.data.shape == (3,)
    for lacks_one in (local, RTensor):
        with pytest.raises(AttributeError, match="RTensor has no attribute 'data'"):
            _ = lacks_one.data
