"""Whether the simulated device sees the bugs that it is there for."""

from __future__ import annotations

import collections
import itertools
import statistics
from collections.abc import Iterator

import pytest
import torch

from gpu_cache import CacheConfig
from gpu_cache.pool import block, lease
from tests.support.sim_memory_mutants import MEMORY_MUTANTS
from tests.support.sim_mutant import Mutant
from tests.support.sim_mutation_mutants import MUTATION_MUTANTS
from tests.support.sim_order_mutants import ORDER_MUTANTS
from tests.support.sim_program import fault_of
from tests.support.sim_script import random_script
from tests.support.sim_steps import WEIGHTS
from tests.support.sim_tier_mutants import TIER_MUTANTS
from tests.support.sim_world import CONFIG, SMALL_SLOTS, TIERED

pytestmark = pytest.mark.usefixtures("quiet_simulation")

MUTANTS = [*ORDER_MUTANTS, *MEMORY_MUTANTS, *MUTATION_MUTANTS]
MAX_PROGRAMS = 200
BASES = (3_000, 4_000, 1_000, 0, 2_000)  # seeds; each begins a series of programs. The quickest come first
MIN_SEEN = 3  # series, of the five
ENOUGH = [pytest.param(MIN_SEEN, id="short"), pytest.param(len(BASES), id="all series", marks=pytest.mark.slow)]
KINDS = (
    "race at", "wrong bytes", "use after release", "use under capture", "given back twice", "accounts do not add up",
    "cleared on its way", "was written to",
)  # fmt: skip
HEADER = f"{'mutant':<52} seen  programs  mostly as"


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    """A line for each mutant, printed at the end (pytest -s)."""
    lines: list[str] = []
    yield lines
    print("", HEADER, *lines, sep="\n")


def first_seen(base: int, config: CacheConfig) -> tuple[int, str]:
    """How many programs of a series it takes, and what is seen; 0 and "" if none is enough."""
    for count in range(1, MAX_PROGRAMS + 1):
        if fault := fault_of(random_script(base + count, WEIGHTS), config):
            return count, next((kind for kind in KINDS if kind in fault), fault)
    return 0, ""


def series_that_see(config: CacheConfig, enough: int) -> Iterator[tuple[int, str]]:
    """Run series after series, until `enough` have seen the fault."""
    found = filter(lambda one: one[0], (first_seen(base, config) for base in BASES))
    return itertools.islice(found, enough)


@pytest.mark.parametrize("enough", ENOUGH)
@pytest.mark.parametrize("mutant", [*MUTANTS, *TIER_MUTANTS], ids=lambda mutant: mutant.title)
def test_a_mutant_is_seen(mutant: Mutant, enough: int, monkeypatch: pytest.MonkeyPatch, table: list[str]) -> None:
    if not torch.__version__.startswith(mutant.torch):
        table.append(f"{mutant.title:<52} skipped: harmless on torch {torch.__version__}")
        pytest.skip(f"does no harm on torch {torch.__version__}, only on {mutant.torch}x")
    calls: list[None] = []
    for module in (block, lease):
        monkeypatch.setattr(module, "blocks", None)  # faults of blocks are planted in Python
    monkeypatch.setattr(mutant.owner, mutant.name, mutant.replacement(calls))
    config = TIERED if mutant in TIER_MUTANTS else SMALL_SLOTS if mutant.name == "abandon" else CONFIG
    seen = list(series_that_see(config, enough))
    assert calls, "the fault is another mutant's"
    assert len(seen) >= MIN_SEEN, f"seen in {len(seen)} of {len(BASES)} series"
    counts, faults = zip(*seen, strict=True)
    assert set(faults) <= set(KINDS)
    common = collections.Counter(faults).most_common(1)[0][0]
    table.append(f"{mutant.title:<52} {len(seen)}/{enough}  {statistics.median(counts):>8g}  {common}")
