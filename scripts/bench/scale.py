"""The workload scale: index and free list alone, up to a million entries in random order; beside it a bare dict."""

from __future__ import annotations

import contextlib
import gc
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from bench.rounds import Plan
from gpu_cache.config import ALIGNMENT
from gpu_cache.index.index import ShardIndex
from gpu_cache.pool.block import Copy
from gpu_cache.pool.freelist import FreeList

NAME = "scale"
SIZES = (1_000, 10_000, 100_000, 1_000_000)
OPERATIONS = ("hit", "insert", "clear")
# So many entries a call: those of a step's batch.
_BATCH = 1_000
# Small sizes are run again and again until so many entries were handled in a round.
_LEAST_ENTRIES = 20_000
_MOST_UNITS = 128  # of 512 bytes, of a block
_SPARE = 1.25  # capacity of the free list by what is taken from it
_SEED = 4

# Microseconds per entry, round by round, by structure, operation and number of entries.
Found = dict[tuple[str, str, int], list[float]]


class Table(Protocol):
    """Entries by key. Keys and landings come in batches."""

    def insert(self, keys: Sequence[str], landings: Sequence[Copy]) -> None:
        """Add entries."""

    def hit(self, keys: Sequence[str]) -> object:
        """Look entries up that are there."""

    def clear(self, keys: Sequence[str]) -> None:
        """Drop entries."""


class IndexTable:
    """The cache's index, called as a fetch calls it: claim, publish, release; hits are aliases."""

    def __init__(self) -> None:
        self._index = ShardIndex(lambda base, num_loans: False)

    def insert(self, keys: Sequence[str], landings: Sequence[Copy]) -> None:
        claimed = self._index.claim(keys).claimed.values()
        self._index.publish(zip(claimed, landings, strict=True), "owner:1", None)
        self._index.release(claimed)

    def hit(self, keys: Sequence[str]) -> object:
        return self._index.claim(keys)

    def clear(self, keys: Sequence[str]) -> None:
        self._index.remove(keys)


class DictTable:
    """A bare dict: what no index can beat."""

    def __init__(self) -> None:
        self._dict: dict[str, Copy] = {}

    def insert(self, keys: Sequence[str], landings: Sequence[Copy]) -> None:
        for key, landing in zip(keys, landings, strict=True):
            self._dict[key] = landing

    def hit(self, keys: Sequence[str]) -> object:
        return [self._dict[key] for key in keys]

    def clear(self, keys: Sequence[str]) -> None:
        for key in keys:
            del self._dict[key]


def run(sizes: Sequence[int], plan: Plan, advance: Callable[[str], None]) -> list[dict[str, Any]]:
    """Rows of every structure, operation and size: microseconds per entry, medians over rounds.

    Args:
        sizes: Numbers of entries, ascending.
        plan: How many rounds.
        advance: Told what is next before each run.
    """
    found: Found = defaultdict(list)
    with _landings(sizes[-1]) as landings:
        for number in plan.rounds():
            _run_round(sizes, np.random.default_rng((_SEED, number)), landings, found, advance)
    return [_row(*key, values, found) for key, values in found.items()]


def _run_round(
    sizes: Sequence[int],
    rng: np.random.Generator,
    landings: Sequence[Copy],
    found: Found,
    advance: Callable[[str], None],
) -> None:
    for num_entries in sizes:
        part = landings[:num_entries]
        runs: dict[str, Callable[[], dict[str, float]]] = {
            "index": partial(_run_table, IndexTable, part, rng),
            "dict": partial(_run_table, DictTable, part, rng),
            "freelist": partial(_run_free_list, num_entries, rng),
        }
        for structure, run_once in runs.items():
            advance(f"{structure} {num_entries:,}")
            for operation, us in _repeated(run_once, num_entries).items():
                found[structure, operation, num_entries].append(us)


