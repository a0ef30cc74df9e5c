"""A handle's promise holds on every way that a shard takes: no caller gets another owner's or other bytes."""

from __future__ import annotations

import contextlib
import copy
import logging
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_cache import FetchError
from gpu_cache.rpc import runtime, shard
from gpu_cache.rpc.rtensor import RTensor, ShardAnswerError, ShardConflictError, TensorShardInfo, set_backend, store
from gpu_cache.rpc.server import main as rpc_server
from gpu_cache.rpc.wire.serialization import deserialize_value, serialize_value
from tests.support.areal_fixtures import remote
from tests.support.fake_owner import FakeOwner
from tests.support.fault_server import FaultServer, json_of, whole
from tests.support.sources import same_bytes
from tests.support.users_backend import UsersBackend

RIGHT = torch.arange(6, dtype=torch.int32)
# As many bytes of another dtype, as many elements of another shape, more, fewer, none, another dtype of fewer.
WRONG = [RIGHT.float(), RIGHT.view(2, 3), torch.zeros(7).int(), RIGHT[:3], RIGHT[:0], RIGHT.long()[:3]]
WAYS = ["binary", "json", "own store", "user's backend"]


class Way:
    """An owner of the shards "a" and "b", and a backend that reaches it."""

    def __init__(self, address: str, ids: Mapping[str, Any]) -> None:
        self.address, self.ids = address, ids

    def handle(self, name: str, like: torch.Tensor) -> RTensor:
        return remote(self.address, self.ids[name], like)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Iterator[Way]:
    tensors = {"a": RIGHT, "b": RIGHT + 10}
    same = {name: name for name in tensors}
    with contextlib.ExitStack() as stack:
        stack.callback(set_backend, None)
        if request.param == "binary":
            owner = FakeOwner()
            owner.store.update(tensors)
            yield Way(stack.enter_context(rpc_server.start(owner=owner)).address, same)
        elif request.param == "json":
            yield Way(stack.enter_context(FaultServer(*[whole(json_of(tensors))] * 8)).address, same)
        elif request.param == "own store":
            for name, tensor in tensors.items():
                store(name, tensor)
            yield Way(stack.enter_context(rpc_server.start()).address, same)
        else:
            users = UsersBackend()
            users.tensors.update(tensors)
            set_backend(users)
            yield Way("node-a:1", same)


@pytest.mark.parametrize("wrong", WRONG, ids=str)
@pytest.mark.parametrize("is_cached", [False, True], ids=["fetched", "cached"])
def test_a_handle_never_gets_other_bytes_than_promised(way: Way, wrong: torch.Tensor, is_cached: bool) -> None:
    if is_cached:
        assert same_bytes(way.handle("a", RIGHT).to_local(), RIGHT)
    bad, good = way.handle("a", wrong), way.handle("b", RIGHT)
    with pytest.raises(FetchError) as caught:
        RTensor.localize({"bad": bad, "good": [good]})
    assert bad.data.is_meta
    assert list(caught.value.failures) == [way.ids["a"]]
    error = caught.value.failures[way.ids["a"]]
    assert isinstance(error, ShardAnswerError)
    expected = [
        str(way.ids["a"]),
        way.address,
        f"{wrong.dtype} of shape {list(wrong.shape)}",
        "torch.int32 of shape [6]",
    ]
    assert all(words in str(error) for words in expected), str(error)
    assert same_bytes(way.handle("b", RIGHT).to_local(), RIGHT + 10)
    assert same_bytes(way.handle("a", RIGHT).to_local(), RIGHT)


def test_every_call_looks_at_promises(way: Way, caplog: pytest.LogCaptureFixture) -> None:
    wrong = RIGHT.float()
    with pytest.raises(FetchError, match="is promised"):
        way.handle("a", wrong).to_local()
    found = RTensor.localize([way.handle("a", wrong), way.handle("b", RIGHT)], on_error="none")
    assert (found[0], same_bytes(found[1], RIGHT + 10)) == (None, True)
    assert "going on without shards" in caplog.text
    error = RTensor.prefetch([way.handle("a", wrong)]).exception(30)
    assert isinstance(error, FetchError)
    assert isinstance(error.failures[way.ids["a"]], ShardAnswerError)
    with pytest.raises(FetchError, match="is promised"):
        RTensor.localize(way.handle("a", wrong), prefer="host")
    with runtime.current().cache.scope() as scope:
        assert RTensor.localize([way.handle("a", wrong), way.handle("a", RIGHT)], on_error="none")[0] is None
        assert scope.num_shards == 1
    assert len(runtime.current().cache) == 1


