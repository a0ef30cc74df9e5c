"""Mistakes of users: each is refused at once, in words that name the mistake and the remedy."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

import gpu_cache
from gpu_cache import CacheConfig, FetchError, ShardSpec, TensorCache, TensorReader
from gpu_cache.rpc import RTensor, TensorShardInfo, rtensor, runtime, serialize_value
from gpu_cache.rpc.client.ray import RayRTensorBackend
from gpu_cache.rpc.rtensor import buffer_stats, clear_batches, set_backend, storage_stats
from gpu_cache.rpc.server import main as rpc_server
from gpu_cache.rpc.server.main import ServerHandle
from tests.support.areal_fixtures import delete, remote
from tests.support.fake_owner import FakeOwner
from tests.support.users_backend import UsersBackend, handle

TWO = torch.ones(2)


@pytest.mark.parametrize("port", [99_999, 65_536, -1, "80", 80.5, True, None])
def test_a_port_that_is_none_is_refused(port: Any) -> None:
    with pytest.raises(ValueError, match=f"port={port!r}: must be 0, for a free one, or 1 to 65535"):
        rpc_server.start(port=port)


def test_a_host_that_cannot_be_found_is_named() -> None:
    with pytest.raises(OSError, match=r"host='no\.such\.host\.invalid': "):
        rpc_server.start(host="no.such.host.invalid")


@pytest.mark.parametrize(
    "address", ["http://h:1", "", "localhost", "h:0", "h:65536", "h:x", "a b:1", "h:1:", ":80", None, 80]
)
def test_remotize_refuses_an_address_that_no_client_could_use(address: Any) -> None:
    with pytest.raises(ValueError, match="is not an address: write host:port or") as caught:
        RTensor.remotize({"a": TWO}, address)
    assert repr(address) in str(caught.value)
    assert storage_stats()["num_tensors"] == 0
    assert RTensor.remotize({"a": 7}, address) == {"a": 7}, "no tensor, no address"


@pytest.mark.parametrize("address", ["10.0.0.7:35221", "[::1]:80", "node-7.rack:1", "localhost:8080"])
def test_remotize_takes_addresses(address: str) -> None:
    assert RTensor.remotize(TWO, address).shard.node_addr == address


@pytest.mark.parametrize("address", ["0.0.0.0:80", "[::]:80"])
def test_remotize_warns_of_an_address_that_is_each_clients_own(address: str) -> None:
    with pytest.warns(UserWarning, match="is each client's own host: give the host:port that other hosts use") as seen:
        RTensor.remotize(TWO, address)
    assert [one.filename for one in seen] == [__file__]
    assert RTensor.remotize(7, address) == 7, "no tensor, no address"


def test_a_backend_of_the_users_takes_any_address(users_backend: UsersBackend) -> None:
    assert RTensor.remotize(TWO, "").shard.node_addr == ""


@pytest.mark.parametrize(
    ("token", "said"),
    [
        (None, "a bearer token is required.*; no token was sent: set AREAL_RPC_TOKEN to the owner's token before this"),
        (
            "wrong",
            "the bearer token is not this server's.*; the token that was sent is not the owner's: compare AREAL",
        ),
    ],
)
def test_a_refusal_says_whether_the_token_is_missing_or_wrong(
    owner: FakeOwner, monkeypatch: pytest.MonkeyPatch, token: str | None, said: str
) -> None:
    owner.store["a"] = TWO
    with rpc_server.start(owner=owner, token="s3cret") as server:
        if token is not None:
            monkeypatch.setenv("AREAL_RPC_TOKEN", token)
        with pytest.raises(FetchError, match=said):
            RTensor.localize(remote(server.address, "a", TWO))
        with pytest.raises(FetchError, match=said):
            delete(rtensor.get_backend(), server.address, "a")  # type: ignore[arg-type]


def test_a_dead_owner_is_named_once_with_the_question_to_ask() -> None:
    with rpc_server.start() as server:
        address = server.address
    runtime.configure(device="cpu")
    with pytest.raises(FetchError) as caught:
        RTensor.localize([remote(address, "lonely", TWO)])
    text = str(caught.value)
    assert (text.count(address), text.count("lonely")) == (1, 1)
    assert "; does its server run? (shards 'lonely')" in text
    assert "cached" not in text


@pytest.mark.parametrize("wrong", [object(), {}, "http://h:1", HttpLike := type("HttpLike", (), {"store": print})()])
def test_an_object_that_is_no_backend_is_refused_at_once(wrong: Any) -> None:
    with pytest.raises(
        TypeError, match=f"an RTensorBackend is expected, not {type(wrong).__name__}, which has no fetch"
    ):
        set_backend(wrong)


def test_the_class_of_a_backend_is_no_backend() -> None:
    with pytest.raises(TypeError, match=r"not the class of one: write HttpRTensorBackend\(\)"):
        set_backend(rtensor.HttpRTensorBackend)  # type: ignore[arg-type]


def test_settings_that_are_none_are_refused_at_once() -> None:
    with pytest.raises(TypeError, match="config is a dict: a CacheConfig is expected"):
        TensorCache({})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="config is a dict: a CacheConfig is expected"):
        runtime.configure({"device": "cpu"})  # type: ignore[arg-type]
    for device in ("cpu", torch.device("cpu")):
        with pytest.raises(TypeError, match=r"a Device is expected, not .*: CacheConfig\(device='cpu'\) names"):
            TensorCache(device=device)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrap", [lambda one: one, lambda one: {"batch": [one]}, lambda one: ("x", [one])[1:]])
def test_a_message_that_was_not_deserialized_is_warned_of(wrap: Any) -> None:
    message = wrap(serialize_value(remote("h:1", "a", TWO)))
    for call in (RTensor.localize, RTensor.collect_shards, rtensor.flatten_shard_ids, RTensor.prefetch):
        with pytest.warns(UserWarning, match="call deserialize_value on it first") as caught:
            call(message)
        assert len(caught) == 1
    assert RTensor.localize({"type": "chat", "data": [1]}) == {"type": "chat", "data": [1]}


def test_a_handle_shows_itself_on_one_line(users_backend: UsersBackend) -> None:
    far = handle(1999)
    assert repr(far) == "RTensor(float32 [2000] remote, shard 's1999' of node-a:1)"
    users_backend.tensors["s1999"] = torch.randn(2000)
    far.to_local()
    assert repr(far) == "RTensor(float32 [2000] on cpu, shard 's1999' of node-a:1)"


def test_every_public_object_shows_itself(server: ServerHandle) -> None:
    cache = TensorCache(CacheConfig(device="cpu"))
    cache.put("a", TWO)
    shown = [
        cache, cache.config, cache.scope("step"), cache.trim(), cache.entries()[0],
        ShardSpec("a", TWO.dtype, TWO.shape),
        TensorReader("n", ["a"], lambda: [TWO]), FetchError("late"), TensorShardInfo("a", "h:1"), server,
        runtime.current(), runtime.current().store, rtensor.get_backend(), rtensor.StepClearer(),
        rtensor.ClearReport(0, {}, 0, []), rtensor._fetch_buffer, rtensor._storage,
        RayRTensorBackend(object()),
    ]  # fmt: skip
    assert [one for one in shown if " object at 0x" in repr(one) or "\n" in repr(one)] == []


def test_dir_lists_public_names() -> None:
    assert dir(gpu_cache) == sorted([*gpu_cache.__all__, "__version__"])
    assert dir(gpu_cache.rpc) == sorted(gpu_cache.rpc.__all__)


def test_shards_to_keep_are_no_leak(users_backend: UsersBackend) -> None:
    weights = [handle(number) for number in range(3)]
    RTensor.localize(weights[0], keep=True)
    RTensor.localize([weights[1], handle(1)], keep=True)
    assert RTensor.prefetch(weights[2], keep=True).result(30) == 1
    for number in (4, 5, 6):
        RTensor.localize(handle(number))
        clear_batches([f"s{number}"])
    assert (buffer_stats()["num_entries"], buffer_stats()["outlived_entries"]) == (3, 0)


class UsersHandle(RTensor):
    """A user's own class of handles."""


