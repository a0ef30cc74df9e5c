"""One table for a bug report, and the same as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from gpu.findings import Finding, one_line
from gpu.suite import Outcome, SuiteRun

_MARKS = {True: "[green]yes[/]", False: "[bold red]NO[/]"}


def is_all_well(findings: Sequence[Finding], suite: SuiteRun | None) -> bool:
    """Whether every assumption holds and, where they ran, every test passed or had a reason not to run."""
    return all(finding.is_ok for finding in findings) and (suite is None or suite.is_ok)


def table(machine: Mapping[str, str], findings: Sequence[Finding], suite: SuiteRun | None) -> Table:
    """Versions, assumptions, tests, totals."""
    rows = Table(title="gpu_check", title_justify="left")
    rows.add_column("", overflow="fold")
    for heading in ("expected", "found"):
        rows.add_column(heading, overflow="fold")
    rows.add_column("ok")
    for name, value in machine.items():
        rows.add_row(name, "", escape(value), "")
    rows.add_section()
    for finding in findings:
        rows.add_row(*map(escape, (finding.name, finding.expected, finding.found)), _MARKS[finding.is_ok])
    if suite is not None:
        _add_suite(rows, suite)
    rows.add_section()
    rows.add_row("all well", "", _summary(findings, suite), _MARKS[is_all_well(findings, suite)])
    return rows


def as_json(machine: Mapping[str, str], findings: Sequence[Finding], suite: SuiteRun | None) -> dict[str, Any]:
    """Everything that the table shows, and the end of what pytest printed."""
    return {
        "machine": dict(machine),
        "assumptions": [dataclasses.asdict(finding) for finding in findings],
        "tests": None if suite is None else {**dataclasses.asdict(suite), "totals": suite.totals},
        "is_ok": is_all_well(findings, suite),
    }


def _add_suite(rows: Table, suite: SuiteRun) -> None:
    """A row for each test; those that did not pass last, where the eye falls."""
    rows.add_section()
    for outcome in sorted(suite.outcomes, key=_order):
        name = outcome.test.removeprefix("tests/")
        found = f"{outcome.outcome}, {outcome.seconds:.1f} s"
        found += f": {one_line(outcome.reason)}" if outcome.reason else ""
        rows.add_row(escape(name), "", escape(found), _MARKS[outcome.is_ok])
    if suite.fault:
        rows.add_row("the run of the tests", "", escape(suite.fault), _MARKS[False])


def _order(outcome: Outcome) -> int:
    return ("passed", "skipped", "failed", "error").index(outcome.outcome)


def _summary(findings: Sequence[Finding], suite: SuiteRun | None) -> str:
    held = sum(finding.is_ok for finding in findings)
    words = [f"{held} of {len(findings)} assumptions"]
    if suite is not None:
        words += [f"{count} {name}" for name, count in sorted(suite.totals.items())] or ["no tests ran"]
    return ", ".join(words)
