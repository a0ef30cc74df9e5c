"""Refetches on the simulated device: compared behind the copies and the writes, whatever the streams do meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from gpu_cache.transfer.comparison import Comparisons

from gpu_cache.config import ReadyMode
from tests.support.sim_mutation_mutants import MUTATION_MUTANTS
from tests.support.sim_shards import Held, contents
from tests.support.sim_streams import SimStream
from tests.support.sim_world import World

KEY = "shard-7"
MUTANTS = {mutant.title: mutant for mutant in MUTATION_MUTANTS}


@pytest.fixture
def world() -> Iterator[World]:
    """With a shard that somebody holds; no stream gets on of its own accord."""
    made = World()
    made.device.adversary.begin()
    made.get([KEY], "host", made.streams[0])
    yield made
    made.device.finish()
    made.cache.synchronize()
    made.close()


def written(world: World, stream: SimStream, *, changes: bool = True) -> Held:
    """The shard, into which a kernel is to write that has not run yet."""
    (held,) = world.held
    values = held.expected + int(changes)
    world.device.write(stream, held.tensor, values)
    held.expected, held.streams = values, [stream]
    return held


def look(world: World) -> None:
    """As each call does, and the reaper."""
    assert world.cache._engine is not None
    world.cache._engine.drain()


def mutations(world: World) -> int:
    return world.cache.buffer_stats()["mutations"]


@pytest.mark.parametrize("ready", ["host", "stream"])
@pytest.mark.parametrize("changes", [True, False])
def test_a_comparison_waits_for_copies_and_writes_and_nobody_for_it(
    world: World, ready: ReadyMode, changes: bool
) -> None:
    writer, reader = world.streams[1:3]
    held = written(world, writer, changes=changes)
    world.get([KEY], ready, reader)
    assert writer.queue, "the write has yet to run"
    fresh = world.held[-1]
    assert fresh.tensor.data_ptr() != held.tensor.data_ptr()
    for one in (held, fresh):
        assert one.streams is None or one.streams in ([writer], [reader])
        world.device.kernel((one.streams or [reader])[0], one.tensor, one.expected)
    look(world)
    assert mutations(world) == 0, "it is not known yet"
    world.device.finish()
    look(world)
    assert mutations(world) == changes
    assert not world.device.faults


def test_blocks_are_kept_until_they_are_compared(world: World) -> None:
    written(world, world.streams[1])
    world.held.clear()
    world.get([KEY], "stream", world.streams[2])
    world.held.clear()
    world.cache.clear()
    assert world.cache.buffer_stats()["device_bytes"] == 2 * 4096
    world.device.finish()
    world.cache.synchronize()
    assert (world.cache.buffer_stats()["device_bytes"], mutations(world)) == (0, 1)
    assert not world.device.faults


def test_while_a_graph_is_captured_a_comparison_is_put_off(world: World) -> None:
    written(world, world.streams[1])
    world.device.captured = world.streams[3]
    world.get([KEY], "host", world.streams[2])
    world.device.finish()
    look(world)
    assert mutations(world) == 0
    world.device.captured = None
    look(world)
    world.device.finish()
    look(world)
    assert mutations(world) == 1
    assert not world.device.faults


def test_a_refused_comparison_leaves_nothing(world: World, caplog: pytest.LogCaptureFixture) -> None:
    written(world, world.streams[1])
    world.device.refuse("compare", 1)
    world.get([KEY], "host", world.streams[2])
    assert "whether bytes changed is not known" in caplog.text
    world.held.clear()
    world.device.finish()
    world.cache.synchronize()
    assert world.cache.buffer_stats()["device_bytes"] == 4096


@pytest.mark.parametrize("title", ["a comparison that waits for nothing", "a comparison before the writes are done"])
def test_a_comparison_that_comes_too_early_is_a_race(world: World, title: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = MUTANTS[title]
    assert mutant.owner is Comparisons
    calls: list[Any] = []
    monkeypatch.setattr(mutant.owner, mutant.name, mutant.replacement(calls))
    written(world, world.streams[1])
    world.get([KEY], "stream", world.streams[2])
    world.device.finish()
    assert calls
    assert any("race at" in fault and "comparison" in fault for fault in world.device.faults)


def test_a_comparison_that_does_not_wait_for_the_copy_is_a_race(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a writer that is done, only the copy is left to be waited for."""
    mutant = MUTANTS["a comparison that waits for nothing"]
    monkeypatch.setattr(mutant.owner, mutant.name, mutant.replacement([]))
    written(world, world.streams[1])
    world.device.synchronize_all()
    world.get([KEY], "stream", world.streams[2])
    world.device.finish()
    assert any("race at" in fault and "copy" in fault for fault in world.device.faults)


def test_the_shard_is_long_enough_to_tell() -> None:
    assert len(contents()[KEY]) == 4096
