"""Random fetches, clears, evictions and failures on an index, against a model that keeps its own books."""

from __future__ import annotations

import collections
from collections.abc import Iterable

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gpu_cache.index.entry import Candidate, Claim, Entry, Promise, State
from gpu_cache.index.index import ShardIndex
from gpu_cache.index.mutation import Mutations
from gpu_cache.pool.block import Copy

KEYS = "abcdef"
NODES = ("n:1", "n:2")
COUNTERS = (
    "hits", "joined", "misses", "hit_bytes", "joined_bytes", "miss_bytes", "fetch_bytes", "evictions", "evicted_bytes",
    "cleared", "cleared_bytes", "overflows", "overflow_bytes", "fetch_errors", "mutations",
)  # fmt: skip


class IndexAgainstBooks(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.held: set[int] = set()  # ids of bases
        self.index = ShardIndex(lambda base, num_loans: id(base) in self.held, mutations=Mutations("refetch"))
        self.written: set[Entry] = set()  # by a reader
        self.standing: dict[str, Entry] = {}  # one for each key, least recently used first
        self.ready: dict[str, int] = {}  # bytes of those that arrived, oldest first
        self.flying: list[Entry] = []
        self.joins: collections.Counter[Entry] = collections.Counter()
        self.awaited: list[Entry] = []  # each as often as calls have yet to hand it out
        self.nodes: dict[Entry, str] = {}
        self.books: collections.Counter[str] = collections.Counter()
        self.newest = 0
        self.promises: dict[Entry, Promise | None] = {}  # each entry's promise, or its own data
        self.replacing: dict[Entry, tuple[Entry, int]] = {}  # another owner's entry, and the clears before
        self.num_clears = 0

    def count(self, what: str, nbytes: Iterable[int], bytes_of: str = "") -> None:
        lengths = list(nbytes)
        self.books[what] += len(lengths)
        self.books[bytes_of or f"{what}_bytes"] += sum(lengths)

    def touch(self, key: str) -> None:
        self.standing[key] = self.standing.pop(key)

    def drop(self, key: str) -> int:
        """Its bytes, if it had arrived; else -1."""
        del self.standing[key]
        return self.ready.pop(key, -1)

    def begin(self, entry: Entry, promise: Promise | None = None) -> None:
        assert entry.generation > self.newest, "a key that comes again is another generation"
        self.newest = entry.generation
        self.promises[entry] = promise
        if entry.key in self.standing:
            self.replacing[entry] = self.standing[entry.key], self.num_clears
        else:
            self.standing[entry.key] = entry
        self.flying.append(entry)
        self.awaited.append(entry)
        self.nodes[entry] = ""

    @precondition(lambda self: self.ready)
    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        entry = self.standing[data.draw(st.sampled_from(sorted(self.ready)))]
        entry.copy.counted.add_(0)
        self.written.add(entry)

    def lose_written(self, keys: Iterable[str]) -> dict[str, None]:
        """A look-up drops those that a reader wrote into."""
        lost = dict.fromkeys(key for key in keys if self.standing.get(key) in self.written)
        for key in lost:
            self.drop(key)
        self.books["mutations"] += len(lost)
        return lost

    @rule(keys=st.sets(st.sampled_from(KEYS), min_size=1), hands_out=st.sampled_from([True, True, False]))
    def claim(self, keys: set[str], hands_out: bool) -> None:
        wanted = sorted(keys)
        lost = self.lose_written(wanted) if hands_out else {}
        found = self.index.claim(wanted, hands_out=hands_out)
        assert found.mutated == lost
        assert list(found.hits) == [key for key in wanted if key in self.ready]
        assert found.joined == {key: self.standing[key] for key in wanted if key in self.standing.keys() - self.ready}
        assert list(found.claimed) == [key for key in wanted if key not in self.standing]
        for key, tensor in found.hits.items():
            assert tensor.data_ptr() == self.standing[key].copy.base.data_ptr()
        assert all(entry.flight.landed is not None for entry in found.joined.values())
        self.joins.update(found.joined.values())
        self.awaited += found.joined.values()
        self.books["joined"] += len(found.joined)
        self.books["misses"] += len(found.claimed)
        self.count("hits", [self.ready[key] for key in found.hits], "hit_bytes")
        for key in wanted:
            if key in found.hits:
                self.touch(key)
            elif key in found.claimed:
                self.begin(found.claimed[key])

    @rule(key=st.sampled_from(KEYS[:2]), owner=st.sampled_from([*NODES, None]), length=st.integers(0, 2))
    def claim_what_is_promised(self, key: str, owner: str | None, length: int) -> None:
        promise, there = (torch.uint8, (length,), owner), self.standing.get(key)
        known = self.promises[there] if there is not None else None
        is_other = known is not None and None not in (owner, known[2]) and owner != known[2]
        if not is_other and self.lose_written([key]):
            there = None
        found = self.index.claim([key], Claim(expected={key: promise}))
        if there is None or is_other:
            self.books["misses"] += 1
            assert (found.hits, found.joined, found.refused) == ({}, {}, {})
            self.begin(found.claimed[key], promise)
        elif key not in self.ready:
            assert (found.hits, found.joined, found.claimed, found.refused) == ({}, {key: there}, {}, {})
            self.joins[there] += 1
            self.awaited.append(there)
            self.books["joined"] += 1
        elif known is not None and known[1] != (length,):
            assert (found.hits, found.joined, found.claimed, found.refused) == ({}, {}, {}, {key: known})
        else:
            assert list(found.hits) == [key]
            self.count("hits", [self.ready[key]], "hit_bytes")
            self.touch(key)

    @rule(key=st.sampled_from(KEYS))
    def reserve(self, key: str) -> None:
        self.lose_written([key])
        entry = self.index.reserve(key)
        assert (entry is None) == (key in self.standing)
        if entry is not None:
            self.begin(entry)

    @rule(key=st.sampled_from(KEYS))
    def find(self, key: str) -> None:
        self.lose_written([key])
        found = self.index.find(key)
        assert (found is not None) == (key in self.ready)
        if found is not None:
            assert found[0].data_ptr() == self.standing[key].copy.base.data_ptr()
            self.touch(key)

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), node=st.sampled_from(NODES))
    def ask_a_node(self, data: st.DataObject, node: str) -> None:
        entry = self.one_flying(data)
        self.index.came_from([entry], node)
        self.nodes[entry] = node

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), how=st.sampled_from(["publish", "deliver", "abort"]), nbytes=st.integers(0, 20))
    def land(self, data: st.DataObject, how: str, nbytes: int) -> None:
        entry = self.one_flying(data)
        self.flying.remove(entry)
        if (promise := self.promises[entry]) is not None:
            nbytes = promise[1][0]
        if how == "publish" and self.replacing.get(entry) == (self.standing.get(entry.key), self.num_clears):
            self.drop(entry.key)
            self.standing[entry.key] = entry
        stood = self.standing.get(entry.key) is entry
        self.settle(entry, how, nbytes)
        assert entry.is_settled
        assert entry.flight.landed is None or entry.flight.landed.done()
        if how == "abort":
            self.books["fetch_errors"] += entry.is_fetch
        else:
            self.nodes[entry] = NODES[0]
            if promise is None:
                self.promises[entry] = torch.uint8, (nbytes,), None if entry.is_fetch else NODES[0]
            self.books["joined_bytes"] += nbytes * self.joins[entry]
            self.books["miss_bytes"] += nbytes * entry.is_fetch
            self.books["fetch_bytes"] += nbytes * entry.is_fetch
        if how == "deliver":
            self.count("overflows", [nbytes], "overflow_bytes")
        if stood and how == "publish":
            self.ready[entry.key] = nbytes
        elif stood:
            self.drop(entry.key)
        self.settle(entry, data.draw(st.sampled_from(["publish", "abort"])), nbytes)  # too late: it changes nothing

    def one_flying(self, data: st.DataObject) -> Entry:
        return self.flying[data.draw(st.integers(0, len(self.flying) - 1))]

    def settle(self, entry: Entry, how: str, nbytes: int) -> None:
        if how == "abort":
            self.index.abort([entry], RuntimeError("failed"))
        else:
            arrived = Copy(entry.key, torch.zeros(nbytes, dtype=torch.uint8), None, nbytes)
            getattr(self.index, how)([(entry, arrived)], NODES[0], None)

    @rule()
    def hand_out(self) -> None:
        self.index.release(self.awaited)
        self.awaited.clear()

    @precondition(lambda self: self.ready)
    @rule(data=st.data())
    def hold_or_let_go(self, data: st.DataObject) -> None:
        self.held ^= {id(self.standing[data.draw(st.sampled_from(sorted(self.ready)))].copy.base)}

    @rule(keys=st.one_of(st.none(), st.sets(st.sampled_from(KEYS))), node=st.sampled_from([None, *NODES]))
    def clear(self, keys: set[str] | None, node: str | None) -> None:
        dropped = self.index.remove_node(node) if keys is None else self.index.remove(sorted(keys), node)
        self.num_clears += 1
        meant = [
            key
            for key, entry in self.standing.items()
            if (keys is None or key in keys) and (node is None or self.nodes[entry] == node)
        ]
        gone = {key: nbytes for key in meant if (nbytes := self.drop(key)) >= 0}
        assert {entry.key for entry in dropped} == gone.keys()
        self.count("cleared", gone.values())

    @precondition(lambda self: self.standing)
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        free = [
            key
            for key, entry in self.standing.items()
            if self.ready.get(key) and entry not in self.awaited and id(entry.copy.base) not in self.held
        ]
        assert [one.entry.key for one in self.index.candidates()] == free, "least recently used first"
        everything = {one.entry.key: one for one in self.index.candidates(held=True)}
        nothing = Copy("", torch.empty(0), None, 0)
        everything |= {
            key: Candidate(entry, entry.copy or nothing)
            for key, entry in self.standing.items()
            if key not in everything
        }
        keys = data.draw(st.lists(st.sampled_from(free or sorted(self.standing)), unique=True, max_size=3))
        keys += data.draw(st.lists(st.sampled_from(sorted(self.standing)), max_size=1))
        victims = [everything[key] for key in dict.fromkeys(keys)]
        assert self.index.evict(victims) == (set(keys) <= set(free)), "all or nothing"
        if set(keys) <= set(free):
            self.count("evictions", [self.drop(key) for key in dict.fromkeys(keys)], "evicted_bytes")

    @invariant()
    def knows_what_is_there(self) -> None:
        assert self.index._entries == self.standing
        assert list(self.index._entries) == list(self.standing), "least recently used first"
        assert self.index.keys() == list(self.ready)
        assert self.index.is_empty == (not self.standing)
        assert all((entry.state is State.READY) == (key in self.ready) for key, entry in self.standing.items())

    @invariant()
    def knows_what_each_is(self) -> None:
        assert all(entry.promise == self.promises[entry] for entry in self.standing.values())

    @invariant()
    def adds_up(self) -> None:
        stats = self.index.stats()
        assert {name: stats[name] for name in COUNTERS} == {name: self.books[name] for name in COUNTERS}
        assert (stats["num_entries"], stats["total_bytes"]) == (len(self.ready), sum(self.ready.values()))
        assert stats["requested"] == stats["hits"] + stats["host_hits"] + stats["joined"] + stats["misses"]
        assert stats["requested_bytes"] == stats["hit_bytes"] + stats["joined_bytes"] + stats["miss_bytes"]


TestIndex = IndexAgainstBooks.TestCase
TestIndex.settings = settings(max_examples=80, stateful_step_count=60, deadline=None, derandomize=True, database=None)
