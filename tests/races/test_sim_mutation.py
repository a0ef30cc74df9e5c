"""Writes into shards on the simulated device: refetches wait for no writer, and written bytes are reused behind it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gpu_cache.config import ReadyMode
from gpu_cache.errors import TransferError
from tests.support.sim_accounts import check_accounts, check_lookups
from tests.support.sim_mutant import Mutant
from tests.support.sim_mutation_mutants import MUTATION_MUTANTS
from tests.support.sim_shards import Held
from tests.support.sim_streams import SimStream
from tests.support.sim_world import World

KEY = "shard-7"  # of 4,096 bytes


@pytest.fixture
def world() -> Iterator[World]:
    """With a shard that a caller holds; no stream gets on of its own accord."""
    made = World()
    made.device.adversary.begin()
    made.get([KEY], "host", made.streams[0])
    yield made
    made.device.finish()
    made.cache.synchronize()
    check_accounts(made.cache, is_fetching=False, is_over=False)
    check_lookups(made.cache, made.ledger)
    made.close()


def written(world: World, stream: SimStream) -> Held:
    """The shard, into which a kernel is to write that has not run yet."""
    (held,) = world.held
    values = held.expected + 1
    world.device.write(stream, held.tensor, values)
    held.expected, held.streams = values, [stream]
    return held


@pytest.mark.parametrize("ready", ["host", "stream"])
def test_a_reader_gets_the_original_and_waits_for_no_writer(world: World, ready: ReadyMode) -> None:
    writer, reader = world.streams[1:3]
    held = written(world, writer)
    world.get([KEY], ready, reader)
    assert writer.queue, "the write has yet to run"
    fresh = world.held[-1]
    assert fresh.tensor.data_ptr() != held.tensor.data_ptr()
    for one in (held, fresh):
        world.device.kernel((one.streams or [reader])[0], one.tensor, one.expected)
    world.device.finish()
    assert not world.device.faults
    assert world.cache.buffer_stats()["mutations"] == 1


def test_written_bytes_are_reused_behind_the_writer(world: World) -> None:
    written(world, world.streams[1])
    world.held.clear()
    world.get([KEY], "stream", world.streams[2])
    world.held.clear()
    world.cache.clear()
    engine = world.cache._engine
    assert engine is not None
    engine.drain()
    assert engine.pool.accounts()["quarantined"] == 2 * 4096, "a kernel has yet to write there, and a copy"
    world.device.finish()
    world.cache.synchronize()
    assert world.cache.buffer_stats()["device_bytes"] == 0
    assert not world.device.faults


def test_a_capture_is_refused_and_drops_nothing(world: World) -> None:
    written(world, world.streams[1])
    world.device.captured = world.streams[3]
    with world.device.stream(world.streams[3]), pytest.raises(TransferError, match="written to in place"):
        world.cache.get_many([KEY], world.source)
    assert KEY in world.cache
    world.get([KEY], "host", world.streams[2])
    world.device.captured = None
    world.device.finish()
    assert not world.device.faults


@pytest.mark.parametrize("mutant", MUTATION_MUTANTS, ids=lambda mutant: mutant.title)
def test_a_write_that_is_overlooked_is_seen(world: World, mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutant.owner, mutant.name, mutant.replacement([]))
    world.get(["shard-6"], "host", world.streams[0])
    world.write(world.held[0])
    with pytest.raises(AssertionError, match="was written to, and is handed out"):
        world.get(["shard-6", KEY], "host", world.streams[2])
