"""Random programs on a real `TensorCache` over the simulated device."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import random
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch

from gpu_cache import CacheConfig, CacheFullError, FetchError, TensorCache, process
from gpu_cache.config import ReadyMode
from tests.support.sim_device import SimDevice
from tests.support.sim_streams import SimStream
from tests.support.sources import BrokenReader, DictSource, GatedReader

NUM_STEPS = 60
_KIB = 1 << 10
CONFIG = CacheConfig(
    slab_bytes=64 * _KIB, pool_bytes=160 * _KIB, prealloc_bytes=64 * _KIB, staging_slots=2,
    staging_slot_bytes=16 * _KIB, run_bytes=8 * _KIB, fetch_timeout_s=20,
)  # fmt: skip
_LENGTHS = (0, 1, 100, 512, 513, 1500, 3000, 4096, 8000, 20_000)  # bytes; the last takes two slots
_NODE = "node-a:1"
_MAX_HELD = 14


class SimFaultError(AssertionError):
    """What the simulated device saw, and the steps that led there."""


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


@dataclasses.dataclass(eq=False)
class Flight:
    """A prefetch that stands still half-way."""

    future: Future[int]
    reader: GatedReader
    keys: set[Hashable]  # not cleared meanwhile


class Program:
    """Takes random steps, each of them allowed; what comes of it is in the device's faults.

    Deterministic: one thread is awake at a time. A fetch has one reader, whose thread the caller waits for.

    Args:
        seed: Of the steps and of the adversary.
        num_threads_ok: Whether other programs run on `device` and `cache` too, which are then given.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.device = SimDevice(seed)
        self.cache = TensorCache(CONFIG, device=self.device)
        self._source = DictSource(contents(), _NODE)
        self._streams = [*self.device.pooled, self.device.new_stream()]  # the last is no fence's: made by somebody else
        self._held: list[Held] = []
        self._flight: Flight | None = None
        self.trace: list[str] = []
        _observe(self.cache, self.device)

    def run(self, num_steps: int = NUM_STEPS) -> None:
        """Take the steps, then let everything go and see that every byte came back.

        Raises:
            SimFaultError: The device saw a race or wrong bytes.
            AssertionError: Bytes are lost.
        """
        actions, weights = zip(*_WEIGHTS.items(), strict=True)
        for name in self._random.choices(actions, weights, k=num_steps):
            self._step(name)
        for name in ("land", "drop_all", "gc", "clear_all", "finish", "synchronize"):
            self._step(name)
        self._check_accounts(is_over=True)

    def close(self) -> None:
        """Leave nothing behind, however broken the cache is."""
        if self._flight is not None:
            self._flight.reader.gate.set()
        self._held.clear()
        with contextlib.suppress(Exception):
            self.cache.close()
        process._retired.clear()

    def _step(self, name: str) -> None:
        self.trace.append(name)
        getattr(self, f"_do_{name}")()
        self._check_accounts()
        if self.device.faults:
            raise SimFaultError("\n".join([f"step {len(self.trace)}", *self.device.faults[:5], *self.trace[-8:]]))

    def _say(self, what: object) -> None:
        self.trace[-1] += f" {what}"

    def _check_accounts(self, *, is_over: bool = False) -> None:
        engine = self.cache._engine
        assert engine is not None
        accounts = engine.pool.accounts()
        reserved = accounts.pop("reserved")
        assert sum(accounts.values()) == reserved, accounts
        if self._flight is None:
            index = self.cache._index
            assert accounts["pending"] == 0, accounts
            assert len(index) == len(index._entries), index
            assert engine.staging is not None
            assert engine.staging.stats()["pinned_bytes"] == 0
        if is_over:
            assert accounts["held"] == accounts["quarantined"] == 0, accounts

    # Steps: each is named in _WEIGHTS.

    def _do_get(self) -> None:
        keys = self._some_keys()
        ready: ReadyMode = self._random.choice(("host", "stream"))
        stream = self._random.choice(self._streams)
        if self._flight is not None and self._flight.keys.intersection(keys):
            self._do_land()
        self._say(f"{keys} {ready} on {stream.name}")
        with self.device.stream(stream):
            tensors = self.cache.get_many(keys, self._source, ready=ready)
        for key, tensor in zip(keys, tensors, strict=True):
            self._hold(key, tensor, None if ready == "host" else [stream])

    def _do_get_one(self) -> None:
        key = self._random.choice(list(contents()))
        found = self.cache.get(key)
        if found is not None:
            self._hold(key, found, None)

    def _do_get_broken(self) -> None:
        """A fetch whose connection breaks after some reads."""
        if self._flight is not None:
            self._do_land()
        num_reads = self._random.randrange(3)
        self._source.wrap = lambda reader: BrokenReader(reader, num_reads)
        with contextlib.suppress(FetchError):
            self.cache.get_many([*self._some_keys(), *self._some_keys()], self._source)
        self._source.wrap = lambda reader: reader

    def _do_prefetch(self) -> None:
        if self._flight is not None:
            self._do_land()
        readers: list[GatedReader] = []

        def gate(reader: Any) -> GatedReader:
            readers.append(GatedReader(reader))
            return readers[-1]

        keys = self._some_keys()
        self._say(keys)
        self._source.wrap = gate
        future = self.cache.prefetch(keys, self._source)
        self._source.wrap = lambda reader: reader
        if readers:
            self._flight = Flight(future, readers[0], set(keys))
            while not readers[0].has_arrived.wait(0.001) and not future.done():
                pass

    def _do_land(self) -> None:
        flight, self._flight = self._flight, None
        if flight is not None:
            flight.reader.gate.set()
            flight.future.result(20)

    def _do_read(self) -> None:
        if not self._held:
            return
        held = self._random.choice(self._held)
        stream = self._random.choice(held.streams or self._streams)
        if stream not in self.device.pooled:
            self.cache.record_stream(held.tensor, stream)
        self._say(f"{held.what} on {stream.name}")
        self.device.kernel(stream, held.tensor, held.expected, f"a kernel on {held.what}")

    def _do_cross(self) -> None:
        """Make another stream wait for one that may read."""
        held = next((one for one in self._held if one.streams), None)
        if held is not None and held.streams:
            other = self._random.choice(self._streams)
            self.device.wait(other, self.device.record(held.streams[0]))
            held.streams.append(other)
            self._say(f"{held.what} to {other.name}")

    def _do_view(self) -> None:
        if not self._held:
            return
        held = self._random.choice(self._held)
        begin, end = sorted(self._random.choices(range(len(held.expected) + 1), k=2))
        view = dataclasses.replace(held, tensor=held.tensor[begin:end], expected=held.expected[begin:end])
        if self._random.random() < 0.5:
            self._held.remove(held)
        self._held.append(view)

    def _do_drop(self) -> None:
        if self._held:
            held = self._held.pop(self._random.randrange(len(self._held)))
            self._say(held.what)
            if self._random.random() < 0.2:
                cycle: list[Any] = [held.tensor]
                cycle.append(cycle)

    def _do_drop_all(self) -> None:
        self._held.clear()

    def _do_clear(self) -> None:
        keys = self._random.sample(list(contents()), 10)
        self._say(keys)
        self.cache.clear(keys)
        if self._flight is not None:
            self._flight.keys.difference_update(keys)

    def _do_clear_all(self) -> None:
        if self._random.random() < 0.5:
            self.cache.clear()
            if self._flight is not None:
                self._flight.keys.clear()
        else:
            self.cache.clear_node(_NODE)  # whose node is not known before it lands stays
            self.cache.clear_node("here")

    def _do_put(self) -> None:
        key = self._random.choice(list(contents()))
        with contextlib.suppress(CacheFullError):
            self.cache.put(key, contents()[key], node="here")

    def _do_trim(self) -> None:
        self.cache.trim(self._random.choice((0, 64 * _KIB)))

    def _do_synchronize(self) -> None:
        self.cache.synchronize()

    def _do_gc(self) -> None:
        gc.collect()

    def _do_finish(self) -> None:
        if self._random.random() < 0.5:
            self.device.finish()

    def _hold(self, key: Hashable, tensor: torch.Tensor, streams: list[SimStream] | None) -> None:
        self._held.append(Held(tensor, contents()[key].numpy(), streams, str(key)))
        while len(self._held) > _MAX_HELD:
            self._held.pop(self._random.randrange(len(self._held)))

    def _some_keys(self) -> list[Hashable]:
        return self._random.sample(list(contents()), self._random.randint(1, 5))


