"""The problems of a machine, each with the command to run next."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator

from gpu_cache import units
from gpu_cache.report.schema import SCHEMA_VERSION, WINDOW_S
from gpu_cache.smi import figures
from gpu_cache.smi.folder import ReportFile
from gpu_cache.smi.node import Node
from gpu_cache.smi.process import DEAD, HUNG, LEAK, NEWER, Process

WARNING, NOTE = "warning", "note"
ENDED = "ended_without_cleanup"
GLUE = "\N{NO-BREAK SPACE}"  # joins words that stay on one line


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        code: Stable, so that scripts need not parse English.
        text: The problem in words; words joined by a no-break space stay together.
        action: The command to run next, with a word before it; "" for none.
        is_named: Whether the screen puts GPU and pid before the text, which else names its subject itself.
    """

    severity: str
    code: str
    text: str
    process: Process | None = None
    action: str = ""
    is_named: bool = True

    @property
    def message(self) -> str:
        """Without the line's end, and free to be broken anywhere."""
        return self.text.replace(GLUE, " ")

    def lines(self, width: int) -> list[str]:
        """As the screen shows it; the action is never broken."""
        subject = f"{self.process.label}: " if self.process and self.is_named else ""
        words = f"{subject}{self.text}. {self.action.replace(' ', GLUE)}".rstrip()
        head = "WARN  " if self.severity == WARNING else "NOTE  "
        found = textwrap.wrap(
            words, width, initial_indent=head, subsequent_indent=" " * 6, break_long_words=False, break_on_hyphens=False
        )
        return [line.replace(GLUE, " ") for line in found]


def problems_of(node: Node) -> list[Problem]:
    """In the order of the screen."""
    found = [problem for process in node.processes for problem in _of_process(process)]
    return found + [_of_file(file) for file in node.unread]


def summed_up(problems: list[Problem]) -> list[Problem]:
    """The same for people: all dead processes in one, the last."""
    dead = [problem for problem in problems if problem.code == ENDED]
    if len(dead) < 2:
        return problems
    youngest_s = min(problem.process.report_age_s for problem in dead if problem.process)
    message = f"{len(dead)} processes ended without cleanup, the last {units.age(youngest_s)} ago; not counted above"
    others = [problem for problem in problems if problem.code != ENDED]
    return [*others, Problem(NOTE, ENDED, message, action=dead[0].action)]


def _of_process(process: Process) -> Iterator[Problem]:
    of_state = {LEAK: _leak, HUNG: _hung, DEAD: _dead, NEWER: _newer}
    if process.state in of_state:
        yield of_state[process.state](process)
    if num := process.rate("overflows"):
        message = (
            f"the pool had no room for {units.count(num)} shards in the last {WINDOW_S:.0f} s, which were handed out"
            " uncached. Raise pool_bytes, or clear earlier"
        )
        yield Problem(NOTE, "overflow", message, process)
    if num := process.rate("fetch_errors"):
        message = f"{units.count(num)} shards did not arrive in the last {WINDOW_S:.0f} s"
        action = "Why: gpu-cache-smi --query-source node,fetch.reasons"
        yield Problem(NOTE, "fetch_errors", message, process, action)
    if process.is_alive and process.host_pid is None:
        message = (
            f"{process.title} runs in another PID namespace and its host PID is not visible from here"
            f" (its own PID{GLUE}is{GLUE}{units.count(process.own_pid)}); its NVML memory is shown as N/A"
        )
        yield Problem(NOTE, "foreign_namespace", message, process, is_named=False)


def _leak(process: Process) -> Problem:
    entries, nbytes = process.figure("outlived_entries"), process.figure("outlived_bytes")
    message = (
        f"{units.count(entries)} entries ({units.size(nbytes)}) survived 2+ clears;"
        f" oldest {units.age(process.oldest_age_s)}"
    )
    whom = process.title if process.host_pid is None else process.pid
    return Problem(WARNING, "outlived_clear", message, process, f"See them: gpu-cache-smi --leaks {whom}")


def _hung(process: Process) -> Problem:
    message = (
        f"no report for {process.report_age_s:.0f} s but the process is alive (blocked, stopped, or holding the GIL)."
        " Counters are from then"
    )
    inside, pid = ("", process.pid) if process.host_pid else ("in its container: ", units.count(process.own_pid))
    return Problem(WARNING, "no_report", message, process, f"Look: {inside}py-spy dump --pid {pid}")


def _dead(process: Process) -> Problem:
    message = f"ended without cleanup {units.age(process.report_age_s)} ago; not counted above"
    return Problem(NOTE, ENDED, message, process, "Clear: gpu-cache-smi --gc")


def _newer(process: Process) -> Problem:
    version = figures.integer(process.report, "schema_version")
    message = (
        f"{process.title} writes report schema {version}, this tool reads up to {SCHEMA_VERSION}:"
        " upgrade gpu_cache where you run this"
    )
    return Problem(NOTE, "newer_schema", message, process, is_named=False)


def _of_file(file: ReportFile) -> Problem:
    code = "unreadable_report" if file.is_denied else "damaged_report"
    return Problem(NOTE, code, f"{file.title} cannot be shown: {file.problem.lower()}")