@pytest.mark.parametrize(
    "wrap",
    [
        lambda one: [one],
        lambda one: [one.shard],
        lambda one: {"a": one},
        lambda one: one,
        lambda one: [UsersHandle(one.shard, one.data)],
    ],
)
def test_handles_in_the_place_of_shard_ids_are_refused(wrap: Any) -> None:
    """A clear that passed them over would be a leak."""
    handles = wrap(remote("h:1", "a", TWO))
    for call in (
        rtensor.clear_batches,
        rtensor.clear_fetch_buffer,
        lambda ids: asyncio.run(RTensor.clear_node("h", ids)),
    ):
        with pytest.raises(TypeError, match=r"shard ids are expected, not \w+: flatten_shard_ids"):
            call(handles)
    with pytest.raises(TypeError, match="shard ids are expected, not RTensor"):
        rtensor.remove(remote("h:1", "a", TWO))


@dataclasses.dataclass
class Batch:
    tokens: Any


@pytest.mark.parametrize("obj", [{"tokens": [TWO]}, ["a", "b"], Batch(remote("h:1", "a", TWO))], ids=repr)
def test_a_clear_without_handles_is_warned_of(obj: object) -> None:
    with pytest.warns(UserWarning, match="nothing is cleared: there are no handles in this"):
        report = asyncio.run(RTensor.clear_everywhere(obj))
    assert report.num_shards == 0


@pytest.mark.parametrize("obj", [None, [], {"rewards": [1.5, None]}], ids=repr)
def test_a_clear_of_nothing_is_no_mistake(obj: object) -> None:
    assert asyncio.run(RTensor.clear_everywhere(obj)).is_complete


def test_what_cannot_be_serialized_is_named_with_its_place() -> None:
    with pytest.raises(TypeError, match=r"^value\['batch'\]\[1\]\['reward'\]: numpy.float32 does not travel, only"):
        serialize_value({"batch": [TWO, {"reward": np.float32(1)}]})
    with pytest.raises(TypeError, match=r"^value\[0\]: keys of a dict that travels are strings, not int: 2"):
        serialize_value(({2: 3},))
    with pytest.raises(TypeError, match=r"^set does not travel"):
        serialize_value({1})


@pytest.mark.parametrize("wrong", [[1.0], None, np.ones(2)], ids=repr)
def test_only_a_tensor_is_stored(wrong: Any) -> None:
    with pytest.raises(TypeError, match="a Tensor is expected, not "):
        rtensor.store("a", wrong)
    assert rtensor.storage_stats()["num_tensors"] == 0


def test_a_shard_that_its_own_process_lacks_names_the_causes() -> None:
    runtime.current().add_own_address("here:1")
    with pytest.raises(
        FetchError, match=r"shard a from here:1: that is this process, .* forked from this one"
    ) as caught:
        RTensor.localize(remote("here:1", "a", TWO))
    assert isinstance(caught.value.failures["a"], rtensor.ShardMissingError)
