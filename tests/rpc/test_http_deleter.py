"""Clears with ids that an owner refuses, or whose owner is out of reach: the clear drops all other ids."""

from __future__ import annotations

import asyncio
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from gpu_cache import FetchError
from gpu_cache.rpc import runtime
from gpu_cache.rpc.client.http import HttpRTensorBackend
from gpu_cache.rpc.rtensor import RTensor, TensorShardInfo, fetch_buffer_stats
from gpu_cache.rpc.server.main import ServerHandle
from gpu_cache.rpc.shard import ShardClearError
from tests.support.areal_fixtures import (
    DONE,
    THREE,
    delete,
    end_step,
    handles,
    with_settings,
)
from tests.support.fake_owner import FakeOwner
from tests.support.fault_server import Asked, FaultServer, hanging_up, refusal, whole

pytestmark = pytest.mark.usefixtures("hasty_backend")


def refusing(*bad: str, status: int = 500) -> Callable[[Asked], bytes]:
    """An owner that chokes on these ids."""
    return lambda asked: refusal(status, "oops") if set(bad) & set(asked.shard_ids) else DONE


def test_one_id_that_an_owner_refuses_keeps_none_of_the_others(serve: Callable[..., FaultServer]) -> None:
    server = serve(whole(refusing("id-77", "id-3")))
    report = end_step(handles(server.address, *(f"id-{number}" for number in range(100))))
    (failure,) = report.failures
    assert (sorted(failure.shard_ids), failure.nbytes) == (["id-3", "id-77"], 24)
    assert str(failure.error).startswith(f"Failed to clear 2 of 100 shards at http://{server.address}/data/clear: 500")
    cleared = {one for asked in server.wanted if not {"id-77", "id-3"} & set(asked) for one in asked}
    assert len(cleared) == 98
    assert report.owners[server.address]["cleared_count"] > 0
    assert len(server.asked) < 40
    report = end_step(handles(server.address, "good"))
    assert [sorted(failure.shard_ids) for failure in report.given_up] == [["id-3", "id-77"]]
    assert ["good"] in server.wanted, "it was cleared although it came with bad ones"


def test_an_owner_that_refuses_everything_is_not_asked_for_ever(
    serve: Callable[..., FaultServer], backend: HttpRTensorBackend
) -> None:
    patient = with_settings(backend, delete_timeout_s=60.0)
    ids = [f"id-{number}" for number in range(3000)]
    server = serve(whole(refusal(500, "oops")))
    with pytest.raises(ShardClearError, match="Failed to clear shards at") as caught:
        delete(patient, server.address, *ids)
    assert sorted(caught.value.shard_ids) == sorted(ids)
    assert 64 <= len(server.asked) < 100
    server = serve(whole(refusal(401, "who are you")))
    with pytest.raises(ShardClearError, match="401 body=who are you") as caught:
        delete(patient, server.address, *ids)
    assert len(server.asked) == 1, "fewer ids would not help"
    assert caught.value.shard_ids == ids


def test_an_owner_that_dies_half_way_keeps_shards_that_it_was_not_told_to_drop(
    serve: Callable[..., FaultServer], backend: HttpRTensorBackend
) -> None:
    server = serve(whole(refusal(413, "too long")), whole(DONE), hanging_up)
    with pytest.raises(ShardClearError, match=r"Failed to clear 2 of 4 shards at .* after 3 attempts") as caught:
        delete(backend, server.address, *"abcd")
    assert (caught.value.shard_ids, caught.value.statistics["cleared_count"]) == (["c", "d"], 1)


def test_odd_ids_keep_none_of_the_others(server: ServerHandle, owner: FakeOwner) -> None:
    ids: list[Any] = ["a", ["unhashable"], {"x": 1}, ("tuple", []), b"bytes", object(), None, 7, 1.5, "\ud800", "", "b"]
    owner.store.update({"a": THREE, "b": THREE, "": THREE})
    RTensor.localize(handles(server.address, "a", "b"))
    batch = [RTensor(TensorShardInfo(shard_id, server.address), THREE.to("meta")) for shard_id in ids]
    assert RTensor.collect_shards([batch, batch]) == {server.address: ids}
    told: list[Any] = []
    report = end_step(batch, told.extend)
    assert (len(owner.store), fetch_buffer_stats()) == (0, {"num_entries": 0})
    assert told == ids
    (failure,) = report.failures
    assert [type(shard_id) for shard_id in failure.shard_ids] == [bytes, object]
    assert "JSON cannot express bytes, object" in str(failure.error)
    report = end_step([])
    assert report.given_up[0].shard_ids == failure.shard_ids
    with pytest.raises(FetchError, match="JSON cannot express bytes"):
        asyncio.run(RTensor.clear_node(server.address, [b"bytes"]))


def test_an_id_that_cannot_be_a_key_changes_nothing_in_the_cache(server: ServerHandle, owner: FakeOwner) -> None:
    """It used to stop a clear half-way, with the accounts wrong."""
    owner.store["a"] = THREE
    RTensor.localize(handles(server.address, "a"))
    cache = runtime.current().cache
    with pytest.raises(TypeError, match="unhashable"):
        cache.clear(["a", ["unhashable"]])
    assert "a" in cache
    assert cache.clear(["a"]) == 1
    assert cache.buffer_stats()["cleared"] == 1


def test_a_clear_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ShardClearError("no", ["a"], {"num_tensors": 1})))
    assert (str(error), error.shard_ids, error.statistics) == ("no", ["a"], {"num_tensors": 1})
    assert json.dumps(error.statistics)
