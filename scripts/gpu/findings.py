"""Assumptions of the design, and what this machine says to them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.support.gpu_scene import REAL, Rig

Figures = Mapping[str, Any]

_MOST_CHARACTERS = 300
_MOST_PROCESSES = 4


@dataclasses.dataclass(frozen=True)
class Bound:
    """What a figure must be, in words and as a test of it."""

    text: str
    holds: Callable[[Any], bool]


def at_most(limit: float) -> Bound:
    """No more; not a number is too much."""
    return Bound(f"at most {limit:,g}", lambda found: found <= limit)


def at_least(limit: float) -> Bound:
    """No less; not a number is too little."""
    return Bound(f"at least {limit:,g}", lambda found: found >= limit)


def about(expected: float, slack: float) -> Bound:
    """No further away than `slack`."""
    return Bound(f"{expected:,g} within {slack:,g}", lambda found: abs(found - expected) <= slack)


def exactly(expected: object) -> Bound:
    """Equal."""
    return Bound(str(expected), lambda found: bool(found == expected))


def begins(*ways: str) -> Bound:
    """A text that begins in one of these ways."""
    return Bound(" or ".join(ways), lambda found: found.startswith(ways))


@dataclasses.dataclass(frozen=True)
class Assumption:
    """Something that the design relies on, and cannot know without a GPU.

    Attributes:
        name: For `--only` and the table.
        claim: What the design says.
        look: Finds figures out, by name.
        bounds: Of the figures that the project cannot live with otherwise; the others are told, and not judged.
        is_separate: It looks in a process of its own, and may do so beside others.
    """

    name: str
    claim: str
    look: Callable[[Rig], Figures]
    bounds: Mapping[str, Bound]
    is_separate: bool = False

    @property
    def expected(self) -> str:
        """The claim, and the bounds."""
        return f"{self.claim} ({', '.join(f'{name}: {bound.text}' for name, bound in self.bounds.items())})"

    def is_broken(self, name: str, figures: Figures) -> bool:
        """Whether a figure is out of its bound, or missing."""
        return name in self.bounds and not (name in figures and self.bounds[name].holds(figures[name]))

    def judge(self, figures: Figures) -> Finding:
        """What the figures say to the bounds."""
        told = [
            f"{name}: {_shown(figures.get(name))}{' (NO)' if self.is_broken(name, figures) else ''}"
            for name in [*figures, *(name for name in self.bounds if name not in figures)]
        ]
        is_ok = not any(self.is_broken(name, figures) for name in self.bounds)
        return Finding(self.name, self.expected, one_line(", ".join(told)), is_ok)


@dataclasses.dataclass(frozen=True)
class Finding:
    """One row of the table."""

    name: str
    expected: str
    found: str
    is_ok: bool


def examine(assumption: Assumption, rig: Rig) -> Finding:
    """Look at one assumption. Never raises: what goes wrong is the finding."""
    try:
        return assumption.judge(assumption.look(rig))
    except Exception as error:
        return Finding(assumption.name, assumption.expected, one_line(f"{type(error).__name__}: {error}"), False)


def examine_all(assumptions: Sequence[Assumption], tell: Callable[[str], None]) -> list[Finding]:
    """Look at several, in order; at those with processes of their own first, and at once.

    Args:
        assumptions: What to look at.
        tell: Called with what was found, one by one: should the process die, that is left.
    """
    separate = [assumption for assumption in assumptions if assumption.is_separate]
    others = [assumption for assumption in assumptions if not assumption.is_separate]
    found: dict[str, Finding] = {}
    look = functools.partial(examine, rig=REAL)
    with ThreadPoolExecutor(_MOST_PROCESSES) as workers:
        for finding in itertools.chain(workers.map(look, separate), map(look, others)):
            found[finding.name] = finding
            tell(f"{finding.name}: {finding.found}" + ("" if finding.is_ok else " (NOT OK)"))
    return [found[assumption.name] for assumption in assumptions]


def one_line(text: str) -> str:
    """The beginning of a text, without line breaks."""
    joined = " ".join(text.split())
    return joined if len(joined) <= _MOST_CHARACTERS else joined[: _MOST_CHARACTERS - 3] + "..."


def _shown(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
