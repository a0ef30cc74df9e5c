"""Entries of the index and what passes between the index and a transfer. Plain records; the index lock guards them."""

from __future__ import annotations

import dataclasses
import enum
import weakref
from collections.abc import Hashable, Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeAlias

import torch

# What a caller was told of a shard, or what a shard is: dtype, shape, and owner; None: any owner, or an unknown one.
Promise: TypeAlias = tuple[torch.dtype, tuple[int, ...], str | None]


class State(enum.Enum):
    """Of an entry, as its key's waiters see it."""

    PENDING = enum.auto()  # somebody is fetching it
    READY = enum.auto()  # its tensor can be handed out
    GONE = enum.auto()  # cleared, evicted or failed; whoever holds the entry object still owns its tensor


@dataclasses.dataclass(slots=True, eq=False)
class Parked:
    """A shard in the host tier. Fields as in Entry."""

    base: torch.Tensor
    lease: Any  # a lease.Lease
    completion: Any  # of the copy that filled it; None: it was received there
    version: int
    loan: torch.Tensor | None = None

    @property
    def counted(self) -> torch.Tensor:
        """See Entry."""
        return self.base if self.loan is None else self.loan


@dataclasses.dataclass(slots=True, eq=False)
class Entry:
    """One generation of a key: a cleared and refetched key has a new one. Fields are guarded by the index lock.

    A READY entry has either `base` or `parked`. While a parked one is brought back it stays as it is, and a PENDING one
    beside it, which is not indexed, has the flight; whoever brings it back and is too late for the index gives it to
    those who wait, as of a fetch.
    """

    key: Hashable
    generation: int
    state: State = State.PENDING
    node: str = ""
    nbytes: int = 0
    base: torch.Tensor | None = None  # on its block, and never handed out; set once
    loan: torch.Tensor | None = None  # what was, or will be, handed out: to one reader at a time, see claims.py
    lease: weakref.ref[torch.UntypedStorage] | None = None
    completion: Any = None  # of the copy that filled it (transfer.Completion); None: nothing to wait for
    error: BaseException | None = None
    is_fetch: bool = True  # False: put by the caller, which counts as no look-up
    is_kept: bool = False  # meant to outlive clears
    num_awaiting: int = 0  # calls that claimed or joined it and have yet to hand it out; meanwhile it is no victim
    born: float = 0.0
    epoch: int = 0  # clears seen when it was published
    num_joined: int = 0
    deadline: float = 0.0  # of the claiming call
    version: int = 0  # of `counted` when its block was last known to hold what the source has
    checksum: int | None = None  # of its bytes, with `debug_checksum`, before anybody had it
    parked: Parked | None = None  # where it is in the host tier
    moving: Entry | None = None  # which brings it back
    resident: Entry | None = None  # of `moving`: the parked one
    origin: Parked | None = None  # of `moving`: what is copied, until it landed
    is_shared: bool = False  # of `moving`: `resident` has its tensor, and counts those who await it
    flight: Future[None] | None = None  # made when the first other call joins; done when the entry is settled
    promise: Promise | None = None  # PENDING: of the claiming call, if it has one; READY: what the shard is
    # The generation, of another owner, whose place it takes when it lands; and the drops on request seen before.
    replaces: tuple[int, int] | None = None

    @property
    def place(self) -> Entry | Parked:
        """Where its tensor is, once it is there."""
        return self.parked or self

    @property
    def counted(self) -> torch.Tensor | None:
        """A tensor that shares its version counter with everything that was handed out."""
        return self.base if self.loan is None else self.loan

    @property
    def has_arrived(self) -> bool:
        """Whether it has a tensor, on the device or in the host tier."""
        return self.base is not None or self.parked is not None

    @property
    def is_settled(self) -> bool:
        """Whether it arrived or failed."""
        return self.base is not None or self.parked is not None or self.error is not None

    @property
    def is_new(self) -> bool:
        """Whether nothing of its key was cached when it was claimed, neither on the device nor in the host tier."""
        return self.resident is None

    def is_owned_as(self, promise: Promise | None) -> bool:
        """Whether it is of the owner that a caller means, as far as both say."""
        if promise is None or self.promise is None:
            return True
        return promise[2] == self.promise[2] or promise[2] is None or self.promise[2] is None

    def is_tensor_of(self, promise: Promise | None) -> bool:
        """Whether it has the dtype and shape that a caller expects, as far as both say."""
        return promise is None or self.promise is None or promise[:2] == self.promise[:2]

    @property
    def is_changed(self) -> bool:
        """Whether a reader wrote into it, as far as torch counts."""
        counted = self.place.counted
        return counted is not None and counted._version != self.place.version


@dataclasses.dataclass(slots=True)
class Claim:
    """What a look-up of several keys found, by key. `hits` are aliases already, safe to read after `completions`."""

    hits: dict[Hashable, torch.Tensor] = dataclasses.field(default_factory=dict)
    completions: dict[Any, None] = dataclasses.field(default_factory=dict)  # of the hits, each once
    host_completions: dict[Any, None] = dataclasses.field(default_factory=dict)  # of those in the host tier
    joined: dict[Hashable, Entry] = dataclasses.field(default_factory=dict)
    claimed: dict[Hashable, Entry] = dataclasses.field(default_factory=dict)
    num_removals: int | None = None  # before the call's first look-up
    is_current: bool = True  # nothing was dropped on request since then
    deadline: float = 0.0
    mutated: dict[Hashable, None] = dataclasses.field(default_factory=dict)  # dropped: a reader wrote into them
    expected: Mapping[Hashable, Promise] = dataclasses.field(default_factory=dict)  # by the caller
    refused: dict[Hashable, Promise] = dataclasses.field(default_factory=dict)  # cached, and other than expected


@dataclasses.dataclass(slots=True, eq=False)
class Holding:
    """What was fetched inside a scope, as keys by generation. Guarded by the index lock."""

    outer: Holding | None = None
    keys: dict[int, Hashable] = dataclasses.field(default_factory=dict)
    prune_at: int = 4096  # of what it once held, much may be gone, in a scope around many steps
    is_over: bool = False


class Candidate(NamedTuple):
    """An entry that may be evicted, and where it was when that was looked at."""

    entry: Entry
    base: torch.Tensor
    lease: Any
    completion: Any
    is_held: bool = False  # by somebody who may write into it
