"""Objects of programs on the simulated device: shards, tensors handed out, readers that stop or break."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Hashable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch

from gpu_cache import FetchError, ShardReader, ShardSpec
from tests.support.sim_streams import SimStream
from tests.support.sources import GatedReader

_LENGTHS = (512, 1, 0, 100, 513, 1500, 3000, 4096, 8000, 20_000)  # bytes; the last takes two slots


@functools.cache
def contents() -> dict[Hashable, torch.Tensor]:
    """Some shards, each with bytes of its own. None holds poison."""
    generator = torch.Generator().manual_seed(1)
    return {
        f"shard-{number}": torch.randint(0, 200, (_LENGTHS[number % len(_LENGTHS)],), generator=generator).byte()
        for number in range(3 * len(_LENGTHS))
    }


@dataclasses.dataclass(eq=False)
class Held:
    """A tensor that a consumer has, what it must hold, and where it may be read (None: everywhere)."""

    tensor: torch.Tensor
    expected: np.ndarray
    streams: list[SimStream] | None
    what: str
    recorded: set[SimStream] = dataclasses.field(default_factory=set)  # those that the cache was told of


@dataclasses.dataclass(eq=False)
class Flight:
    """A fetch that stands still half-way."""

    future: Future[Any]
    reader: GatedReader
    asked: list[Hashable]  # by a call that still waits for them
    keys: set[Hashable]  # those of them that were not cleared meanwhile
    cleared: set[Hashable] = dataclasses.field(default_factory=set)  # and not asked for since

    def wait_for_gate(self) -> None:
        """Until it stands still, or has nothing to read."""
        while not self.reader.has_arrived.wait(0.001) and not self.future.done():
            pass

    def clear(self, keys: Iterable[Hashable]) -> None:
        """These are not to be cached when they arrive."""
        self.cleared |= self.keys.intersection(keys)
        self.keys -= self.cleared


class LateReader(GatedReader):
    """Begins when its call has given it up, and lets that call return when it stands still: no clock decides."""

    def __init__(self, inner: ShardReader) -> None:
        super().__init__(inner)
        self._is_given_up = threading.Event()

    def next_specs(self) -> Sequence[ShardSpec] | None:
        assert self._is_given_up.wait(30)
        return super().next_specs()

    def cancel(self) -> None:
        super().cancel()
        self._is_given_up.set()
        assert self.has_arrived.wait(30)

    def close(self) -> None:
        self.has_arrived.set()  # there was nothing to read
        super().close()


def broken(reader: ShardReader, num_reads: int) -> GatedReader:
    """A reader that fails after so many reads."""

    def fail() -> None:
        raise FetchError("the connection broke")

    failing = GatedReader(reader, num_reads)
    failing.gate.set()
    failing.after_gate = fail
    return failing
