"""Assumptions of the design, and what this machine says to them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

_MOST_CHARACTERS = 300
_MOST_PROCESSES = 4


@dataclasses.dataclass(frozen=True)
class Assumption:
    """Something that the design relies on, and cannot know without a GPU.

    Attributes:
        name: For `--only` and the table.
        expected: What the design says.
        look: Finds out; returns whether the project can live with it, and what was found.
        is_separate: It looks in a process of its own, and may do so beside others.
    """

    name: str
    expected: str
    look: Callable[[], tuple[bool, str]]
    is_separate: bool = False


@dataclasses.dataclass(frozen=True)
class Finding:
    """One row of the table."""

    name: str
    expected: str
    found: str
    is_ok: bool


def examine(assumption: Assumption) -> Finding:
    """Look at one assumption. Never raises: what goes wrong is the finding."""
    try:
        is_ok, found = assumption.look()
    except Exception as error:
        is_ok, found = False, f"{type(error).__name__}: {error}"
    return Finding(assumption.name, assumption.expected, one_line(found), is_ok)


def examine_all(assumptions: Sequence[Assumption], tell: Callable[[str], None]) -> list[Finding]:
    """Look at several, in order; at those with processes of their own first, and at once.

    Args:
        assumptions: What to look at.
        tell: Called with what was found, one by one: should the process die, that is left.
    """
    separate = [assumption for assumption in assumptions if assumption.is_separate]
    others = [assumption for assumption in assumptions if not assumption.is_separate]
    found: dict[str, Finding] = {}
    with ThreadPoolExecutor(_MOST_PROCESSES) as workers:
        for finding in itertools.chain(workers.map(examine, separate), map(examine, others)):
            found[finding.name] = finding
            tell(f"{finding.name}: {finding.found}" + ("" if finding.is_ok else " (NOT OK)"))
    return [found[assumption.name] for assumption in assumptions]


def one_line(text: str) -> str:
    """The beginning of a text, without line breaks."""
    joined = " ".join(text.split())
    return joined if len(joined) <= _MOST_CHARACTERS else joined[: _MOST_CHARACTERS - 3] + "..."
