"""Clears while fetches are parked at their gates, in thousands of random orders: nothing comes back."""

from __future__ import annotations

import collections
import dataclasses
import gc
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from gpu_cache import CacheConfig, TensorCache
from gpu_cache.device.host import HostDevice
from gpu_cache.index.entry import Entry
from gpu_cache.index.index import ShardIndex
from gpu_cache.pool.block import Copy
from tests.support.interleave_actors import Board, Getter, watched
from tests.support.interleave_program import Interleaving

pytestmark = pytest.mark.usefixtures("quick_collections")

BLOCK = 500  # interleavings a test
BLOCKS = [0, 1, *(pytest.param(block, marks=pytest.mark.slow) for block in range(2, 5))]

ROOMY = CacheConfig(
    slab_bytes=64 << 10, pool_bytes=256 << 10, prealloc_bytes=64 << 10, run_bytes=1024, staging_slot_bytes=1024,
    staging_slots=8,
)  # fmt: skip
CONFIGS = {
    "direct": (ROOMY, False),
    "staged": (ROOMY, True),
    "full pool": (dataclasses.replace(ROOMY, slab_bytes=2048, pool_bytes=4096, prealloc_bytes=0), True),
    "wide windows": (dataclasses.replace(ROOMY, staging_slot_bytes=4096), False),
}
PLACES = ("before specs", "before a read", "after a read", "before the end", "while it moves")
CLEARS = ("clear(keys)", "clear()", "clear_node(node)", "clear_node(node, keys)")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """A small pool overflows, and says so once."""
    logging.disable(logging.WARNING)
    with watched():
        yield
    logging.disable(logging.NOTSET)
    gc.collect()


def interleave(config: CacheConfig, stages: bool, seeds: Iterable[int]) -> collections.Counter[Any]:
    """Run one interleaving for each seed on one cache; how often each kind of clear met a reader, and where."""
    cache, board = TensorCache(config, device=HostDevice(stages)), Board()
    getters = [Getter(board), Getter(board)]
    met: collections.Counter[Any] = collections.Counter()
    try:
        for seed in seeds:
            program = Interleaving(cache, getters, board, seed)
            try:
                program.run()
            except BaseException as error:
                error.add_note("\n".join([f"seed {seed}", *program.trace]))
                program.give_up()
                raise
            met.update(program.met)
            met["in all"] += bool(program.met)
    finally:
        for getter in getters:
            getter.stop()
    return met


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("config", CONFIGS)
def test_a_shard_cleared_on_its_way_does_not_come_back(config: str, block: int) -> None:
    met = interleave(*CONFIGS[config], range(block * BLOCK, (block + 1) * BLOCK))
    assert met["in all"] == BLOCK, "each has a clear that means a shard on its way"
    few = [(kind, place) for kind in CLEARS for place in PLACES[:-1] if met[kind, place] < BLOCK / 50]
    assert not few, met
    assert sum(met[kind, "while it moves"] for kind in CLEARS) > BLOCK / 50


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_a_cleared_shard_does_not_come_back_in_many_more(config: str) -> None:
    assert interleave(*CONFIGS[config], range(100_000, 110_000))["in all"] == 10_000


def any_generation(
    publish: Any, index: ShardIndex, landings: Iterable[tuple[Entry, Copy]], *rest: Any, **options: Any
) -> None:
    """Publish without a look at the generation."""
    pairs = list(landings)
    with index._lock:
        for entry, _ in pairs:
            index._entries[entry.key] = entry
    publish(index, pairs, *rest, **options)


def test_a_shard_that_comes_back_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    publish = ShardIndex.publish
    monkeypatch.setattr(ShardIndex, "publish", lambda *args, **options: any_generation(publish, *args, **options))
    with pytest.raises(AssertionError, match="cleared, not asked for since, and cached"):
        interleave(*CONFIGS["direct"], range(50))
