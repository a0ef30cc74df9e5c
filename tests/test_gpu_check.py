"""The GPU check, without a GPU: its options, its table, and that it tells the truth about a run of tests."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import gpu_check
from gpu import captures, costs, lifetimes, machine, report, suite
from gpu.findings import Assumption, Finding, examine, examine_all
from gpu.suite import Outcome, SuiteRun

from tests.support.cuda_devices import cuda_device
from tests.support.fake_cuda import FakeCuda

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


def raising() -> tuple[bool, str]:
    raise RuntimeError("CUDA error:\n out of luck")


def test_a_check_that_raises_is_a_finding() -> None:
    assert examine(Assumption("name", "peace", raising)) == Finding(
        "name", "peace", "RuntimeError: CUDA error: out of luck", False
    )


def test_what_is_found_is_kept_to_a_line() -> None:
    found = examine(Assumption("name", "", lambda: (True, "long " * 1000))).found
    assert found.endswith("...")
    assert len(found) == 300


def test_those_with_a_process_of_their_own_come_first_and_the_order_stays() -> None:
    def look(name: str) -> Callable[[], tuple[bool, str]]:
        return lambda: (True, name)

    told: list[str] = []
    assumptions = [Assumption(name, "", look(name), is_separate=name in "bd") for name in "abcd"]
    found = examine_all(assumptions, told.append)
    assert [finding.found for finding in found] == ["a", "b", "c", "d"]
    assert told == ["b: b", "d: d", "a: a", "c: c"]


def test_a_process_that_dies_is_an_outcome() -> None:
    assert captures.look("print('some'); print('allowed: all')", "allowed") == (True, "allowed: all")
    assert captures.look("print('refused')", "allowed") == (False, "refused")
    is_fine, found = captures.look("import os, sys; print('last words', file=sys.stderr, flush=True); os.abort()", "x")
    assert (is_fine, found) == (False, "the process ended with status -6: last words")
    assert captures.outcome("pass") == "it printed nothing"


@pytest.mark.parametrize(
    "assumption", [one for one in gpu_check.ASSUMPTIONS if one.is_separate], ids=lambda one: one.name
)
def test_the_programs_of_separate_checks_are_python(assumption: Assumption) -> None:
    look: Any = assumption.look
    compile(look.args[0], assumption.name, "exec")


def test_without_a_gpu_every_check_fails_and_none_raises() -> None:
    if machine.torch.cuda.is_available():
        pytest.skip("there is a GPU")
    local = [assumption for assumption in gpu_check.ASSUMPTIONS if not assumption.is_separate]
    assert not any(finding.is_ok for finding in examine_all(local, lambda text: None))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeCuda:
    """What the checks of costs and blocks ask for, on the fake device."""
    cuda = FakeCuda()
    for module in (costs, lifetimes):
        monkeypatch.setattr(module, "CudaDevice", lambda index: cuda_device(cuda, tmp_path))
        monkeypatch.setattr(module, "GPU", torch.device("cpu"))
    monkeypatch.setattr("torch.cuda.synchronize", lambda device=None: cuda.advance())
    return cuda


def test_a_block_is_carved_as_the_pool_carves_it(fake: FakeCuda) -> None:
    found = lifetimes.look_at_the_block()[1]
    assert found == "not so: arena at a multiple of 512" or not found.startswith("not so"), "host memory lies anywhere"
    found = lifetimes.look_at_the_hook()[1]
    assert found.startswith("fired [0, 1, 1, 2] times"), found


@pytest.mark.parametrize(("most_us", "is_ok"), [(1e9, True), (0.0, False)])
def test_a_fence_that_costs_too_much_fails_its_check(
    fake: FakeCuda, most_us: float, is_ok: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "_MOST_FENCE_US", most_us)
    found = costs.look_at_the_fence()
    assert found[0] == is_ok
    assert found[1].startswith("all: 129 events")


def test_calls_that_cost_too_much_fail_their_check() -> None:
    assert costs.is_cheap({"record": 4.0, "query": 2.0})
    assert not costs.is_cheap({"record": 4.0, "query": 6113.0})


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
    found: dict[str, Any] = {"good": (True, "so it is"), "odd": (True, "so it is"), "tests": run_of(PASSED)}
    looks: list[Assumption] = [Assumption(name, "good", lambda name=name: found[name]) for name in ("good", "odd")]
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


@pytest.mark.parametrize(("name", "value"), [("odd", (False, "")), ("tests", run_of(PASSED, FAILED))])
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


def test_what_makes_no_sense_is_refused_before_anything_runs(capsys: pytest.CaptureFixture) -> None:
    for arguments, complaint in ((["--only", "nothing"], "reuse race"), (["--json", "/no/such/x"], "no such folder")):
        with pytest.raises(SystemExit, match="2"):
            gpu_check.main(arguments)
        assert complaint in capsys.readouterr().err


# The run of the tests.

TESTS = """
import os, subprocess, sys, pytest
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


def test_a_run_that_hangs_is_killed_with_what_it_started(folder: Path) -> None:
    body = "\ndef test_hang():\n    subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    (folder / "test_some.py").write_text(TESTS + body)
    run = suite.run_suite(folder, deadline_s=10.0)
    assert outcomes(run)["test_good"] == "passed"
    assert (run.fault, run.is_ok) == ("killed after 10 s", False)


def test_a_run_without_tests_is_not_well(folder: Path) -> None:
    run = suite.run_suite(folder)
    assert (run.outcomes, run.fault, run.is_ok) == ([], "pytest ended with status 5", False)
