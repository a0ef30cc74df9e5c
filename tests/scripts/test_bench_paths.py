"""Does the benchmark find wrong bits, and do the paths that only a GPU has bring the right ones?"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch

sys.path.insert(0, str(FilePath(__file__).resolve().parents[2] / "scripts"))

from bench import trainer
from bench.exactness import BenchError, Original
from bench.gpu_paths import Link, gpu_paths
from bench.hits import hit_paths
from bench.json_client import JsonClient
from bench.paths import JsonPart, Path, Trainers, storing_path, variants
from bench.rounds import Plan, rows, run_rounds
from bench.workloads import Workload, make_workload

from gpu_cache.rpc import RTensor, runtime, serialize_value
from tests.support.bench_rows import DEVICE_PATHS, HIT_PATHS, a_meter


@pytest.fixture(scope="module")
def workload() -> Workload:
    return make_workload("rollout", 3 / 512)


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
def trainers(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trainers]:
    monkeypatch.setattr(trainer, "_SLAB_BYTES", 1 << 20)
    handles = json.dumps(serialize_value(RTensor.remotize(list(workload.trajectories()), "owner:1")))
    both = Trainers(
        trainer.Trainer.at_defaults(workload, handles),
        trainer.Trainer.tuned(workload, handles, "cpu"),
        trainer.Trainer.at_defaults(workload, handles, same_host=True),
    )
    yield both
    for one in (both.defaults, both.tuned, both.same_host):
        one.check_pool()
        one.close()


@pytest.fixture
def device_paths(workload: Workload, trainers: Trainers) -> dict[str, Path]:
    link = Link("cpu", pinned=torch.clone, synchronize=lambda device: None)
    client: Any = FakeClient(workload)
    part = JsonPart.of(workload, client, [f"shard {n}" for n in range(workload.num_shards)], 1)
    return {path.name: path for path in gpu_paths(workload, trainers, Original(workload), part, link)}


def test_paths_of_a_gpu_bring_the_right_bytes(device_paths: dict[str, Path], workload: Workload) -> None:
    assert list(device_paths) == DEVICE_PATHS
    courses = run_rounds(list(device_paths.values()), Plan(2, 2, 0), a_meter(), lambda name: None)
    found = {row["path"]: row for row in rows("rollout", workload.nbytes, courses)}
    assert all(row["ratio_pinned"] > 0 for path, row in found.items() if path != "defaults/get_clear_30")
    assert found["upstream_cold"]["measured_bytes"] < workload.nbytes == found["tuned/pipeline"]["measured_bytes"]


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("pinned_peak", lambda found: found.flip(0)),
        ("defaults/pipeline", lambda found: found[1:]),
        ("defaults/get_clear_30", lambda found: found - 1),
        ("upstream_cold", lambda found: found[6:]),
        ("upstream_second", lambda found: [found[0] + 1, *found[1:]]),
        ("upstream_second", lambda found: found[1:]),
    ],
)
def test_a_path_of_a_gpu_that_brings_something_else_is_reported(
    device_paths: dict[str, Path], name: str, spoil: Any
) -> None:
    path = device_paths[name]
    result = path.run(path.prepare())
    path.check(name, result)
    with pytest.raises(BenchError, match=name):
        path.check(name, spoil(result))


# Hits, beside AReaL's.

AREAL = """
import threading
from dataclasses import dataclass
from typing import Any
import areal.other
_fetch_buffer = {}
@dataclass
class TensorShardInfo:
    shard_id: Any
    node_addr: str
@dataclass
class RTensor:
    shard: TensorShardInfo
    data: Any
    @staticmethod
    def localize(handles):
        for handle in handles:
            handle.data = _fetch_buffer[handle.shard.shard_id]
        return [handle.data for handle in handles]
"""


@pytest.fixture
def installed_areal(tmp_path: FilePath) -> FilePath:
    package = tmp_path / "areal" / "infra" / "rpc"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (tmp_path / "areal" / "other.py").touch()
    (package / "rtensor.py").write_text(AREAL)
    return tmp_path


def test_areals_own_code_runs_beside_ours_where_it_is_installed(
    workload: Workload, trainers: Trainers, installed_areal: FilePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = sys.modules["gpu_cache.rpc.rtensor"]
    monkeypatch.syspath_prepend(installed_areal)
    own = {path.name: path for path in hit_paths(workload, trainers.defaults)}["areal/own_hits"]
    assert sys.modules["gpu_cache.rpc.rtensor"] is ours
    assert "areal.other" not in sys.modules
    own.check(own.name, own.run(own.prepare()))


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import no_such_module", "cannot be imported: ModuleNotFoundError"),
        ("", "has no attribute '_fetch_buffer'"),
        ("from gpu_cache.rpc import RTensor", "is another checkout of this project"),
    ],
)
def test_the_row_of_an_areal_that_cannot_run_says_why(
    workload: Workload, trainers: Trainers, installed_areal: FilePath, monkeypatch: pytest.MonkeyPatch,
    code: str, reason: str,
) -> None:  # fmt: skip
    (installed_areal / "areal" / "infra" / "rpc" / "rtensor.py").write_text(code)
    monkeypatch.syspath_prepend(installed_areal)
    own = {path.name: path for path in hit_paths(workload, trainers.defaults)}["areal/own_hits"]
    assert reason in own.reason


def test_all_hits_bring_the_batch(workload: Workload, trainers: Trainers, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime.current().add_own_address("owner:1")
    paths = hit_paths(workload, trainers.defaults)
    assert [path.name for path in variants(paths, "cpu") if not path.reason] == [
        name for name in HIT_PATHS if "own" not in name
    ]
    for path in paths:
        if not path.reason:
            found = path.run(path.prepare())
            path.check(path.name, found)
            with pytest.raises(BenchError, match=f"{path.name}: brought 17 tensors, not 18"):
                path.check(path.name, found[1:])
    runtime.current().remove_own_address("owner:1")


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


def test_storing_is_timed_with_copies_that_are_looked_at(workload: Workload, trainers: Trainers) -> None:
    path = storing_path(workload, trainers.defaults, Original(workload))
    path.prepare()
    handles = path.run(None)
    path.check(path.name, handles)
    with pytest.raises(BenchError, match="defaults/remotize: brought 2 trajectories, not 3"):
        path.check(path.name, handles[1:])
    path.finish()
    assert len(runtime.current().store) == 0
