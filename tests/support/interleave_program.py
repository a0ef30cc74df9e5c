"""Random interleavings of fetches, clears and puts with readers that are parked at their gates."""

from __future__ import annotations

import collections
import functools
import random
from collections.abc import Hashable, Sequence
from concurrent.futures import Future

import torch

from gpu_cache import CacheFullError, FetchError, TensorCache
from tests.support.interleave_actors import Board, Getter, SteppedReader, SteppedSource
from tests.support.sources import same_bytes

NUM_STEPS = 6
_LENGTHS = (100, 600, 1500, 0, 512)  # bytes: runs of several shards, of one, and one in two pieces
_MAX_READERS = 6  # at once; each may hold a staging slot
_RACING = 0.2  # how often the next step does not wait until a reader that was released stands still again


@functools.cache
def contents() -> dict[Hashable, torch.Tensor]:
    """Shards of two nodes, each with bytes of its own."""
    generator = torch.Generator().manual_seed(7)
    return {
        f"{node}{number}": torch.randint(0, 255, (nbytes,), generator=generator).byte()
        for node in "ab"
        for number, nbytes in enumerate(_LENGTHS)
    }


NODE_OF: dict[Hashable, str] = {key: f"node-{str(key)[0]}:1" for key in contents()}


class Interleaving:
    """One random order of steps. After each, what was cleared since it was last asked for is not cached.

    Args:
        cache: An empty one.
        getters: Idle ones.
        board: Theirs.
        seed: Chooses the order.
    """

    def __init__(self, cache: TensorCache, getters: Sequence[Getter], board: Board, seed: int) -> None:
        self._cache, self._getters, self._board, self._random = cache, getters, board, random.Random(seed)
        self._source = SteppedSource(contents(), NODE_OF, board)
        self._cleared: set[Hashable] = set()  # since they were last asked for
        self._prefetches: list[Future[int]] = []
        self._held: list[tuple[Hashable, torch.Tensor]] = []
        self._has_broken = False
        self.trace: list[str] = []
        # How often a clear met a key on its way: kind of clear, and gate of the reader that was to bring it.
        self.met: collections.Counter[tuple[str, str]] = collections.Counter()

    def run(self, num_steps: int = NUM_STEPS) -> None:
        """Take the steps, let everything end, and see that nothing was lost."""
        self._source.part_length = self._random.choice((2, 3, 5))
        self._source.ends_in_time = self._random.random() < 0.5
        actions, weights = zip(*_WEIGHTS.items(), strict=True)
        chosen = self._random.choices(actions, weights, k=num_steps)
        chosen.insert(self._random.randint(0, num_steps), "clear_parked")
        for name in [self._random.choice(("prefetch", "get")), "release", *chosen]:
            self.trace.append(name)
            getattr(self, f"_do_{name}")()
            self._collect()
            self._check()
        self._finish()

    def give_up(self) -> None:
        """Let every thread end, whatever becomes of it."""
        while any(not reader.has_ended for reader in self._source.readers):
            self._settle()
            for reader in self._parked():
                reader.release(1000)

    def _settle(self) -> None:
        self._board.settle([*self._source.readers, *self._getters])

    def _say(self, what: object) -> None:
        self.trace[-1] += f" {what}"

    # Steps: each is named in _WEIGHTS.

    def _do_prefetch(self) -> None:
        keys = self._asked_for()
        if keys:
            self._prefetches.append(self._cache.prefetch(keys, self._source))
            self._settle()

    def _do_get(self) -> None:
        idle = [getter for getter in self._getters if getter.is_idle]
        if idle and (keys := self._asked_for()):
            idle[0].get(self._cache, keys, self._source)
            self._settle()

    def _do_put(self) -> None:
        key = self._random.choice(list(contents()))
        self._settle()
        self._cleared.discard(key)
        self._say(key)
        try:
            self._cache.put(key, contents()[key], node=NODE_OF[key])
        except CacheFullError:
            assert self._cache.get(key) is None

    def _do_release(self) -> None:
        if parked := self._parked():
            reader = self._random.choice(parked)
            num_gates = self._random.choice((1, 1, 2, 3, 100))
            self._say(f"{reader.node} {reader.gate}, {num_gates}")
            reader.release(num_gates)
            if self._random.random() >= _RACING:
                self._settle()

    def _do_break(self) -> None:
        if parked := self._parked():
            reader = self._random.choice(parked)
            self._say(f"{reader.node} {reader.gate}")
            self._has_broken = True
            reader.break_off()
            self._settle()

    def _do_clear(self) -> None:
        self._clear(self._random.sample(list(contents()), self._random.choice((1, 3, 5))))

    def _do_clear_parked(self) -> None:
        """A clear that means a shard whose reader is parked for certain."""
        self._settle()
        for num_gates in (self._random.randrange(4), 0):
            if not self._parked():
                self._do_clear_all()
                self._do_prefetch()
            for _ in range(num_gates):
                self._advance()
        key = self._random.choice(self._random.choice(self._parked()).keys)
        kind = self._random.choice(("keys", "node", "some of node", "all"))
        if kind == "all":
            self._do_clear_all()
        elif kind == "node":
            self._clear_node(NODE_OF[key])
        elif kind == "keys":
            self._clear([key, *self._random.sample(list(contents()), 2)])
        else:
            self._clear_some_of_node(NODE_OF[key], [key, *self._random.sample(list(contents()), 4)])

    def _advance(self) -> None:
        """Let one reader go on to its next gate, if it has one."""
        if parked := [reader for reader in self._parked() if reader.gate != "before the end"]:
            self._random.choice(parked).release(1)
            self._settle()

    def _do_clear_node(self) -> None:
        self._clear_node(self._random.choice(list(NODE_OF.values())))

    def _do_clear_some_of_node(self) -> None:
        node = self._random.choice(list(NODE_OF.values()))
        self._clear_some_of_node(node, self._random.sample(list(contents()), 5))

    def _do_clear_all(self) -> None:
        self._note_cleared("clear()", list(contents()))
        self._cache.clear()

    def _do_drop(self) -> None:
        self._held.clear()

    def _clear(self, keys: list[Hashable]) -> None:
        self._note_cleared("clear(keys)", keys)
        self._cache.clear(keys)

    def _clear_node(self, node: str) -> None:
        self._note_cleared("clear_node(node)", [key for key in NODE_OF if NODE_OF[key] == node])
        self._cache.clear_node(node)

    def _clear_some_of_node(self, node: str, keys: list[Hashable]) -> None:
        self._note_cleared("clear_node(node, keys)", [key for key in keys if NODE_OF[key] == node])
        self._cache.clear_node(node, keys)

    def _asked_for(self) -> list[Hashable]:
        """Keys to ask for, unless so many readers stand still that a further one might find no staging buffer."""
        self._settle()
        if sum(not reader.has_ended for reader in self._source.readers) > _MAX_READERS - len(set(NODE_OF.values())):
            return []
        keys = self._random.sample(list(contents()), self._random.choice((1, 3, 5)))
        self._cleared.difference_update(keys)
        self._say(keys)
        return keys

    def _parked(self) -> list[SteppedReader]:
        return [reader for reader in self._source.readers if reader.gate]

    def _note_cleared(self, kind: str, keys: Sequence[Hashable]) -> None:
        self._say(f"{kind} {keys}")
        self._cleared.update(keys)
        on_their_way = [reader for reader in self._source.readers if set(keys).intersection(reader.keys)]
        self.met.update((kind, r.gate or "while it moves") for r in on_their_way if not r.has_ended)

    # Invariants.

    def _collect(self) -> None:
        """Look at what calls that have ended brought."""
        for getter in self._getters:
            if getter.outcome is not None:
                self._check_outcome(getter.keys, getter.take())

    def _check_outcome(self, keys: Sequence[Hashable], outcome: list[torch.Tensor] | BaseException) -> None:
        if isinstance(outcome, FetchError):
            assert self._has_broken, outcome
            assert outcome.failures.keys() <= set(keys), outcome
            return
        assert isinstance(outcome, list), outcome
        self._held += zip(keys, outcome, strict=True)
        self._check_held(self._held[-len(keys) :])

    def _check_held(self, held: Sequence[tuple[Hashable, torch.Tensor]]) -> None:
        wrong = [key for key, tensor in held if not same_bytes(tensor, contents()[key])]
        assert not wrong, f"wrong bytes: {wrong}"

    def _check(self) -> None:
        back = self._cleared.intersection(self._cache.keys())
        assert not back, f"cleared, not asked for since, and cached: {back}"
        assert self._cache._engine is not None
        accounts = self._cache._engine.pool.accounts()
        reserved = accounts.pop("reserved")
        assert sum(accounts.values()) == reserved, accounts

    def _finish(self) -> None:
        """Let every reader run to its end and every call return."""
        self.trace.append("finish")
        self._settle()
        while parked := self._parked():
            for reader in parked:
                reader.release(1000)
            self._settle()
        self._collect()
        assert all(getter.is_idle for getter in self._getters)
        for future in self._prefetches:
            error = future.exception(0)
            assert error is None or isinstance(error, FetchError | CacheFullError), error
        self._check()
        self._check_held(self._held)
        index = self._cache._index
        assert len(index) == len(index._entries), "an entry is still PENDING"
        stats = self._cache.buffer_stats()
        assert stats["requested"] == stats["hits"] + stats["joined"] + stats["misses"]
        assert stats["requested_bytes"] == stats["hit_bytes"] + stats["joined_bytes"] + stats["miss_bytes"]
        self._leave_nothing()

    def _leave_nothing(self) -> None:
        """Drop and clear everything: every byte is free again."""
        self._held.clear()
        self._cache.clear()
        self._cache.synchronize()
        assert self._cache._engine is not None
        accounts = self._cache._engine.pool.accounts()
        assert accounts["free"] == accounts["reserved"], accounts
        assert self._cache._index.is_empty
        assert not self._cache._tasks


_WEIGHTS = {
    "prefetch": 10, "get": 12, "put": 5, "release": 40, "break": 3,
    "clear": 12, "clear_node": 3, "clear_some_of_node": 4, "clear_all": 4, "drop": 3,
}  # fmt: skip
