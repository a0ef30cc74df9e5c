"""A small cache and a source whose readers a test moves from gate to gate."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

import pytest
import torch

from gpu_cache import CacheConfig, ShardReader, TensorCache
from gpu_cache.device.host import HostDevice
from gpu_cache.transfer.fetch import Fetch
from tests.support.interleave_actors import PATIENCE_S, Board, SteppedReader, SteppedSource

# Room for two shards, each of them a run and a window of its own.
CONFIG = CacheConfig(
    slab_bytes="64KiB", pool_bytes="64KiB", prealloc_bytes=0, run_bytes="32KiB", staging_slots=2,
    staging_slot_bytes="32KiB",
)  # fmt: skip
SHARDS: dict[Hashable, torch.Tensor] = {
    name: torch.full((30_000,), number + 1, dtype=torch.uint8) for number, name in enumerate("abcd")
}
NODE = "node:1"
GATES = ["before specs", "before a read", "after a read"]  # gates of a reader of one shard, in order


class Stage:
    """The stage of a test of one interleaving.

    Args:
        device: Where to cache.
        config: The cache's settings.
    """

    def __init__(self, device: HostDevice, config: CacheConfig = CONFIG) -> None:
        self.board = Board()
        self.source = SteppedSource(SHARDS, dict.fromkeys(SHARDS, NODE), self.board)
        if not device.stages:  # then a read is four slots long
            slot_bytes = config.staging_slot_bytes // 4
            config = dataclasses.replace(config, staging_slot_bytes=slot_bytes, run_bytes=slot_bytes)
        self.cache = TensorCache(config, device=device)

    def reader(self) -> SteppedReader:
        """The first reader, once it was opened and stands still."""
        eventually(lambda: bool(self.source.readers))
        reader = self.source.readers[0]
        self.board.settle([reader])
        return reader

    def at(self, gate: str) -> SteppedReader:
        """The same, moved to a gate."""
        reader = self.reader()
        while reader.gate != gate:
            reader.release(1)
            self.board.settle([reader])
        return reader

    def open_gates(self) -> None:
        """Let every reader go."""
        for reader in self.source.readers:
            if reader.gate:
                reader.release(1000)

    def check_nothing_lost(self) -> None:
        """Cleared, the cache is as if nothing had ever been asked for."""
        eventually(lambda: not self.cache._tasks)
        self.cache.clear()
        gc.collect()  # errors that the test caught
        engine = self.cache._engine
        assert engine is not None
        engine.pool.trim()
        assert not any(engine.pool.accounts().values()), engine.pool
        engine.pool.resume()
        assert engine.staging is None or not engine.staging.stats()["pinned_bytes"]
        assert self.cache._index.is_empty


class WaitingSource:
    """Another source, in whose `open` a caller stands until `go` is set."""

    def __init__(self, inner: SteppedSource) -> None:
        self._inner = inner
        self.has_arrived, self.go = threading.Event(), threading.Event()
        self.error: BaseException | None = None

    def open(self, keys: Sequence[Hashable], timeout_s: float) -> Iterable[ShardReader]:
        self.has_arrived.set()
        assert self.go.wait(PATIENCE_S)
        if self.error is not None:
            raise self.error
        return self._inner.open(keys, timeout_s)


@contextlib.contextmanager
def late_call() -> Iterator[threading.Event]:
    """The time of the next waiting call is up when the event is set, not before."""
    is_up, wait = threading.Event(), Fetch.wait

    def wait_in_vain(fetch: Fetch) -> None:
        patched.undo()
        assert is_up.wait(PATIENCE_S)
        fetch.deadline = time.monotonic()
        wait(fetch)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Fetch, "wait", wait_in_vain)
        yield is_up


def eventually(condition: Callable[[], object]) -> None:
    """Wait for what another thread is about to do."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.0005)
