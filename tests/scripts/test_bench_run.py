"""The benchmark as a user runs it, over a small part of its workloads: rows, messages, exit statuses."""

from __future__ import annotations

import json
import re
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import benchmark
from bench import meter, profiling, publishing, scale, trainer
from bench.owner import Owner
from bench.trainer import Trainer

from gpu_cache.rpc import RTensor
from tests.support.bench_rows import KEYS, paths_of

pytestmark = pytest.mark.scripts

# Five trajectories of rollout, a few of the others, up to 10,000 entries.
SMALL = ["--fraction", "0.01", "--rounds", "1"]
_WORKLOADS = ["rollout", "vision", "images", "scale"]  # distillation has the rows of vision


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "_SLAB_BYTES", 32 << 20)
    monkeypatch.setattr(meter, "_ALONE_S", 0.005)
    monkeypatch.setattr(meter, "_MOST_ALONE_S", 0.01)


def run(*arguments: str, device: str = "cpu") -> int:
    return benchmark.main([*SMALL, "--device", device, *arguments])


def rows_of(file: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in json.loads(file.read_text()):
        found.setdefault(row["workload"], []).append(row)
    return found


def check_rows(file: Path, *, on_gpu: bool) -> None:
    found = rows_of(file)
    assert list(found) == _WORKLOADS
    for workload in _WORKLOADS[:-1]:
        by_path = {row["path"]: row for row in found[workload] if not row["skipped"]}
        expected = [path for path in paths_of(workload, on_gpu=on_gpu) if not path.startswith("areal/own")]
        assert list(by_path) == expected
        assert all(row.keys() >= KEYS and row["num_rounds"] == 1 for row in by_path.values())
        for path, row in by_path.items():
            assert (row["lost_percent"], row["stall_ms"], row["times_quiet"]).count(None) == (0 if "+" in path else 3)
        assert by_path["raw"]["ratio_raw"] == 1
        assert by_path["defaults/step"]["ratio_raw"] is None
        tuned = [row for path, row in by_path.items() if path.startswith("tuned/")]
        assert [row["path"] for row in tuned if row["num_allocations"] or row["num_slabs"]] == []
    assert [row["skipped"] for row in found["rollout"] if row["path"] == "areal/own_hits"] == [
        "AReaL is not installed here"
    ]
    assert {row["num_entries"] for row in found["scale"]} == set(scale.SIZES[:2])
    assert all(row.keys() >= KEYS for row in found["scale"])


def test_the_cost_of_reports_is_measured(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "_STEP_S", 0.05)
    assert run("--publishing", "0.1") == 0
    assert float(re.fullmatch(r"publishing .* takes ([\d.]+) % of a core\n", capsys.readouterr().out)[1]) > 0  # type: ignore[index]


def test_every_path_of_every_workload_has_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--json", str(tmp_path / "new" / "rows.json"), "--workload", ",".join(_WORKLOADS)) == 0
    check_rows(tmp_path / "new" / "rows.json", on_gpu=False)
    said = capsys.readouterr().out
    assert "rollout: many small shards" in said
    assert "Targets" in said
    assert torch.get_num_threads() > 0


@pytest.mark.gpu
def test_on_a_gpu_there_are_rows_of_its_link_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--json", str(tmp_path / "rows.json"), "--workload", ",".join(_WORKLOADS), device="cuda") == 0
    check_rows(tmp_path / "rows.json", on_gpu=True)
    assert "memory beyond the pool" in capsys.readouterr().out
    cold = next(row for row in rows_of(tmp_path / "rows.json")["vision"] if row["path"] == "defaults/cold")
    assert cold["device_growth_bytes"] is not None
    assert cold["ratio_pinned"] > 0


def change_a_bit(batch: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    batch[-1]["logprobs"] = -batch[-1]["logprobs"]
    return batch


def test_a_step_that_reads_wrong_bits_ends_the_run_and_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reads = Trainer.reads
    monkeypatch.setattr(Trainer, "reads", staticmethod(lambda handles: map(change_a_bit, reads(handles))))
    assert run("--workload", "rollout", "--only", "defaults/step") == benchmark.EXIT_FAILED
    assert "benchmark: defaults/step: logprobs of trajectory 4" in capsys.readouterr().err


def test_single_rows_are_run_and_a_name_that_none_has_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    only = ["--only", "tuned/w*,defaults/warm+torch", "--workload", "rollout,scale"]
    assert run(*only, "--json", str(tmp_path / "rows.json")) == 0
    assert {workload: [row["path"] for row in rows] for workload, rows in rows_of(tmp_path / "rows.json").items()} == {
        "rollout": ["defaults/warm+torch", "tuned/warm"]
    }
    assert run("--workload", "scale", "--only", "nothing") == benchmark.EXIT_FAILED
    assert "no row is named nothing" in capsys.readouterr().err


def test_a_batch_that_arrives_wrong_beside_a_busy_thread_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = RTensor.localize

    def localize(handles: Any) -> Any:
        is_busy = any(thread.name == "bench-beside" for thread in threading.enumerate())
        return change_a_bit(original(handles)) if is_busy else original(handles)

    monkeypatch.setattr(RTensor, "localize", staticmethod(localize))
    assert run("--workload", "rollout", "--only", "defaults/cold*") == benchmark.EXIT_FAILED
    assert "benchmark: defaults/cold+python: logprobs of trajectory 4" in capsys.readouterr().err


def test_a_dead_owner_ends_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Owner, "restore", lambda self: self._process.kill() or self.cpu_seconds())
    assert run("--workload", "rollout") == benchmark.EXIT_FAILED
    assert "died with exit code -9" in capsys.readouterr().err


def test_a_profile_names_functions_of_both_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    py_spy = tmp_path / "py-spy"
    py_spy.write_text(f'#!{sys.executable}\nimport sys\nopen(sys.argv[-1], "w").write("main;ours 3\\nmain;other 1\\n")')
    py_spy.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(profiling, "_NUM_RUNS", 2)
    assert run("--workload", "rollout,scale", "--profile") == 0
    caller, _, rest = capsys.readouterr().out.partition("The thread that receives")
    receiver, _, sampled = rest.partition("py-spy")
    assert "(_claim_locked)" in caller
    assert "recv" in receiver
    assert " 75.0%  ours" in sampled


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workload", "pictures"], "'pictures' is none of rollout, distillation, vision, images, scale"),
        (["--rounds", "0"], "at least 1"),
        (["--fraction", "1.5"], "at most 1"),
        (["--json", "/no/such/folder/rows.json"], "/no/such/folder"),
        (["--device", "abacus"], "not here"),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        benchmark.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
