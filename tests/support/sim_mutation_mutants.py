"""Mutants of writes into shards: writes that the index overlooks, and drops that it forgets."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

from gpu_cache.index import lending
from gpu_cache.index.entry import Entry
from gpu_cache.index.index import ShardIndex
from tests.support.sim_mutant import Mutants

MUTATION_MUTANTS = Mutants()
_mutant = MUTATION_MUTANTS.enter


@_mutant("a look-up that does not look for writes", ShardIndex, "claim")
def _unseen(original: Any, self: ShardIndex, *args: Any, hands_out: bool = True, **options: Any) -> Any:
    return original(self, *args, hands_out=False, **options)


@_mutant("a written shard that is found, and not dropped", ShardIndex, "_drop_changed_locked")
def _undropped(original: Any, self: ShardIndex, keys: Any, expected: Any, changed: list[Entry]) -> None:
    self._mutations.found(lending.changed_in(self._levels.tables, keys, expected))


@_mutant("a look for writes that ends with the first shard", lending, "changed_in")
def _first_only(original: Any, tables: Any, keys: Iterable[Hashable], expected: Any) -> Any:
    return original(tables, list(keys)[:1], expected)


@_mutant("a quick hit that does not look for writes", ShardIndex, "hits")
def _quick(original: Any, self: ShardIndex, keys: Any, expected: Any) -> Any:
    was_on, self._mutations.is_on = self._mutations.is_on, False
    try:
        return original(self, keys, expected)
    finally:
        self._mutations.is_on = was_on