def test_wrong_handles_of_a_shard_fail_and_right_ones_do_not(way: Way) -> None:
    handles = [way.handle("a", like) for like in (RIGHT.float(), RIGHT, RIGHT[:3], RIGHT)]
    found = RTensor.localize(handles, on_error="none")
    assert [one is not None for one in found] == [False, True, False, True]
    assert same_bytes(found[1], RIGHT)
    with pytest.raises(FetchError, match="is promised"):
        RTensor.localize([way.handle("a", like) for like in (RIGHT, RIGHT.float())])


def test_a_shard_that_a_reader_wrote_into_comes_again_as_promised_or_not_at_all(way: Way) -> None:
    way.handle("a", RIGHT).to_local().add_(1)
    with pytest.raises(FetchError, match="is promised"):
        way.handle("a", RIGHT.float()).to_local()
    assert same_bytes(way.handle("a", RIGHT).to_local(), RIGHT)


# Owners.


def test_handles_that_give_one_id_two_owners_are_refused_before_anything_is_asked() -> None:
    handles = [remote(f"node-{name}:1", "weights/layer0", RIGHT) for name in "aab"]
    said = "shard weights/layer0: handles of one call say that node-a:1 owns it, and that node-b:1 does"
    for call in (RTensor.localize, RTensor.prefetch, lambda obj: RTensor.localize(obj, on_error="none")):
        with pytest.raises(ShardConflictError, match=said) as caught:
            call(handles)
        assert isinstance(caught.value, FetchError)
        assert isinstance(caught.value, ValueError)
    assert all(handle.data.is_meta for handle in handles)


def test_each_owners_handle_gets_its_bytes_one_call_after_another() -> None:
    with contextlib.ExitStack() as stack:
        tensors = {}
        for number in range(3):
            owner = FakeOwner()
            owner.store["weights/layer0"] = RIGHT + number
            tensors[stack.enter_context(rpc_server.start(owner=owner)).address] = RIGHT + number
        kept = {address: remote(address, "weights/layer0", RIGHT).to_local() for address in tensors}
        assert all(same_bytes(kept[address], tensor) for address, tensor in tensors.items())
        assert len(runtime.current().cache) == 1
        fetches = runtime.current().cache.buffer_stats()["fetches"]
        assert same_bytes(remote(list(tensors)[-1], "weights/layer0", RIGHT).to_local(), RIGHT + 2)
        assert runtime.current().cache.buffer_stats()["fetches"] == fetches, "the last one is cached"


def test_a_dead_address_costs_the_cached_shard_nothing() -> None:
    store("a", RIGHT)
    with rpc_server.start() as server:
        held = remote(server.address, "a", RIGHT).to_local()
        with pytest.raises(FetchError):
            remote("127.0.0.1:1", "a", RIGHT).to_local(timeout_s=5)
        assert remote(server.address, "a", RIGHT).to_local().data_ptr() == held.data_ptr()


# What a handle remembers of itself.


def test_a_handle_that_is_given_other_data_or_another_owner_promises_that() -> None:
    users = UsersBackend()
    users.tensors["a"] = RIGHT
    set_backend(users)
    handle = remote("node-a:1", "a", RIGHT.float())
    handle.data = torch.empty(6, dtype=torch.int32, device="meta")
    assert same_bytes(handle.to_local(), RIGHT)
    handle.data = torch.empty(6, device="meta")
    with pytest.raises(FetchError, match="is promised"):
        handle.to_local()
    moved = remote("node-a:1", "a", RIGHT)
    moved.shard.node_addr = "node-b:1"
    moved.to_local()
    again = remote("node-a:1", "a", RIGHT)
    again.shard = TensorShardInfo("a", "node-b:1")
    again.to_local()
    assert [info.node_addr for infos in users.fetched for info in infos] == ["node-a:1", "node-b:1"]
    set_backend(None)


