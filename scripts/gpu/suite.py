"""The gpu tests, run by pytest in a process of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from gpu.findings import one_line

ROOT = Path(__file__).resolve().parents[2]
_DEADLINE_S = 480.0
_TAIL_CHARACTERS = 20_000
_BAD = ("failed", "error")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One test: "passed", "skipped", "failed", or "error" where it failed before or after itself."""

    test: str
    outcome: str
    seconds: float
    reason: str

    @property
    def is_ok(self) -> bool:
        """Whether it is no reason for a bug report."""
        return self.outcome not in _BAD


@dataclasses.dataclass(frozen=True)
class SuiteRun:
    """What a run of the tests came to.

    Attributes:
        outcomes: Of each test; the first bad one where it has several.
        fault: How the run itself ended, if not well; "" otherwise.
        output: The end of what pytest printed.
    """

    outcomes: Sequence[Outcome]
    fault: str
    output: str

    @property
    def totals(self) -> dict[str, int]:
        """How many of each outcome."""
        return dict(Counter(outcome.outcome for outcome in self.outcomes))

    @property
    def is_ok(self) -> bool:
        """Whether tests ran, none of them failed, and the run came to its end."""
        return bool(self.outcomes) and not self.fault and all(outcome.is_ok for outcome in self.outcomes)


def run_suite(tests: Path = ROOT / "tests") -> SuiteRun:
    """Run the tests of a file or folder that need a GPU; a skip for want of one is an error in there.

    A run that does not end is killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path, printed = Path(folder) / "outcomes", Path(folder) / "output"
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-m", "gpu", "-p", "no:cacheprovider"]
        command += ["--continue-on-collection-errors", "-p", "gpu.outcomes", f"--outcomes={path}", str(tests)]
        paths = [str(ROOT / "scripts"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environ = {**os.environ, "GPU_CACHE_REQUIRE_GPU": "1", "PYTHONPATH": os.pathsep.join(paths)}
        with printed.open("w") as stream:
            fault = _run(command, environ, stream.fileno(), _DEADLINE_S)
        lines = path.read_text().splitlines() if path.exists() else []
        output = printed.read_text(errors="replace")[-_TAIL_CHARACTERS:]
        return SuiteRun(_one_each([Outcome(**json.loads(line)) for line in lines]), fault, output)


def _one_each(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """What to say of each test: how it failed rather than what it left behind then."""
    found: dict[str, Outcome] = {}
    for outcome in outcomes:
        if outcome.test not in found or found[outcome.test].is_ok:
            found[outcome.test] = outcome
    return list(found.values())


def _run(command: Sequence[str], environ: dict[str, str], output: int, deadline_s: float) -> str:
    """Run to the end, or kill it with all that it started; what went wrong with the run, or ""."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environ, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        status = process.wait(deadline_s)
    except subprocess.TimeoutExpired:
        return one_line(f"killed after {deadline_s:.0f} s")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    # 0: all passed, 1: some failed, which the outcomes say; 5: there is no such test.
    return "" if status in (0, 1) else f"pytest ended with status {status}"
