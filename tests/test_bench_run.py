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

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import benchmark
from bench import profiling, publishing, scale, trainer
from bench.owner import Owner
from bench.trainer import Trainer

from areal.infra.rpc import RTensor
from tests.support.bench_rows import DEVICE_PATHS, HOST_PATHS, KEYS

# Five trajectories of W1, a few of the others, up to 10,000 entries.
SMALL = ["--fraction", "0.01", "--rounds", "1"]


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "_SLAB_BYTES", 32 << 20)


def run(*arguments: str, device: str = "cpu") -> int:
    return benchmark.main([*SMALL, "--device", device, *arguments])


def rows_of(file: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in json.loads(file.read_text()):
        found.setdefault(row["workload"], []).append(row)
    return found


def check_rows(file: Path, paths: list[str]) -> None:
    found = rows_of(file)
    assert list(found) == ["W1", "W2", "W3", "W4"]
    for workload in ("W1", "W2", "W3"):
        assert [row["path"] for row in found[workload]] == paths
        by_path = {row["path"]: row for row in found[workload]}
        assert all(row.keys() >= KEYS and row["num_rounds"] == 1 for row in by_path.values())
        assert all((row["lost_percent"] is not None) == ("busy" in path) for path, row in by_path.items())
        assert by_path["raw"]["ratio_raw"] == by_path["json"]["ratio_json"] == 1
        assert by_path["clear"]["ratio_raw"] is by_path["warm"]["gb_per_s"] is None
        assert all(by_path[path]["num_allocations"] == 0 for path in ("cold", "cold4", "prefetch", "warm"))
    assert {row["num_entries"] for row in found["W4"]} == set(scale.SIZES[:2])
    assert all(row.keys() >= KEYS for row in found["W4"])


def test_the_cost_of_reports_is_measured(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "_STEP_S", 0.05)
    assert run("--publishing", "0.1") == 0
    assert float(re.fullmatch(r"publishing .* takes ([\d.]+) % of a core\n", capsys.readouterr().out)[1]) > 0  # type: ignore[index]


def test_every_path_of_every_workload_has_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--json", str(tmp_path / "new" / "rows.json")) == 0
    check_rows(tmp_path / "new" / "rows.json", HOST_PATHS)
    said = capsys.readouterr().out
    assert "W1 rollout" in said
    assert "Targets" in said
    assert torch.get_num_threads() > 0


@pytest.mark.gpu
def test_on_a_gpu_there_are_rows_of_its_link_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--json", str(tmp_path / "rows.json"), device="cuda") == 0
    check_rows(tmp_path / "rows.json", HOST_PATHS + DEVICE_PATHS)
    assert "memory beyond the pool" in capsys.readouterr().out
    cold = next(row for row in rows_of(tmp_path / "rows.json")["W3"] if row["path"] == "cold")
    assert cold["device_growth_bytes"] is not None
    assert cold["ratio_pinned"] > 0


def change_a_bit(batch: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    batch[-1]["logprobs"] = -batch[-1]["logprobs"]
    return batch


@pytest.mark.parametrize(
    ("name", "method", "spoil"),
    [
        ("cold4: brought 4 trajectories, not 5", "localize_in_parts", lambda batch: batch[1:]),
        ("prefetch: logprobs of trajectory 4", "prefetch_and_localize", change_a_bit),
    ],
)
def test_a_broken_path_ends_the_run_and_is_named(
    name: str, method: str, spoil: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = getattr(Trainer, method)
    monkeypatch.setattr(Trainer, method, staticmethod(lambda *arguments: spoil(original(*arguments))))
    assert run("--workload", "W1") == benchmark.EXIT_FAILED
    assert f"benchmark: {name}" in capsys.readouterr().err


def test_a_batch_that_arrives_wrong_beside_a_busy_thread_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = RTensor.localize

    def localize(handles: Any) -> Any:
        is_busy = any(thread.name == "bench-beside" for thread in threading.enumerate())
        return change_a_bit(original(handles)) if is_busy else original(handles)

    monkeypatch.setattr(RTensor, "localize", staticmethod(localize))
    assert run("--workload", "W1") == benchmark.EXIT_FAILED
    assert "benchmark: cold_busy_python: logprobs of trajectory 4" in capsys.readouterr().err


def test_a_dead_owner_ends_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Owner, "restore", lambda self: self._process.kill() or self.cpu_seconds())
    assert run("--workload", "W1") == benchmark.EXIT_FAILED
    assert "died with exit code -9" in capsys.readouterr().err


def test_a_profile_names_functions_of_both_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    py_spy = tmp_path / "py-spy"
    py_spy.write_text(f'#!{sys.executable}\nimport sys\nopen(sys.argv[-1], "w").write("main;ours 3\\nmain;other 1\\n")')
    py_spy.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(profiling, "_NUM_RUNS", 2)
    assert run("--workload", "W1,W4", "--profile") == 0
    caller, _, rest = capsys.readouterr().out.partition("The thread that receives")
    receiver, _, sampled = rest.partition("py-spy")
    assert "(claim)" in caller
    assert "recv" in receiver
    assert " 75.0%  ours" in sampled


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workload", "W9"], "'W9' is none of W1, W2, W3, W4"),
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
