"""The Ray backend over two nodes: two raylets of this machine, each with a store of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from gpu_cache import FetchError
from gpu_cache.rpc.rtensor import RTensor, ShardMissingError, buffer_stats
from tests.beside_ray.conftest import STORE_BYTES
from tests.support.ray_actors import Worker, remote

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


class Nodes(NamedTuple):
    ray: Any
    cluster: Any
    second: Any
    far: Any  # a worker on the second


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    ray = pytest.importorskip("ray", reason="needs Ray: make ray")
    utils = pytest.importorskip("ray.cluster_utils")
    first = {"num_cpus": 2, "object_store_memory": STORE_BYTES, "include_dashboard": False}
    cluster = utils.Cluster(initialize_head=True, head_node_args=first)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    second = cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES, resources={"second": 1})
    far = ray.remote(Worker).options(resources={"second": 1}).remote()
    yield Nodes(ray, cluster, second, far)
    ray.shutdown()
    cluster.shutdown()


def test_shards_of_another_node_arrive(nodes: Nodes) -> None:
    handles = nodes.ray.get(nodes.far.store.remote(300, 9000))
    found = RTensor.localize(remote(handles))
    assert [int(tensor[-1]) for tensor in found] == [number % 251 for number in range(300)]
    mine = RTensor.remotize(found, "")
    assert nodes.ray.get(nodes.far.read.remote(mine)) == [bytes([number % 251]) * 9000 for number in range(300)]
    asyncio.run(RTensor.clear_everywhere([mine, handles], [lambda ids: nodes.ray.get(nodes.far.clear.remote(ids))]))
    assert buffer_stats()["num_entries"] == 0


def test_shards_of_a_node_that_died_fail_with_a_reason(nodes: Nodes) -> None:
    lost = nodes.ray.get(nodes.far.store.remote(2, 1 << 20))
    mine = RTensor.remotize([torch.zeros(9)], "")
    nodes.cluster.remove_node(nodes.second, allow_graceful=False)
    with pytest.raises(FetchError) as caught:
        RTensor.localize(remote([*lost, *mine]), timeout_s=40)
    assert set(caught.value.failures) == {one.shard.shard_id for one in lost}
    for error in caught.value.failures.values():
        assert isinstance(error, ShardMissingError)
        assert "from ray: " in str(error)
        assert str(error).partition("from ray: ")[2]
    assert RTensor.localize(remote(mine))[0].tolist() == [0] * 9
