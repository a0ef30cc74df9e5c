"""Random calls at both levels of an index: a key is READY at one level at most. The accounts add up."""

from __future__ import annotations

import collections
import random
from collections.abc import Callable

import pytest
import torch

from gpu_cache.index.entry import Claim, Entry, Holding, State
from gpu_cache.index.index import ShardIndex
from gpu_cache.index.mutation import Mutations
from gpu_cache.pool.block import Copy

KEYS = "abcde"
NUM_STEPS = 80


def copy_of(key: object) -> Copy:
    return Copy(key, torch.zeros(8, dtype=torch.uint8), None, 8)


class Levels:
    """An index of two levels, and the calls that are under way at them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.held: set[int] = set()
        mutations = Mutations("refetch", lambda: 0.0)
        self.index = ShardIndex(lambda base, num_loans: id(base) in self.held, mutations=mutations)
        self.below = self.index.add_level()
        self.flying: list[tuple[ShardIndex, Entry]] = []
        self.calls: list[Claim] = []
        self.cleared: dict[str, int] = {}  # key -> the newest generation that a clear has met
        self.bases: list[torch.Tensor] = []  # so that no id comes twice
        self.trace: list[str] = []

    def run(self) -> None:
        often, rarely = (
            [self.claim, self.land, self.land, self.hand_out, self.hand_out],
            [self.evict, self.evict, self.clear, self.hold, self.write, self.end_scope],
        )
        for _ in range(NUM_STEPS):
            step = self.random.choice(often if self.random.random() < 0.8 else rarely)
            self.trace.append(step.__name__)
            step()
            self.check()
        while self.flying:
            self.land()
            self.check()
        while self.calls:
            self.hand_out()
        assert all(entry.num_awaiting == 0 for entry in self.entries())
        assert sum(map(len, self.index._levels.tables)) == len(self.index)

    def entries(self) -> list[Entry]:
        return [entry for table in self.index._levels.tables for entry in table.values()]

    def claim(self, holding: Holding | None = None) -> None:
        level = self.random.choice([self.index, self.below])
        call = level.claim(self.random.sample(KEYS, 2), Claim())
        if holding is not None:
            level.adopt(holding, [entry for entry in call.claimed.values() if entry.is_fetch])
        self.flying += [(level, entry) for entry in call.claimed.values()]
        self.calls.append(call)

    def land(self) -> None:
        """Land a random claim; a claim that follows another lands after it."""
        ready = [one for one in self.flying if one[1].flight.kind != "follow" or self.has_come(one[1])]
        if not ready:
            return
        level, entry = self.random.choice(ready)
        self.flying.remove((level, entry))
        how: Callable[..., object] = self.random.choice([level.publish, level.publish, level.publish, level.deliver])
        is_tied = entry.flight.is_copy and self.is_tied(entry)
        if self.random.random() < 0.2:
            level.abort([entry], RuntimeError("failed"))
        else:
            how([(entry, copy_of(entry.key))], "n:1", None)
        assert entry.is_settled
        assert not is_tied or self.index._entries.get(entry.key) is not entry, "a reader may have written into it"

    def is_tied(self, entry: Entry) -> bool:
        """Whether a reader has the lower copy, or a call is about to hand it out."""
        low = self.below._entries.get(entry.key)
        if low is None or low.copy is None:
            return True
        return low.num_awaiting > 1 or id(low.copy.base) in self.held or low.is_changed

    def has_come(self, entry: Entry) -> bool:
        low = next(call.below[entry.key] for call in self.calls if call.claimed.get(entry.key) is entry)
        return low.is_settled

    def hand_out(self) -> None:
        done = [one for one in self.calls if all(entry.is_settled for entry in one.claimed.values())]
        for call in done:
            self.calls = [one for one in self.calls if one is not call]
            self.index.release((*call.claimed.values(), *call.joined.values()))

    def evict(self) -> None:
        level, held = self.random.choice([(self.index, False), (self.index, True), (self.below, False)])
        victims = level.candidates(held=held)[: self.random.randint(1, 3)]
        refuges = {one.entry.key: copy_of(one.entry.key) for one in victims if self.random.random() < 0.8}
        if self.random.random() < 0.2:
            self.clear()
        level.evict(victims, refuges if level is self.index else {}, held=held)

    def clear(self) -> None:
        keys = self.random.sample(KEYS, 2)
        for entry in self.entries():
            if entry.key in keys:
                self.cleared[str(entry.key)] = max(entry.generation, self.cleared.get(str(entry.key), 0))
        dropped = self.index.remove(keys)
        assert len({entry.key for entry in dropped}) == len(dropped)
        assert not set(keys) & {entry.key for entry in self.entries()}

    def end_scope(self) -> None:
        holding = Holding()
        self.claim(holding)
        self.land()
        self.evict()
        generations = set(holding.keys)
        self.index.end_scope(holding)
        assert generations.isdisjoint(entry.generation for entry in self.entries())

    def hold(self) -> None:
        self.bases += [entry.copy.base for entry in self.entries() if entry.copy is not None]
        self.held = {id(base) for base in self.bases if self.random.random() < 0.2}

    def write(self) -> None:
        if ready := [entry.copy for entry in self.entries() if entry.copy is not None]:
            self.random.choice(ready).counted.add_(0)

    def check(self) -> None:
        top, low = self.index._levels.tables
        for key in KEYS:
            assert self.index.has(key) + self.below.has(key) <= 1
            if key in top and key in low:
                assert top[key].generation == low[key].generation
                assert top[key].flight.is_copy
        ready = [entry for entry in self.entries() if entry.copy is not None]
        assert all((entry.state is State.READY) == (entry.copy is not None) for entry in self.entries())
        assert collections.Counter(self.index.keys()) == collections.Counter(entry.key for entry in ready)
        assert all(entry.generation > self.cleared.get(str(entry.key), 0) for entry in self.entries())
        awaited = collections.Counter(id(low) for call in self.calls for low in self.copied_from(call))
        awaited.update(id(entry) for call in self.calls for entry in (*call.claimed.values(), *call.joined.values()))
        assert all(entry.num_awaiting == awaited[id(entry)] for entry in self.entries())
        report = self.index.report()
        assert report["host_entries"] == sum(entry.copy is not None for entry in low.values())
        assert report["device_entries"] == sum(entry.copy is not None for entry in top.values())
        assert report["requested"] == sum(report[name] for name in ("hits", "host_hits", "joined", "misses"))
        assert report["requested_bytes"] == report["hit_bytes"] + report["joined_bytes"] + report["miss_bytes"]
        assert report["total_bytes"] == 8 * len(ready)

    def copied_from(self, call: Claim) -> list[Entry]:
        return [low for key, low in call.below.items() if not call.claimed[key].is_settled]


@pytest.mark.parametrize("block", range(8))
def test_a_key_is_ready_at_one_level_at_most(block: int) -> None:
    for seed in range(block * 40, block * 40 + 40):
        levels = Levels(seed)
        try:
            levels.run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {' '.join(levels.trace)}") from error