def _repeated(run_once: Callable[[], dict[str, float]], num_entries: int) -> dict[str, float]:
    """Medians of as many runs as a small size needs; no collection in between, which would empty the caches."""
    gc.collect()
    runs = [run_once() for _ in range(max(1, _LEAST_ENTRIES // num_entries))]
    return {operation: statistics.median(one[operation] for one in runs) for operation in runs[0]}


def _row(structure: str, operation: str, num_entries: int, values: list[float], found: Found) -> dict[str, Any]:
    """As for other workloads; what makes no sense here is None."""
    us = statistics.median(values)
    smallest = min(size for name, action, size in found if (name, action) == (structure, operation))
    growth = us / statistics.median(found[structure, operation, smallest])
    dicts = statistics.median(found["dict", operation, num_entries]) / statistics.median(
        found["dict", operation, smallest]
    )
    return {
        "workload": NAME,
        "path": f"{structure}_{operation}",
        "num_entries": num_entries,
        "seconds": us * num_entries / 1e6,
        "seconds_min": min(values) * num_entries / 1e6,
        "seconds_max": max(values) * num_entries / 1e6,
        "num_rounds": len(values),
        "us_per_shard": us,
        "growth": growth,
        "growth_over_dict": growth / dicts,
        **dict.fromkeys(
            ("gb_per_s", "cpu_s_per_gb_client", "cpu_s_per_gb_server", "rss_growth_bytes", "ratio_raw", "ratio_json")
        ),
    }


def _run_table(make: Callable[[], Table], landings: Sequence[Copy], rng: np.random.Generator) -> dict[str, float]:
    """Insert, look up and clear everything once, each in an order of its own, by equal but not identical keys."""
    bits = random.Random(int(rng.integers(1 << 62)))
    numbers = [bits.getrandbits(128) for _ in landings]
    table = make()

    def keys(order: Sequence[int]) -> list[str]:
        with _without_collections():
            return [f"{numbers[at]:032x}" for at in order]

    return {
        "insert": _clocked(table.insert, keys(range(len(landings))), landings),
        "hit": _clocked(table.hit, keys(rng.permutation(len(landings)).tolist())),
        "clear": _clocked(table.clear, keys(rng.permutation(len(landings)).tolist())),
    }


def _run_free_list(num_entries: int, rng: np.random.Generator) -> dict[str, float]:
    """Take everything; give half back at random and take it again; give everything back in random order."""
    lengths = (rng.integers(1, _MOST_UNITS, num_entries, endpoint=True) * ALIGNMENT).tolist()
    free = FreeList(int(sum(lengths) * _SPARE))
    starts = [free.take(nbytes) for nbytes in lengths]
    half = rng.permutation(num_entries)[: max(1, num_entries // 2)].tolist()
    for at in half:
        free.give(starts[at], lengths[at])

    def take(places: Sequence[int]) -> None:
        for at in places:
            starts[at] = free.take(lengths[at])

    def give(places: Sequence[int]) -> None:
        for at in places:
            free.give(starts[at], lengths[at])

    rng.shuffle(half)
    return {"insert": _clocked(take, half), "clear": _clocked(give, rng.permutation(num_entries).tolist())}


def _clocked(call: Callable[..., object], *columns: Sequence[Any]) -> float:
    """Microseconds per entry of calls with a batch of each column; what they return dies off the clock."""
    seconds = 0.0
    for start in range(0, len(columns[0]), _BATCH):
        batch = [column[start : start + _BATCH] for column in columns]
        began = time.perf_counter()
        result = call(*batch)
        seconds += time.perf_counter() - began
        del result
    return seconds / len(columns[0]) * 1e6


@contextlib.contextmanager
def _landings(number: int) -> Iterator[list[Copy]]:
    """What is indexed, each with a tensor of its own. No collection looks at them: only at what the index makes."""
    with _without_collections():
        landings = [Copy(None, torch.empty(0), None, ALIGNMENT) for _ in range(number)]
    gc.freeze()
    try:
        yield landings
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Objects by the million are made here, which is not what is timed; on the clock collections are on."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
