"""Entries of the index, and records that the index and a transfer exchange. The index lock guards them all."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Hashable, Mapping
from concurrent.futures import Future
from typing import Any, Literal, NamedTuple, TypeAlias

import torch

from gpu_cache.pool.block import Copy

# Dtype, shape and owner of a shard: as a caller expects them, or as they are. None: any owner, or an unknown one.
Promise: TypeAlias = tuple[torch.dtype, tuple[int, ...], str | None]


class State(enum.Enum):
    """An entry's state, as callers that wait for its key see it."""

    PENDING = enum.auto()  # a call is fetching it
    READY = enum.auto()  # its tensor can be handed out
    GONE = enum.auto()  # cleared, evicted or failed; callers that hold the entry keep its tensor alive


@dataclasses.dataclass(slots=True, eq=False)
class Flight:
    """A shard's way to its level. Not to be changed: the entries of one claim share it until one of them needs its own.

    Attributes:
        kind: The shard's origin. "fetch": a source. "put": the caller of `put`, which does not count as a look-up.
            "rise": the level below, which has it. "follow": the level below, when the shard will have come there.
        deadline: The claiming call's.
        num_joined: Calls that joined it.
        landed: Made for the first call that joins; done when the entry is settled.
        error: The reason why it did not arrive.
        replaces: A generation that is another owner's, and the drops on request so far. If none follows, it replaces
            that one.
    """

    kind: Literal["fetch", "put", "rise", "follow"] = "fetch"
    deadline: float = 0.0
    num_joined: int = 0
    landed: Future[None] | None = None
    error: BaseException | None = None
    replaces: tuple[int, int] | None = None

    @property
    def is_copy(self) -> bool:
        """Whether it comes from the level below."""
        return self.kind in ("rise", "follow")

    def joined(self) -> Flight:
        """It, with one more call that waits for it."""
        landed = self.landed or Future()
        return Flight(self.kind, self.deadline, self.num_joined + 1, landed, self.error, self.replaces)

    def failed(self, error: BaseException) -> Flight:
        """It, once it is given up."""
        return Flight(self.kind, self.deadline, self.num_joined, self.landed, error, self.replaces)


class Arrival(NamedTuple):
    """When shards that came together were first READY.

    Attributes:
        born: The ledger's time.
        epoch: The clears seen by then.
    """

    born: float = 0.0
    epoch: int = 0


NOT_YET = Arrival()


@dataclasses.dataclass(slots=True, eq=False)
class Entry:
    """One generation of a key, at one level. A refetched key has a new generation; a move to another level keeps it.

    The index lock guards every field. Once the entry is settled, a call that waits may read `copy`, `node` and
    `flight.error` without the lock. An awaited entry moves to no other level.
    """

    key: Hashable
    generation: int
    flight: Flight = dataclasses.field(default_factory=Flight)
    state: State = State.PENDING
    node: str = ""
    promise: Promise | None = None  # PENDING: the claiming call's, if it has one; READY: the shard's
    copy: Copy | None = None  # its bytes; None until it lands
    num_awaiting: int = 1  # calls that claimed or joined it and have yet to hand it out; until then it is no victim
    is_kept: bool = False  # meant to outlive clears
    arrival: Arrival = NOT_YET

    @property
    def nbytes(self) -> int:
        """The shard's bytes; 0 before it landed."""
        return 0 if self.copy is None else self.copy.nbytes

    @property
    def error(self) -> BaseException | None:
        """The reason why it did not arrive; None: it did, or may yet."""
        return self.flight.error

    @property
    def is_fetch(self) -> bool:
        """Whether a source delivers it."""
        return self.flight.kind == "fetch"

    @property
    def is_settled(self) -> bool:
        """Whether it arrived or failed."""
        return self.copy is not None or self.flight.error is not None

    @property
    def is_changed(self) -> bool:
        """Whether a reader wrote into it, as far as torch counts writes."""
        return (copy := self.copy) is not None and copy.is_changed

    def join(self) -> None:
        """Count one more call that waits for it."""
        self.num_awaiting, self.flight = self.num_awaiting + 1, self.flight.joined()

    def is_owned_as(self, promise: Promise | None) -> bool:
        """Whether its owner is the one that a caller means, as far as both name one."""
        if promise is None or self.promise is None:
            return True
        return promise[2] == self.promise[2] or promise[2] is None or self.promise[2] is None

    def is_tensor_of(self, promise: Promise | None) -> bool:
        """Whether it has the dtype and shape that a caller expects, as far as both say."""
        mine = self.promise
        return promise is None or mine is None or promise is mine or promise[:2] == mine[:2]


@dataclasses.dataclass(slots=True)
class Claim:
    """The result of a look-up of several keys, by key. `hits` are tensors, safe to read after `completions`."""

    hits: dict[Hashable, torch.Tensor] = dataclasses.field(default_factory=dict)
    completions: dict[Any, bool] = dataclasses.field(
        default_factory=dict
    )  # the hits' copies; whether each is on the host
    joined: dict[Hashable, Entry] = dataclasses.field(default_factory=dict)
    claimed: dict[Hashable, Entry] = dataclasses.field(default_factory=dict)
    below: dict[Hashable, Entry] = dataclasses.field(default_factory=dict)  # claimed ones are copied from these
    num_removals: int | None = None  # drops on request before the call's first look-up
    deadline: float = 0.0
    mutated: dict[Hashable, None] = dataclasses.field(default_factory=dict)  # dropped: a reader wrote into them
    expected: Mapping[Hashable, Promise] = dataclasses.field(default_factory=dict)  # by the caller
    refused: dict[Hashable, Promise] = dataclasses.field(default_factory=dict)  # cached, but not as expected


@dataclasses.dataclass(slots=True, eq=False)
class Holding:
    """Keys fetched inside a scope, by generation. Guarded by the index lock."""

    outer: Holding | None = None
    keys: dict[int, Hashable] = dataclasses.field(default_factory=dict)
    prune_at: int = 4096  # keys; in a scope around many steps most of them may be gone
    is_over: bool = False


class Candidate(NamedTuple):
    """An entry that may be evicted, and the copy that it had when the index looked."""

    entry: Entry
    copy: Copy
    is_held: bool = False  # by a reader that may write into it
