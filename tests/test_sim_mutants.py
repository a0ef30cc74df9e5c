"""Whether the simulated device sees the bugs that it is there for."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.support.sim_mutants import MUTANTS, Mutant
from tests.support.sim_program import few_objects, run_program

MAX_PROGRAMS = 60
KINDS = (
    "race at", "wrong bytes", "use after release", "given back twice", "accounts do not add up", "cleared on its way",
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """Broken caches say much."""
    logging.disable(logging.ERROR)
    with few_objects():
        yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    """A line for each mutant, printed at the end (pytest -s)."""
    lines: list[str] = []
    yield lines
    print("", f"{'mutant':<56} programs  seen as", *lines, sep="\n")


def how_it_was_seen(seed: int) -> str:
    """The kind of the first fault of a program; "" if it ran well."""
    try:
        run_program(seed)
    except Exception as error:
        first = str(error).partition("\n")[2] or f"{type(error).__name__}: {error}"
        return first.partition("\n")[0]
    return ""


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.title)
def test_a_mutant_is_seen(mutant: Mutant, monkeypatch: pytest.MonkeyPatch, table: list[str]) -> None:
    calls: list[None] = []
    monkeypatch.setattr(mutant.owner, mutant.name, mutant.replacement(calls))
    for seed in range(MAX_PROGRAMS):
        if fault := how_it_was_seen(seed):
            break
    else:
        pytest.fail(f"{MAX_PROGRAMS} programs, {len(calls)} calls, and no fault seen")
    assert calls, "the fault is somebody else's"
    assert any(kind in fault for kind in KINDS), fault
    table.append(f"{mutant.title:<56} {seed + 1:>8}  {fault[:100]}")
