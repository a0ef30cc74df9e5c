"""Scopes: the end of a `with` drops the shards that were fetched inside, even if the caller lost their keys."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable
from contextvars import ContextVar, Token

from gpu_cache.index.entry import Entry, Holding
from gpu_cache.index.index import ShardIndex
from gpu_cache.process import no_interrupts

# A cache's innermost scope in a context. One for each cache: a scope is of one cache only.
ScopeVariable = ContextVar[Holding | None]


class Scope:
    """A part of a program whose shards are dropped at its end. `TensorCache.scope` makes it; it is entered once.

    Attributes:
        name: Its name in messages.
    Thread-safety: any thread; entered and left once.
    """

    def __init__(
        self, name: str, index: Callable[[], ShardIndex], variable: ScopeVariable, drop: Callable[[list[Entry]], int]
    ) -> None:
        self.name = name
        # Asked for each time: in a forked child the parent's may be locked for ever.
        self._index, self._variable, self._drop = index, variable, drop
        self._holding: Holding | None = None
        self._token: Token[Holding | None] | None = None

    @property
    def num_shards(self) -> int:
        """Shards that were fetched inside and are still cached, without those on their way. 0 after the end."""
        return self._held()[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the shards that `num_shards` counts."""
        return self._held()[1]

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self._holding is not None and self._holding.is_over

    def keys(self) -> list[Hashable]:
        """Keys of the shards that `num_shards` counts."""
        return [] if self._holding is None else [entry.key for entry in self._index().held_by(self._holding)]

    def __enter__(self) -> Scope:
        if self._holding is not None:
            raise RuntimeError(f"{self!r} was entered before; make another one")
        outer = self._variable.get()
        while outer is not None and outer.is_over:  # those of the code that started this task
            outer = outer.outer
        self._holding = Holding(outer)
        self._token = self._variable.set(self._holding)
        return self

    def __exit__(self, *error: object) -> None:
        assert self._holding is not None
        assert self._token is not None
        # A generator may leave it in another context, where nothing is to be set back. Where it was entered, a scope
        # that is over counts for nothing.
        with no_interrupts:
            with contextlib.suppress(ValueError):
                self._variable.reset(self._token)
            self._drop(self._index().end_scope(self._holding))

    def __repr__(self) -> str:
        if self._holding is None or self.is_over:
            return f"Scope({self.name!r}, {'over' if self.is_over else 'not entered'})"
        num_shards, nbytes = self._held()
        return f"Scope({self.name!r}, {num_shards:,} shards, {nbytes:,} bytes)"

    def _held(self) -> tuple[int, int]:
        held = [] if self._holding is None else self._index().held_by(self._holding)
        return len(held), sum(entry.nbytes for entry in held)
