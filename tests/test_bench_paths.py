"""Does the benchmark find wrong bits, and do the paths that only a GPU has bring the right ones?"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch

sys.path.insert(0, str(FilePath(__file__).resolve().parents[1] / "scripts"))

from bench import trainer
from bench.exactness import BenchError, Original
from bench.gpu_paths import Link, gpu_paths
from bench.json_client import JsonClient
from bench.paths import JsonPart, Path
from bench.rounds import Plan, rows, run_rounds
from bench.workloads import Workload, make_workload

from tests.support.bench_rows import DEVICE_PATHS, a_meter


@pytest.fixture(autouse=True)
def little_garbage() -> Iterator[None]:
    """Each measurement begins with a collection: let it not look at what other tests left."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def workload() -> Workload:
    return make_workload("W1", 3 / 512)


@pytest.fixture
def batch(workload: Workload) -> list[dict[str, torch.Tensor]]:
    return list(workload.trajectories())


def test_equal_batches_pass(workload: Workload, batch: list[dict[str, torch.Tensor]]) -> None:
    Original(workload).check_batch("cold", batch, 3)


def flip_a_bit(batch: list[dict[str, torch.Tensor]]) -> None:
    batch[2]["logprobs"].view(torch.int32)[0, -1] ^= 1


def change_a_dtype(batch: list[dict[str, torch.Tensor]]) -> None:
    batch[1]["versions"] = batch[1]["versions"].view(torch.float32)


def drop_a_tensor(batch: list[dict[str, torch.Tensor]]) -> None:
    del batch[0]["rewards"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (flip_a_bit, "cold: logprobs of trajectory 2"),
        (change_a_dtype, "cold: versions of trajectory 1"),
        (drop_a_tensor, "cold: trajectory 0 has"),
        (list.pop, "cold: brought 2 trajectories, not 3"),
    ],
)
def test_any_difference_is_found(
    workload: Workload, batch: list[dict[str, torch.Tensor]], spoil: Any, message: str
) -> None:
    spoil(batch)
    with pytest.raises(BenchError, match=message):
        Original(workload).check_batch("cold", batch, 3)


def test_bytes_are_compared_too(workload: Workload) -> None:
    original = Original(workload)
    original.check_bytes("raw", original.joined.clone())
    with pytest.raises(BenchError, match="raw: "):
        original.check_bytes("raw", original.joined.flip(0))


# Paths of a GPU.


class FakeClient:
    """Brings tensors of the first trajectories."""

    def __init__(self, workload: Workload) -> None:
        self._tensors = [tensor for trajectory in workload.trajectories() for tensor in trajectory.values()]

    def fetch(self, shard_ids: list[str]) -> list[torch.Tensor]:
        return self._tensors[: len(shard_ids)]


@pytest.fixture
def device_paths(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Path]]:
    monkeypatch.setattr(trainer, "_SLAB_BYTES", 1 << 20)
    link = Link("cpu", pinned=torch.clone, synchronize=lambda device: None)
    client: Any = FakeClient(workload)
    part = JsonPart.of(workload, client, [f"shard {n}" for n in range(workload.num_shards)], 1)
    owner = trainer.Trainer(workload, "[]", "cpu")
    yield {path.name: path for path in gpu_paths(workload, owner, Original(workload), part, link)}
    owner.check_pool()
    owner.close()


def test_paths_of_a_gpu_bring_what_they_should(device_paths: dict[str, Path], workload: Workload) -> None:
    assert list(device_paths) == DEVICE_PATHS
    courses = run_rounds(list(device_paths.values()), Plan(2, 2, 0), a_meter(), lambda name: None)
    found = {row["path"]: row for row in rows("W1", workload.nbytes, courses)}
    assert all(row["ratio_pinned"] > 0 for row in found.values())
    assert found["upstream_cold"]["measured_bytes"] < workload.nbytes == found["pipeline"]["measured_bytes"]


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("pinned_peak", lambda found: found.flip(0)),
        ("pipeline", lambda found: found[1:]),
        ("upstream_cold", lambda found: found[6:]),
        ("upstream_second", lambda found: [found[0] + 1, *found[1:]]),
    ],
)
def test_a_path_of_a_gpu_that_brings_something_else_is_reported(
    device_paths: dict[str, Path], name: str, spoil: Any
) -> None:
    path = device_paths[name]
    result = path.run(path.prepare())
    path.check(result)
    with pytest.raises(BenchError, match=name):
        path.check(spoil(result))


def test_the_json_form_brings_as_many_trajectories_as_its_bytes_allow(workload: Workload) -> None:
    ids = [f"shard {n}" for n in range(workload.num_shards)]
    client: Any = object()
    first = sum(workload.trajectory_bytes(workload.lengths[0]))
    assert JsonPart.of(workload, client, ids, first).num_trajectories == 1
    assert JsonPart.of(workload, client, ids, first + 1).num_trajectories == 2
    assert JsonPart.of(workload, client, ids, 1e12).nbytes == workload.nbytes


def test_a_json_client_without_an_owner_says_so() -> None:
    client = JsonClient("127.0.0.1:1")
    with pytest.raises(ConnectionError):
        client.fetch(["shard"])
    client.close()


def test_the_link_waits_until_everything_is_there() -> None:
    waits: list[torch.device] = []
    link = Link("cpu", pinned=torch.clone, synchronize=waits.append)
    tensor = torch.arange(3)
    assert torch.equal(link.copy(torch.zeros_like(tensor), link.pinned(tensor)), tensor)
    assert torch.equal(link.move([tensor])[0], tensor)
    assert waits == [torch.device("cpu")] * 2
