"""Stream queues of the simulated device, and the adversary that decides which of them gets on."""

from __future__ import annotations

import dataclasses
import gc
import random
from collections import deque
from collections.abc import Callable, Sequence

from tests.support.sim_clock import Clock, join


@dataclasses.dataclass(slots=True, eq=False)
class SimEvent:
    """A mark in a stream. `clock` is what the stream knew when it got there; None: not yet."""

    stream: SimStream
    is_timed: bool = False
    clock: Clock | None = None


@dataclasses.dataclass(slots=True, eq=False)
class Work:
    """One thing in a queue: what the host knew when it enqueued it, and what it does when its turn comes."""

    known: Clock
    run: Callable[[SimStream], None]
    blocker: SimEvent | None = None  # must be done first


@dataclasses.dataclass(slots=True, eq=False)
class SimStream:
    """Work in order. Nothing runs until the adversary or a host that waits makes it."""

    name: str
    queue: deque[Work] = dataclasses.field(default_factory=deque)
    clock: Clock = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        return f"SimStream({self.name}, {len(self.queue)} queued)"

    @property
    def blocker(self) -> SimEvent | None:
        """The event, not yet done, that the head of the queue waits for."""
        blocker = self.queue[0].blocker if self.queue else None
        return blocker if blocker is not None and blocker.clock is None else None

    def step(self) -> None:
        """Run the head of the queue."""
        work = self.queue.popleft()
        join(self.clock, work.known)
        self.clock[self.name] = self.clock.get(self.name, 0) + 1
        work.run(self)

    def reach(self, event: SimEvent) -> None:
        """Run what `event` of this stream needs, here and elsewhere, and not one thing more."""
        while event.clock is None:
            if (blocker := self.blocker) is not None:
                blocker.stream.reach(blocker)
            else:
                self.step()


class Adversary:
    """Chooses, by a seed, which streams get on and how far, each time that the host looks away.

    Each stream has a mood (stalled, slow, quick), drawn again now and then; so one of them can lag for long.
    It also collects garbage, once a step, at a moment of its choice: within a device call or a critical section.
    """

    _MOODS = (0.0, 0.0, 0.2, 1.0, 5.0)
    _STEPS = (0, 0, 0, 1, 2, 5)

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._moods: dict[str, float] = {}
        self._is_idle = False
        self._moments_left = 0

    def begin(self, seed: int = 0, collect_at: int = 0) -> None:
        """Begin a step of a program.

        Args:
            seed: Chooses the streams' own progress; 0: none.
            collect_at: Number of the moment at which garbage is collected; 0: at none.
        """
        self._random.seed(seed)
        self._is_idle, self._moments_left = not seed, collect_at

    def moment(self) -> None:
        """A bad one for a collection, which may come all the same."""
        self._moments_left -= 1
        if self._moments_left == 0:
            gc.collect()

    def drift(self, streams: Sequence[SimStream]) -> None:
        """Let some streams get on, or none."""
        self.moment()
        if self._is_idle:
            return
        if self._random.random() < 0.1:
            self._moods.clear()
        for _ in range(self._random.choice(self._STEPS)):
            ready = [one for one in streams if one.queue and one.blocker is None and self._mood(one)]
            if not ready:
                return
            self._random.choices(ready, [self._mood(one) for one in ready])[0].step()

    def finish(self, streams: Sequence[SimStream]) -> None:
        """Run everything, in some order."""
        while ready := [one for one in streams if one.queue and one.blocker is None]:
            self._random.choice(ready).step()

    def _mood(self, stream: SimStream) -> float:
        return self._moods.setdefault(stream.name, self._random.choice(self._MOODS))
