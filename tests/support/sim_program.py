"""Random programs on a real `TensorCache` over the simulated device."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import random
from collections.abc import Callable, Hashable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from gpu_cache import CacheConfig, CacheFullError, FetchError, TensorCache
from gpu_cache.config import ReadyMode
from tests.support.sim_device import SimDevice
from tests.support.sim_observer import check_accounts, observe
from tests.support.sim_shards import Flight, Held, broken, contents
from tests.support.sim_streams import SimStream
from tests.support.sources import DictSource, GatedReader, gated

NUM_STEPS = 60
_KIB = 1 << 10
CONFIG = CacheConfig(
    slab_bytes=32 * _KIB, pool_bytes=80 * _KIB, prealloc_bytes=32 * _KIB, staging_slots=2,
    staging_slot_bytes=16 * _KIB, run_bytes=8 * _KIB, fetch_timeout_s=20,
)  # fmt: skip
_NODE = "node-a:1"
_MAX_HELD = 14
_LATE_S = 0.005


class SimFaultError(AssertionError):
    """What the simulated device saw, and the steps that led there."""


class Program:
    """Takes random steps, each of them allowed; what comes of it is in the device's faults.

    Deterministic: one thread is awake at a time. A fetch has one reader, whose thread the caller waits for.

    Args:
        seed: Of the steps and of the adversary.
        config: Of the cache; at least two staging slots.
    """

    def __init__(self, seed: int, config: CacheConfig = CONFIG) -> None:
        self._random, self._config = random.Random(seed), config
        self.device = SimDevice(seed)
        self.cache = TensorCache(config, device=self.device)
        self._source = DictSource(contents(), _NODE)
        self._streams = [*self.device.pooled, self.device.new_stream()]  # the last is not torch's
        self._held: list[Held] = []
        self._flight: Flight | None = None
        self.trace: list[str] = []
        observe(self.cache, self.device)

    def run(self, num_steps: int = NUM_STEPS) -> None:
        """Take the steps, then let everything go and see that every byte came back.

        Raises:
            SimFaultError: The device saw a race or wrong bytes.
            AssertionError: Bytes are lost.
        """
        self._steps(num_steps)
        for name in ("land", "drop_all", "gc", "clear_all", "finish", "synchronize"):
            self._step(name)
        check_accounts(self.cache, is_fetching=False, is_over=True)
        self.device.finish()
        self._step("gc")

    def run_on_after_close(self, num_steps: int = NUM_STEPS) -> None:
        """Take the steps, close the cache, and go on reading what is held; raises as `run` does."""
        self._steps(num_steps)
        self._step("land")
        assert self.cache._engine is not None
        self.cache._engine.reaper._period_s = 0.001  # it looks after what is held until that is dropped
        self.cache.close()
        for name in ("read", "read", "drop", "view", "read", "drop", "gc", "read", "drop_all"):
            self._step(name)
        self.device.finish()
        self._step("gc")

    def close(self) -> None:
        """Leave nothing behind, however broken the cache is."""
        if self._flight is not None:
            self._flight.reader.gate.set()
        self._held.clear()
        if (engine := self.cache._engine) is not None:
            engine.reaper._period_s = 0.001
            engine.reaper._pool = SimpleNamespace(is_busy=False, drain=gc.collect, finish=gc.collect)  # of a mutant
        with contextlib.suppress(Exception):
            self.cache.close()

    def _steps(self, num_steps: int) -> None:
        actions, weights = zip(*_WEIGHTS.items(), strict=True)
        for name in self._random.choices(actions, weights, k=num_steps):
            self._step(name)

    def _step(self, name: str) -> None:
        self.trace.append(name)
        getattr(self, f"_do_{name}")()
        check_accounts(self.cache, is_fetching=self._flight is not None, is_over=False)
        if self.device.faults:
            raise SimFaultError("\n".join([f"step {len(self.trace)}", *self.device.faults[:5], *self.trace[-8:]]))

    def _say(self, what: object) -> None:
        self.trace[-1] += f" {what}"

    # Steps: each is named in _WEIGHTS.

    def _do_get(self) -> None:
        self._get(self._some_keys(), self._random.choice(("host", "stream")))

    def _do_share(self) -> None:
        """One shard on two streams, each of which reads at once."""
        key = self._random.choice(list(contents()))
        for _ in range(2):
            self._get([key], "stream")
            self._read(self._held[-1])

    def _get(self, keys: list[Hashable], ready: ReadyMode) -> None:
        stream = self._random.choice(self._streams)
        self._expect(keys)
        self._say(f"{keys} {ready} on {stream.name}")
        with self.device.stream(stream):
            tensors = self.cache.get_many(keys, self._source, ready=ready)
        for key, tensor in zip(keys, tensors, strict=True):
            self._hold(key, tensor, None if ready == "host" else [stream])

    def _expect(self, keys: list[Hashable]) -> None:
        """These are about to be asked for: whoever is fetching one has to go on."""
        if self._flight is not None and self._flight.keys.intersection(keys):
            self._do_land()
        if self._flight is not None:
            self._flight.cleared.difference_update(keys)

    def _do_get_one(self) -> None:
        key = self._random.choice(list(contents()))
        if (found := self.cache.get(key)) is not None:
            self._hold(key, found, None)

    def _do_get_broken(self) -> None:
        """A fetch whose connection breaks after some reads."""
        self._do_land()
        num_reads = self._random.randrange(3)
        self._source.wrap = lambda reader: broken(reader, num_reads)
        with contextlib.suppress(FetchError):
            self.cache.get_many([*self._some_keys(), *self._some_keys()], self._source)
        self._source.wrap = lambda reader: reader

    def _do_prefetch(self) -> None:
        """Begin to fetch, and stop before the first read returns."""
        keys = self._some_keys()
        with self._gated(keys) as readers:
            future = self.cache.prefetch(keys, self._source)
        if readers:
            self._flight = Flight(future, readers[0], set(keys))
            self._flight.wait_for_gate()

    def _do_get_late(self) -> None:
        """A fetch that is given up while its reader receives."""
        keys = self._some_keys()
        with self._gated(keys) as readers, contextlib.suppress(FetchError):
            self.cache.get_many(keys, self._source, timeout_s=_LATE_S)
        if readers:
            futures = [task.done for task in list(self.cache._tasks)]
            late = {key for key in readers[0].keys if contents()[key].numel()}
            if futures:  # else there were empty shards only
                self._flight = Flight(futures[0], readers[0], set(), late)
                self._flight.wait_for_gate()

    @contextlib.contextmanager
    def _gated(self, keys: list[Hashable]) -> Iterator[list[GatedReader]]:
        """Gate the reader that is opened meanwhile, if one is."""
        self._do_land()
        self._say(keys)
        readers = gated(self._source)
        yield readers
        self._source.wrap = lambda reader: reader

    def _do_land(self) -> None:
        flight, self._flight = self._flight, None
        if flight is not None:
            flight.reader.gate.set()
            with contextlib.suppress(FetchError):  # a prefetch that finds no room
                flight.future.result(20)
            assert not [key for key in flight.cleared if key in self.cache], "cleared on its way, and cached"

    def _do_read(self) -> None:
        if self._held:
            self._read(self._random.choice(self._held))

    def _read(self, held: Held) -> None:
        stream = self._random.choice(held.streams or self._streams)
        if self._config.reuse_fence == "noted" or stream not in self.device.pooled:
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
            if self._random.random() < 0.2:  # only a collection finds it
                cycle: list[Any] = [held.tensor]
                cycle.append(cycle)

    def _do_drop_all(self) -> None:
        self._held.clear()

    def _do_clear(self) -> None:
        keys = self._random.sample(list(contents()), 10)
        self._say(keys)
        self.cache.clear(keys)
        if self._flight is not None:
            self._flight.clear(keys)

    def _do_clear_all(self) -> None:
        if self._random.random() < 0.5:
            self.cache.clear()
            if self._flight is not None:
                self._flight.clear(contents())
        else:
            self.cache.clear_node(_NODE)  # whose node is not known before it lands stays
            self.cache.clear_node("here")

    def _do_put(self) -> None:
        key = self._random.choice(list(contents()))
        if self._flight is not None:
            self._flight.cleared.discard(key)
        with contextlib.suppress(CacheFullError):
            self.cache.put(key, contents()[key], node="here")

    def _do_trim(self) -> None:
        self.cache.trim(self._random.choice((0, 32 * _KIB)))

    def _do_synchronize(self) -> None:
        self.cache.synchronize()

    def _do_gc(self) -> None:
        gc.collect()

    def _do_finish(self) -> None:
        if self._random.random() < 0.5:
            self.device.finish()

    def _hold(self, key: Hashable, tensor: torch.Tensor, streams: list[SimStream] | None) -> None:
        while len(self._held) >= _MAX_HELD:
            self._held.pop(self._random.randrange(len(self._held)))
        self._held.append(Held(tensor, contents()[key].numpy(), streams, str(key)))

    def _some_keys(self) -> list[Hashable]:
        return self._random.sample(list(contents()), self._random.randint(1, 5))


_WEIGHTS = {
    "get": 20, "share": 4, "get_one": 4, "get_broken": 3, "get_late": 2, "put": 3, "prefetch": 6, "land": 4,
    "read": 30, "cross": 5, "view": 5, "drop": 24, "drop_all": 2, "clear": 8, "clear_all": 3,
    "trim": 2, "synchronize": 3, "gc": 4, "finish": 1,
}  # fmt: skip


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


def run_program(
    seed: int, config: CacheConfig = CONFIG, watch: Callable[[Program], None] = lambda program: None
) -> None:
    """Run one program and let `watch` look at it before it is closed; raises as `Program.run` does."""
    program = Program(seed, config)
    try:
        program.run()
        watch(program)
    finally:
        program.close()
