"""Vector clocks, and memory that knows who touched it last: the race oracle of the simulated device."""

from __future__ import annotations

import dataclasses

import numpy as np

GRANULE = 512  # bytes that share a record; blocks are aligned to it, so no two share one
POISON = 0xDB  # the bytes of memory that no actor has written

HOST = "host"
Clock = dict[str, int]  # actor -> how much of its history is known


def join(into: Clock, other: Clock) -> None:
    """Let `into` know everything that `other` knows."""
    for actor, known in other.items():
        if known > into.get(actor, 0):
            into[actor] = known


@dataclasses.dataclass(frozen=True, slots=True)
class Touch:
    """One access: by whom, when in that actor's own history, and what it was, in words."""

    actor: str
    at: int
    what: str

    def is_before(self, clock: Clock) -> bool:
        """Whether an actor with this clock comes after the access."""
        return clock.get(self.actor, 0) >= self.at


class Region:
    """One allocation: its bytes, and for each granule the last write and the reads since.

    Source: the happens-before test of DJIT+ (Pozniansky and Schuster, 2003).
    """

    def __init__(self, name: str, memory: np.ndarray) -> None:
        self.name, self.memory, self.base = name, memory, memory.ctypes.data
        self.is_released = False
        num_granules = -(-len(memory) // GRANULE)
        self._writes: list[Touch | None] = [None] * num_granules
        self._reads: list[dict[str, Touch]] = [{} for _ in range(num_granules)]

    def __repr__(self) -> str:
        return f"Region({self.name}, {len(self.memory):,} bytes{', released' if self.is_released else ''})"

    def contains(self, address: int) -> bool:
        """Whether a byte is one of these."""
        return 0 <= address - self.base < len(self.memory)

    def read(self, start: int, nbytes: int, touch: Touch, clock: Clock) -> str:
        """Note a read of some bytes; returns the race with an earlier write, "" if there is none."""
        fault = self._use_after_release(touch)
        for granule in self._granules(start, nbytes):
            fault = fault or self._race(granule, self._writes[granule], touch, clock)
            self._reads[granule][touch.actor] = touch
        return fault

    def write(self, start: int, nbytes: int, touch: Touch, clock: Clock) -> str:
        """Note a write; returns the race with an earlier read or write, "" if there is none."""
        fault = self._use_after_release(touch)
        for granule in self._granules(start, nbytes):
            for earlier in (self._writes[granule], *self._reads[granule].values()):
                fault = fault or self._race(granule, earlier, touch, clock)
            self._writes[granule], self._reads[granule] = touch, {}
        return fault

    def _granules(self, start: int, nbytes: int) -> range:
        return range(start // GRANULE, -(-(start + nbytes) // GRANULE))

    def _use_after_release(self, touch: Touch) -> str:
        return f"use after release: {touch.what} of {touch.actor} in {self.name}" if self.is_released else ""

    def _race(self, granule: int, earlier: Touch | None, later: Touch, clock: Clock) -> str:
        if earlier is None or earlier.is_before(clock):
            return ""
        return (
            f"race at {self.name}+{granule * GRANULE}: {later.what} of {later.actor} "
            f"is not ordered after {earlier.what} of {earlier.actor}"
        )
