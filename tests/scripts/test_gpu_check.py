"""The GPU check, without a GPU: its options, its table, and that it tells the truth about a run of tests."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import gpu_check
from gpu import captures, machine, report, suite
from gpu.findings import Assumption, Finding, at_most, exactly, examine, examine_all
from gpu.lifetimes import Watched
from gpu.suite import Outcome, SuiteRun

from gpu_cache.device.cudart import CudaRuntime
from gpu_cache.device.events import RawEvents
from gpu_cache.pool.completion import Completion
from gpu_cache.pool.fence import StreamFence
from tests.support.check_rigs import FakeRig, SimRig
from tests.support.gpu_scene import REAL, Rig

GOOD = Finding("good", "as it should be", "so it is", True)
BAD = Finding("bad", "[never]", "always", False)
PASSED = Outcome("tests/test_a.py::test_one", "passed", 1.25, "")
SKIPPED = Outcome("tests/test_a.py::test_two[a b]", "skipped", 0.0, "Skipped: there is one GPU")
FAILED = Outcome("tests/test_b.py::test_three", "failed", 0.5, "AssertionError: assert 1 == 2\n  more")


def run_of(*outcomes: Outcome, fault: str = "") -> SuiteRun:
    return SuiteRun(outcomes, fault, "what pytest printed")


def shown(findings: Sequence[Finding], tests: SuiteRun | None) -> list[list[str]]:
    """The cells of the table that is printed, row by row."""
    text = io.StringIO()
    Console(file=text, width=200).print(report.table({"torch": "2.13"}, findings, tests))
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.getvalue().splitlines() if "│" in line]


# The table.


def test_the_table_says_what_was_expected_and_found() -> None:
    assert shown([GOOD, BAD], None) == [
        ["torch", "", "2.13", ""],
        ["good", "as it should be", "so it is", "yes"],
        ["bad", "[never]", "always", "NO"],
        ["all well", "", "1 of 2 assumptions", "NO"],
    ]


def test_the_table_has_a_row_for_each_test_and_the_bad_ones_last() -> None:
    assert shown([GOOD], run_of(FAILED, SKIPPED, PASSED))[2:] == [
        ["test_a.py::test_one", "", "passed, 1.2 s", "yes"],
        ["test_a.py::test_two[a b]", "", "skipped, 0.0 s: Skipped: there is one GPU", "yes"],
        ["test_b.py::test_three", "", "failed, 0.5 s: AssertionError: assert 1 == 2 more", "NO"],
        ["all well", "", "1 of 1 assumptions, 1 failed, 1 passed, 1 skipped", "NO"],
    ]


@pytest.mark.parametrize(
    ("findings", "tests", "is_well"),
    [
        ([GOOD], None, True),
        ([GOOD], run_of(PASSED, SKIPPED), True),
        ([BAD], run_of(PASSED), False),
        ([GOOD], run_of(PASSED, FAILED), False),
        ([GOOD], run_of(), False),
        ([GOOD], run_of(PASSED, fault="killed after 480 s"), False),
    ],
)
def test_all_is_well_only_if_everything_is(findings: list[Finding], tests: SuiteRun | None, is_well: bool) -> None:
    assert report.is_all_well(findings, tests) == is_well
    assert shown(findings, tests)[-1][-1] == ("yes" if is_well else "NO")


def test_the_json_has_all_of_it() -> None:
    found = json.loads(json.dumps(report.as_json({"torch": "2.13"}, [BAD], run_of(FAILED, fault="a fault"))))
    assert found["machine"] == {"torch": "2.13"}
    assert found["assumptions"] == [{"name": "bad", "expected": "[never]", "found": "always", "is_ok": False}]
    assert found["tests"]["outcomes"][0]["reason"] == FAILED.reason
    assert (found["tests"]["totals"], found["tests"]["fault"]) == ({"failed": 1}, "a fault")
    assert found["tests"]["output"] == "what pytest printed"
    assert found["is_ok"] is False


# The assumptions.


def test_names_are_unique_and_say_something() -> None:
    names = [assumption.name for assumption in gpu_check.ASSUMPTIONS]
    assert len(set(names)) == len(names)
    assert all(name and assumption.expected for name, assumption in zip(names, gpu_check.ASSUMPTIONS, strict=True))
    assert gpu_check.TESTS not in names


def found(name: str, figures: dict[str, Any]) -> Assumption:
    return Assumption(name, "peace", lambda rig: figures, {"wars": at_most(0)})


def raising(rig: Rig) -> dict[str, Any]:
    raise RuntimeError("CUDA error:\n out of luck")


def test_a_check_that_raises_is_a_finding() -> None:
    assert examine(Assumption("name", "peace", raising, {}), REAL).found == "RuntimeError: CUDA error: out of luck"
    assert not examine(Assumption("name", "peace", raising, {}), REAL).is_ok


def test_a_figure_that_is_missing_or_no_number_breaks_its_bound() -> None:
    assert found("name", {"wars": 0}).judge({"wars": 0}) == Finding("name", "peace (wars: at most 0)", "wars: 0", True)
    for figures, told in (({}, "wars: None (NO)"), ({"wars": float("nan")}, "wars: nan (NO)")):
        assert found("name", {}).judge(figures) == Finding("name", "peace (wars: at most 0)", told, False)


def test_a_finding_is_kept_to_a_line() -> None:
    told = examine(found("name", {"it": "long " * 1000}), REAL).found
    assert told.endswith("...")
    assert len(told) == 300


def test_those_with_a_process_of_their_own_come_first_and_the_order_stays() -> None:
    told: list[str] = []
    assumptions = [
        Assumption(name, "", lambda rig, name=name: {"it": name}, {}, is_separate=name in "bd") for name in "abcd"
    ]
    findings = examine_all(assumptions, told.append)
    assert [finding.found for finding in findings] == ["it: a", "it: b", "it: c", "it: d"]
    assert told == ["b: it: b", "d: it: d", "a: it: a", "c: it: c"]


def test_a_process_that_dies_is_an_outcome() -> None:
    assert captures.outcome(["-c", "print('some'); print('allowed')"]) == "allowed"
    dying = "import os, sys; print('last words', file=sys.stderr, flush=True); os.abort()"
    assert captures.outcome(["-c", dying]) == "the process ended with status -6: last words"
    assert captures.outcome(["-c", "pass"]) == "it printed nothing"


def test_a_capture_is_looked_at_in_a_process_of_its_own() -> None:
    if machine.torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (assumption,) = [one for one in gpu_check.ASSUMPTIONS if one.name == "our query beside a capture"]
    finding = examine(assumption, REAL)
    assert not finding.is_ok
    assert re.match(r"outcome: the process ended with status 1: .*(CUDA|NVIDIA)", finding.found)


def test_without_a_gpu_every_check_fails_and_none_raises() -> None:
    if machine.torch.cuda.is_available():
        pytest.skip("there is a GPU")
    local = [assumption for assumption in gpu_check.ASSUMPTIONS if not assumption.is_separate]
    assert not any(finding.is_ok for finding in examine_all(local, lambda text: None))


# Each check, its figures on an H100 where they were seen, and for each bound one that breaks it.
OUTCOMES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lifetime hook": (
        {"fired after each step": [0, 1, 1, 2], "the last one on": "another thread", "fires in order": True},
        {"fired after each step": [1, 1, 2, 2], "the last one on": "this thread", "fires in order": False},
    ),
    "block layout": (
        dict.fromkeys(BLOCK_FACTS := (
            "arena at a multiple of 512", "block at its offset", "storage of its own", "resize refused", "lease fired",
        ), True),
        dict.fromkeys(BLOCK_FACTS, False),
    ),
    "streams enumerated": ({"missed": 0}, {"missed": 32}),
    "reuse race": (
        {"corrupt without the fence": 4, "corrupt with it": 0},
        {"corrupt without the fence": 0, "corrupt with it": 1},
    ),
    "Tensor.record_stream": ({"corrupt all the same": 4}, {"corrupt all the same": 0}),
    "ready=stream": (
        {"stale": 0, "stale without the wait": 4, "waits of the host": 0},
        {"stale": 1, "stale without the wait": 0, "waits of the host": 4},
    ),
    **dict.fromkeys(
        ("query in a capture", "wait in a capture", "query beside a capture"),
        ({"outcome": "refused: AcceleratorError: CUDA error"}, {"outcome": "refused: TypeError: no such argument"}),
    ),
    **dict.fromkeys(
        ("our query beside a capture", "our arena beside a capture", "our buffer beside a capture"),
        ({"outcome": "allowed"}, {"outcome": "refused: RuntimeError: not permitted"}),
    ),
    "pool dies in a capture": (
        {"outcome": "the process ended with status -6: terminate called"},
        {"outcome": "the process ended with status 1: AttributeError: no pools"},
    ),
    "capture begins under the fence": (
        {"outcome": "allowed, then the right bytes"}, {"outcome": "allowed, then wrong bytes"},
    ),
    "pool memory": ({"MiB taken": 256.0, "MiB not given back": 2.0}, {"MiB taken": 0.0, "MiB not given back": -64.0}),
    "small arena": ({"MiB each": 20.0, "MiB not given back": 0.0}, {"MiB each": 32.0, "MiB not given back": 160.0}),
    "pinned rounding": ({"bytes too many": 0, "is pinned": True}, {"bytes too many": 4095, "is pinned": False}),
    "pinning": (
        {"is pinned": True, "is pinned afterwards": False}, {"is pinned": False, "is pinned afterwards": True},
    ),
    "sticky error": (
        {"ours is refused": True, "the kernel after ours": "works"},
        {"ours is refused": False, "the kernel after ours": "fails (CUDA error: 712)"},
    ),
    "bandwidth": (
        {"of torch's pinned": 1.0, "of pageable": 54.3 / 6.4}, {"of torch's pinned": 0.7, "of pageable": 0.9},
    ),
    "cache throughput": (
        {"of the pinned peak": 0.89, "us a small shard": 12.0, "is pinned": True},
        {"of the pinned peak": 0.78, "us a small shard": 26.0, "is pinned": False},
    ),
    "event costs": (
        {"record": 5.0, "query": 3.0, "is capturing": 4.0, "current stream": 0.4},
        {"record": 47.5, "query": 11.0, "is capturing": 12.5, "current stream": 4.0},
    ),
    "fence costs": ({"all, record": 173.0, "all, query": 52.0}, {"all, record": 6113.0, "all, query": 1400.0}),
    "block costs": ({"insert": 1.9, "hit, a shard": 1.0}, {"insert": 7.0, "hit, a shard": 240.0}),
}  # fmt: skip


@pytest.mark.parametrize("assumption", gpu_check.ASSUMPTIONS, ids=lambda one: one.name)
def test_each_bound_of_each_check_can_be_broken(assumption: Assumption) -> None:
    good, bad = OUTCOMES[assumption.name]
    assert assumption.judge(good).is_ok
    assert bad.keys() == assumption.bounds.keys() > set()
    for name, value in bad.items():
        finding = assumption.judge({**good, name: value})
        assert not finding.is_ok
        assert finding.found.count("(NO)") == 1


# Where streams must lag, which those of the fake do not.
SIMULATED = ("reuse race", "Tensor.record_stream", "ready=stream")
# Bounded, and not to be had from a fake.
NOT_ON_A_FAKE = {
    ("lifetime hook", "the last one on"): "on the CPU, backward runs on the caller's thread",
    ("bandwidth", "of torch's pinned"): "a time",
    ("bandwidth", "of pageable"): "a time",
    ("cache throughput", "of the pinned peak"): "a time",
    ("cache throughput", "us a small shard"): "a time",
    **{("event costs", name): "a time" for name in ("record", "query", "is capturing", "current stream")},
    ("fence costs", "all, record"): "a time",
    ("fence costs", "all, query"): "a time",
    ("block costs", "insert"): "a time",
    ("block costs", "hit, a shard"): "a time",
}
FORBIDDEN = {"pool dies in a capture": ["a pool died during a capture or inside another pool: the process ends"]}


@pytest.mark.parametrize("assumption", gpu_check.ASSUMPTIONS, ids=lambda one: one.name)
def test_each_check_runs_on_a_fake(assumption: Assumption, tmp_path: Path) -> None:
    rig = SimRig() if assumption.name in SIMULATED else FakeRig(tmp_path)
    figures = assumption.look(rig)
    assert figures.keys() >= assumption.bounds.keys()
    timed = {name for name in assumption.bounds if (assumption.name, name) in NOT_ON_A_FAKE}
    assert [name for name in assumption.bounds if assumption.is_broken(name, figures) and name not in timed] == []
    assert all(figures[name] == "this thread" or figures[name] > 0 for name in timed)
    if isinstance(rig, FakeRig):
        assert rig.cuda.violations == FORBIDDEN.get(assumption.name, [])


def without_pinning(rig: Any, patch: pytest.MonkeyPatch) -> None:
    rig.cuda._pin_limit_bytes = 0


def without_giving_back(rig: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(rig.device, "release_arena", lambda arena, keep=[]: keep.append(arena))


def without_care_for_captures(rig: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(rig.device._runtime, "beside_captures", contextlib.nullcontext)


def without_the_fence(rig: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(StreamFence, "record", lambda fence: [])


# What is wrong with the library or with torch, and the figure that tells.
FAULTS: list[tuple[str, str, Callable[[Any, pytest.MonkeyPatch], object]]] = [
    ("lifetime hook", "fired after each step", lambda rig, patch: patch.setattr(Watched, "append", lambda *_: None)),
    ("block layout", "resize refused", lambda rig, patch: patch.setattr(torch.Tensor, "resize_", lambda *_: None)),
    (
        "streams enumerated",
        "missed",
        lambda rig, patch: patch.setattr(rig.device, "_streams", rig.device._streams[:-1]),
    ),
    ("reuse race", "corrupt with it", without_the_fence),
    (
        "Tensor.record_stream",
        "corrupt all the same",
        lambda rig, patch: patch.setattr(rig, "record_stream", lambda block, stream: rig.synchronize()),
    ),
    ("ready=stream", "stale", lambda rig, patch: patch.setattr(Completion, "wait_on", lambda *_: None)),
    ("our query beside a capture", "outcome", without_care_for_captures),
    ("our arena beside a capture", "outcome", without_care_for_captures),
    ("our buffer beside a capture", "outcome", without_care_for_captures),
    (
        "capture begins under the fence",
        "outcome",
        lambda rig, patch: patch.setattr(RawEvents, "discard", lambda *_: None),
    ),
    ("pool memory", "MiB not given back", without_giving_back),
    ("small arena", "MiB not given back", without_giving_back),
    ("pinned rounding", "is pinned", without_pinning),
    ("pinning", "is pinned", without_pinning),
    (
        "sticky error",
        "the kernel after ours",
        lambda rig, patch: patch.setattr(CudaRuntime, "_checked", lambda _, code: code),
    ),
    ("cache throughput", "is pinned", without_pinning),
]


@pytest.mark.parametrize(("name", "figure", "plant"), FAULTS, ids=[name for name, _, _ in FAULTS])
def test_a_planted_fault_fails_the_check_that_looks_for_it(
    name: str, figure: str, plant: Callable[[Any, pytest.MonkeyPatch], object], tmp_path: Path
) -> None:
    (assumption,) = [one for one in gpu_check.ASSUMPTIONS if one.name == name]
    rig = SimRig() if name in SIMULATED else FakeRig(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        plant(rig, patch)
        figures = assumption.look(rig)
    assert assumption.is_broken(figure, figures), figures


def test_the_driver_is_told_or_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(machine, "_DRIVER", tmp_path / "version")
    assert machine.driver_version() == "unknown"
    (tmp_path / "version").write_text("NVRM version: 580\nGCC\n")
    assert machine.driver_version() == "NVRM version: 580"


# The command.


@pytest.fixture
def as_if_there_were_a_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two assumptions, and tests that pass, on a machine with a GPU; a test may change what they say."""
    found: dict[str, Any] = {"good": True, "odd": True, "tests": run_of(PASSED)}
    looks = [
        Assumption(name, "good", lambda rig, name=name: {"is so": found[name]}, {"is so": exactly(True)})
        for name in ("good", "odd")
    ]
    monkeypatch.setattr(gpu_check, "ASSUMPTIONS", looks)
    monkeypatch.setattr(gpu_check, "versions", lambda: {"torch": "2.13"})
    monkeypatch.setattr(gpu_check, "run_suite", lambda: found["tests"])
    for name in ("init", "empty_cache"):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    return found