@pytest.mark.parametrize(
    "travelled",
    [
        lambda handle: pickle.loads(pickle.dumps(handle)),
        lambda handle: deserialize_value(serialize_value(handle)),
        copy.copy,
        copy.deepcopy,
    ],
    ids=["pickle", "json", "copy", "deepcopy"],
)
def test_a_promise_travels(travelled: Any) -> None:
    handle = travelled(remote("node-a:1", "a", RIGHT))
    assert handle.promise == (torch.int32, (6,), "node-a:1")
    assert handle.promise is remote("node-a:1", "a", RIGHT).promise, "equal ones are one object"
    assert repr(handle) == repr(remote("node-a:1", "a", RIGHT))


def test_many_promises_are_not_remembered_for_ever() -> None:
    for length in range(5000):
        remote("node-a:1", "a", torch.empty(length, device="meta"))
    assert remote("node-a:1", "a", torch.empty(3)).promise == (torch.float32, (3,), "node-a:1")
    assert len(shard._promises) <= 4096


# Any of it.

_LIKES = [*WRONG, RIGHT, RIGHT.view(torch.float32), RIGHT.view(3, 2), RIGHT.view(1, 6)]
_IDS = ["w0", "w1"]
_CALLS = st.tuples(
    st.sampled_from(["localize", "localize", "prefetch", "host", "clear", "write"]),
    st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from(_IDS), st.integers(0, len(_LIKES) - 1)), min_size=1, max_size=5
    ),
)


@contextlib.contextmanager
def four_owners() -> Iterator[list[tuple[str, dict[str, torch.Tensor]]]]:
    """Addresses and shards of owners that use the same ids: two binary ones, one of JSON, one that is not there."""
    shards = [{"w0": RIGHT + number, "w1": (_LIKES[number] + 50).contiguous()} for number in range(3)]
    with contextlib.ExitStack() as stack:
        found = [(stack.enter_context(FaultServer(whole(json_of(shards[2])))).address, shards[2])]
        for tensors in shards[:2]:
            owner = FakeOwner()
            owner.store.update(tensors)
            found.append((stack.enter_context(rpc_server.start(owner=owner)).address, tensors))
        yield [*found, ("127.0.0.1:1", {})]


def test_every_handle_gets_its_promised_bytes_or_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    with four_owners() as owners:

        @settings(max_examples=60, deadline=None)
        @given(calls=st.lists(_CALLS, min_size=1, max_size=8))
        def check(calls: list[Any]) -> None:
            runtime.configure(device="cpu", host_tier_bytes=1 << 20, prealloc_bytes=0)
            for call, wanted in calls:
                if call == "clear":
                    runtime.current().cache.clear([wanted[0][1]])
                elif len({(shard_id, owner) for owner, shard_id, _ in wanted}) > len({one[1] for one in wanted}):
                    with pytest.raises(ShardConflictError):
                        RTensor.localize([remote(owners[one][0], key, RIGHT) for one, key, _ in wanted])
                else:
                    make_call(call, owners, wanted)

        check()


def make_call(call: str, owners: list[tuple[str, dict[str, torch.Tensor]]], wanted: list[tuple[int, str, int]]) -> None:
    handles = [remote(owners[owner][0], shard_id, _LIKES[like]) for owner, shard_id, like in wanted]
    if call == "prefetch":
        RTensor.prefetch(handles)
        return
    found = RTensor.localize(handles, on_error="none", prefer="host" if call == "host" else "device", timeout_s=30)
    for tensor, (owner, shard_id, like) in zip(found, wanted, strict=True):
        right = owners[owner][1].get(shard_id)
        is_right = right is not None and (right.dtype, right.shape) == (_LIKES[like].dtype, _LIKES[like].shape)
        assert (tensor is not None) == is_right
        assert tensor is None or same_bytes(tensor, right)
    if call == "write" and found[0] is not None and found[0].numel():
        found[0].zero_()
