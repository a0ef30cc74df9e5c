"""A pytest plugin that writes each outcome at once, so that a run which crashes or hangs still says what it did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that names the file."""
    parser.addoption("--outcomes", type=Path, required=False, help="write outcomes here, one JSON object a line")


def pytest_configure(config: pytest.Config) -> None:
    """Write, if a file is named."""
    if config.option.outcomes is not None:
        config.pluginmanager.register(Writer(config.option.outcomes), "outcome-writer")


class Writer:
    """Appends a line when a test is done, and one more when what it leaves behind is an error."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note every test once, and every part of one that did not pass."""
        if report.when == "call" or report.outcome != "passed":
            is_error = report.outcome == "failed" and report.when != "call"
            self._write(report.nodeid, "error" if is_error else report.outcome, report.duration, _reason(report))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note what could not be collected."""
        if report.outcome == "failed":
            self._write(report.nodeid, "error", 0.0, str(report.longrepr).strip().splitlines()[-1])

    def _write(self, test: str, outcome: str, seconds: float, reason: str) -> None:
        line = json.dumps({"test": test, "outcome": outcome, "seconds": round(seconds, 3), "reason": reason})
        with self._path.open("a") as lines:
            lines.write(line + "\n")


def _reason(report: pytest.TestReport) -> str:
    """Why it was skipped or how it failed; "" if it passed."""
    if report.outcome == "passed":
        return ""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2]
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(report.longrepr if crash is None else crash.message)