def test_without_a_gpu_it_says_so_in_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_check.main([]) == gpu_check.EXIT_NO_GPU == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "sees no CUDA device" in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.usefixtures("as_if_there_were_a_gpu")
def test_one_command_looks_tests_prints_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "found.json"
    assert gpu_check.main(["--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("2.13", "odd", "test_a.py::test_one", "2 of 2 assumptions, 1 passed"))
    found = json.loads(path.read_text())
    assert (len(found["assumptions"]), found["tests"]["totals"], found["is_ok"]) == (2, {"passed": 1}, True)


@pytest.mark.parametrize(("name", "value"), [("odd", False), ("tests", run_of(PASSED, FAILED))])
def test_it_fails_if_anything_does(as_if_there_were_a_gpu: dict[str, Any], name: str, value: Any) -> None:
    as_if_there_were_a_gpu[name] = value
    assert gpu_check.main([]) == gpu_check.EXIT_NOT_WELL == 1


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--no-tests"], ["good", "odd"]),
        (["--only", "odd"], ["odd"]),
        (["--only", "tests"], ["test_one"]),
        (["--only", "good", "--only", "tests"], ["good", "test_one"]),
    ],
)
@pytest.mark.usefixtures("as_if_there_were_a_gpu")
def test_parts_can_be_left_out(arguments: list[str], names: list[str], capsys: pytest.CaptureFixture) -> None:
    assert gpu_check.main(arguments) == 0
    rows = [line.split("│")[1].strip().split("::")[-1] for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert [row for row in rows if row in ("good", "odd", "test_one")] == names


def test_senseless_options_are_refused_before_anything_runs(capsys: pytest.CaptureFixture) -> None:
    for arguments, complaint in ((["--only", "nothing"], "reuse race"), (["--json", "/no/such/x"], "no such folder")):
        with pytest.raises(SystemExit, match="2"):
            gpu_check.main(arguments)
        assert complaint in capsys.readouterr().err


# The run of the tests.

TESTS = """
import os, pytest
pytestmark = pytest.mark.gpu

def test_good():
    assert os.environ["GPU_CACHE_REQUIRE_GPU"] == "1"

@pytest.mark.parametrize("one", ["a b"])
def test_bad(one):
    assert one == "b"

def test_left_out():
    pytest.skip("no reason")

@pytest.fixture
def untidy():
    yield
    assert not "tidy"

def test_untidy(untidy):
    pass

def test_bad_and_untidy(untidy):
    assert not "good"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    return tmp_path


def outcomes(run: SuiteRun) -> dict[str, str]:
    return {outcome.test.split("::")[-1]: outcome.outcome for outcome in run.outcomes}


def test_each_outcome_is_told_with_its_reason(folder: Path) -> None:
    (folder / "test_some.py").write_text(TESTS)
    (folder / "test_other.py").write_text("import no_such_module\n")
    run = suite.run_suite(folder)
    assert outcomes(run) == {
        "test_good": "passed", "test_bad[a b]": "failed", "test_left_out": "skipped", "test_untidy": "error",
        "test_bad_and_untidy": "failed", outcomes_key(run): "error",
    }  # fmt: skip
    reasons = {outcome.test.split("::")[-1]: outcome.reason for outcome in run.outcomes}
    assert "assert 'a b' == 'b'" in reasons["test_bad[a b]"]
    assert "no reason" in reasons["test_left_out"]
    assert "tidy" not in reasons["test_bad_and_untidy"]
    assert "no_such_module" in reasons[outcomes_key(run)]
    assert run.totals == {"passed": 1, "failed": 2, "skipped": 1, "error": 2}
    assert (run.fault, run.is_ok) == ("", False)
    assert "short test summary" in run.output


def outcomes_key(run: SuiteRun) -> str:
    """The file that could not be read, which is no test."""
    return next(name for name in outcomes(run) if name.endswith(".py"))


def test_a_run_that_crashes_says_what_it_did_before(folder: Path) -> None:
    (folder / "test_some.py").write_text(TESTS + "\ndef test_crash():\n    os.abort()\n")
    run = suite.run_suite(folder)
    assert outcomes(run)["test_good"] == "passed"
    assert (run.fault, run.is_ok) == ("pytest ended with status -6", False)


def test_a_hanging_run_is_killed_with_its_children() -> None:
    hanging = "import subprocess, sys, time; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    reader, writer = os.pipe()
    fault = suite._run([sys.executable, "-c", hanging], dict(os.environ), writer, 1.0)
    os.close(writer)
    assert fault == "killed after 1 s"
    assert os.read(reader, 1) == b"", "a process that it started still has the other end"
    os.close(reader)


def test_a_run_without_tests_is_not_well(folder: Path) -> None:
    run = suite.run_suite(folder)
    assert (run.outcomes, run.fault, run.is_ok) == ([], "pytest ended with status 5", False)