_WEIGHTS = {
    "get": 24, "get_one": 4, "get_broken": 3, "prefetch": 6, "land": 4, "read": 30, "cross": 5, "view": 5, "drop": 24,
    "drop_all": 2, "clear": 8, "clear_all": 3, "put": 3, "trim": 2, "synchronize": 3, "gc": 4, "finish": 1,
}  # fmt: skip


def _observe(cache: TensorCache, device: SimDevice) -> None:
    """See bytes given back, and slots handed out for receiving: the host may write both from then on."""
    engine = cache._open_engine()
    pool, staging = engine.pool, engine.staging
    assert staging is not None
    settle, acquire = pool._settle, staging.acquire

    def watched_settle(done: Any) -> None:
        for freed in [freed for one in done if one in pool._quarantine for freed in one.ranges]:
            place = freed.slab.arena.tensor[freed.offset : freed.offset + freed.nbytes]
            device.host_write(place, "the give-back")
        settle(done)

    def watched_acquire(timeout_s: float) -> Any:
        slot = acquire(timeout_s)
        device.host_write(slot.pinned.tensor, "a refill")
        return slot

    pool._settle, staging.acquire = watched_settle, watched_acquire  # type: ignore[method-assign]
    engine.reaper._period_s = 3600.0  # it would drain whenever the machine is slow


@contextlib.contextmanager
def few_objects() -> Iterator[None]:
    """Collect only what programs leave behind, and only when they ask for it."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def run_program(seed: int, num_steps: int = NUM_STEPS, watch: Callable[[Program], None] = lambda program: None) -> None:
    """Run one program and let `watch` look at it before it is closed; raises as `Program.run` does."""
    program = Program(seed)
    try:
        program.run(num_steps)
        watch(program)
    finally:
        program.close()
