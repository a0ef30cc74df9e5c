"""A real `TensorCache` on the simulated device, and what its consumers hold: where the steps of a program happen."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from types import SimpleNamespace

import numpy as np
import torch

from gpu_cache import CacheConfig, FetchError, ShardReader, TensorCache
from gpu_cache.config import Prefer, ReadyMode
from gpu_cache.index.entry import Entry
from gpu_cache.transfer.host_tier import ResidentReader
from tests.support.sim_accounts import Ledger, nbytes_of
from tests.support.sim_device import SimDevice
from tests.support.sim_observer import observe
from tests.support.sim_script import Choices, Step
from tests.support.sim_shards import Flight, Held, contents
from tests.support.sim_streams import SimStream
from tests.support.sources import DictSource, GatedReader

_KIB = 1 << 10
CONFIG = CacheConfig(
    slab_bytes=32 * _KIB, pool_bytes=80 * _KIB, prealloc_bytes=32 * _KIB, staging_slots=2,
    staging_slot_bytes=16 * _KIB, run_bytes=8 * _KIB, fetch_timeout_s=5,
)  # fmt: skip
SMALL_SLOTS = dataclasses.replace(CONFIG, run_bytes=4 * _KIB, staging_slot_bytes=4 * _KIB)  # a run each
TIERED = dataclasses.replace(CONFIG, pool_bytes=48 * _KIB, host_tier_bytes=64 * _KIB)
NODE = "node-a:1"
_MAX_HELD = 14
_MOMENTS = 64  # garbage is collected at one of so many moments of a step, in one step of four


class World:
    """Deterministic: one thread is awake at a time. A fetch has one reader, whose thread the caller waits for.

    Args:
        config: The cache's settings; at least two staging slots.
    """

    def __init__(self, config: CacheConfig = CONFIG) -> None:
        self.config = config
        self.device = SimDevice()
        self.cache = TensorCache(config, device=self.device)
        self.source = DictSource(contents(), NODE)
        self.streams = [*self.device.pooled, self.device.new_stream()]  # the last is not torch's
        self.held: list[Held] = []
        self.flight: Flight | None = None
        self.written: dict[Hashable, weakref.ref[torch.Tensor]] = {}  # bases of entries that a reader wrote into
        self.ledger = Ledger()
        self.choices, self.words = Choices(), ""
        self._capture_left = 0
        observe(self.cache, self.device)

    def begin(self, step: Step) -> None:
        """Begin a step: its numbers make the choices from here on, the adversary's first."""
        self.choices, self.words = Choices(step.numbers), step.name
        seed, moment = self.choices.below(256), self.choices.below(256)
        self.device.adversary.begin(seed, moment if moment < _MOMENTS else 0)
        self._capture_left -= 1
        if self._capture_left <= 0:
            self.device.captured = None

    def close(self) -> None:
        """Leave nothing behind, however broken the cache is."""
        self.end_trouble()
        if self.flight is not None:
            self.flight.reader.gate.set()
        self.held.clear()
        if (engine := self.cache._engine) is not None:
            engine.reaper._period_s = 0.001
            # Its threads must not give back a pool that a mutant broke.
            engine.reaper._pool = SimpleNamespace(is_busy=False, drain=gc.collect, finish=gc.collect)
            engine.finish = gc.collect
        with contextlib.suppress(Exception):
            self.cache.close()
        if engine is not None:
            engine.reaper.retire()

    def say(self, what: object) -> None:
        """Add to what the step is told as."""
        self.words += f" {what}"

    @property
    def open_streams(self) -> list[SimStream]:
        """Those that work may be enqueued on."""
        return [one for one in self.streams if one is not self.device.captured]

    def some_keys(self) -> list[Hashable]:
        return self.choices.sample(list(contents()), 1 + self.choices.below(5))

    def any_held(self) -> Held | None:
        return self.choices.choice(self.held) if self.held else None

    def capture(self, stream: SimStream, num_steps: int) -> None:
        """Capture a graph on a stream, during so many steps."""
        self.device.captured, self._capture_left = stream, num_steps
        self.say(f"on {stream.name} for {num_steps} steps")

    def end_trouble(self) -> None:
        """End what stands in the way of giving every byte back."""
        self.device.captured = None
        for what in ("arena", "slot", "copy"):
            self.device.refuse(what, 0)

    def some_place(self) -> Prefer:
        """Where what is missing is to go."""
        if not self.config.host_tier_bytes or self.choices.happens(70):
            return "device"
        self.say("preferably on the host")
        return "host"

    def get(self, keys: list[Hashable], ready: ReadyMode, stream: SimStream, prefer: Prefer = "device") -> bool:
        """Fetch and hold; whether all came. Only what the device refused is an excuse."""
        self.make_way(keys)
        self.say(f"{names(keys)} ready on {'the host' if ready == 'host' else stream.name}")
        num_refused = self.device.num_refused
        try:
            self.ledger.ask(keys)
            with self.ledger.receiving(keys), self.device.stream(stream):
                tensors = self.cache.get_many(keys, self.source, ready=ready, prefer=prefer)
        except FetchError:
            if self.device.num_refused == num_refused:
                raise
            self.say("refused")
            return False
        for key, tensor in zip(keys, tensors, strict=True):
            is_ready = ready == "host" or self.is_on_host(tensor)
            self.hold(key, tensor, None if is_ready else [stream])
        return True

    def make_way(self, keys: list[Hashable]) -> None:
        """These are about to be asked for: every actor that fetches one has to go on."""
        if self.flight is not None and self.flight.keys.intersection(keys):
            self.land()
        if self.flight is not None:
            self.flight.cleared.difference_update(keys)

    def hold(self, key: Hashable, tensor: torch.Tensor, streams: list[SimStream] | None) -> None:
        """Keep what was handed out: the original bytes, whatever readers wrote before."""
        while len(self.held) >= _MAX_HELD:
            self.held.pop(0)
        base = written() if (written := self.written.get(key)) is not None else None
        assert base is None or base.data_ptr() != tensor.data_ptr(), f"{key} was written to, and is handed out"
        self.held.append(Held(tensor, contents()[key].numpy(), streams, str(key)))

    def changed(self, keys: Iterable[Hashable]) -> set[Hashable]:
        """Those that the next call drops."""
        return {key for key in keys if (entry := self.entry_of(key)) and entry.is_changed}

    def entry_of(self, key: Hashable) -> Entry | None:
        """The cached copies of a key, on the device or in the host tier."""
        return next((entry for entry in self.cache._index._levels.at(key) if entry.copy is not None), None)

    def is_parked(self, key: Hashable) -> bool:
        """Whether it is in the host tier."""
        return (below := self.cache._index.below) is not None and below.has(key)

    def write(self, held: Held) -> None:
        """Break the rules, when no other actor is at work: write on one stream, and let others read only there."""
        self.device.synchronize_all()
        block = held.tensor.untyped_storage().data_ptr()
        values = (held.expected + self.choices.choice((1, 0, 77))) % 200
        stream = self._overwrite(held, values)
        begin = held.tensor.data_ptr() - block
        for other in self.held:
            if other.tensor.untyped_storage().data_ptr() == block and len(other.expected):
                at = other.tensor.data_ptr() - block
                other.expected = _overwritten(other.expected, begin - at, values)
                other.streams = None if stream is None else [stream]
        entry = self.entry_of(held.what)
        if entry is not None and entry.copy is not None and (base := entry.copy.base).data_ptr() == block:
            self.written[held.what] = weakref.ref(base)

    def _overwrite(self, held: Held, values: np.ndarray) -> SimStream | None:
        """Enqueue a kernel that does, and tell of its stream; the host does it at once, where it can: None."""
        if self.is_on_host(held.tensor):
            self.say(f"{held.what} on the host")
            if self.device.knows(held.tensor):
                self.device.host_store(held.tensor, values)
            else:
                held.tensor.copy_(torch.from_numpy(values))
            return None
        stream = self.choices.choice(self.open_streams)
        self.say(f"{held.what} on {stream.name}")
        if self.config.reuse_fence == "noted" or stream not in self.device.pooled:
            self.tell(held, stream)
        self.device.write(stream, held.tensor, values)
        return stream

    def is_on_host(self, tensor: torch.Tensor) -> bool:
        """Whether the host can read it: in the host tier, or outside of it for want of room."""
        return self.device.is_pinned(tensor) or not self.device.knows(tensor)

    def read(self, held: Held) -> None:
        """Enqueue a kernel; the cache is told of the stream, where that is the consumer's part, before or after."""
        streams = [one for one in held.streams or self.streams if one is not self.device.captured]
        if self.is_on_host(held.tensor) and (self.choices.happens(60) or not self.device.knows(held.tensor)):
            self.read_on_host(held)
            return
        if not streams:
            return
        stream = self.choices.choice(streams)
        must_tell = self.config.reuse_fence == "noted" or stream not in self.device.pooled
        tell = [lambda: self.tell(held, stream)] if must_tell and stream not in held.recorded else []
        self.say(f"{held.what} on {stream.name}")
        if tell and self.choices.happens(50):
            tell.pop()()
        self.device.kernel(stream, held.tensor, held.expected, f"a kernel on {held.what}")
        if tell:
            tell.pop()()

    def read_on_host(self, held: Held) -> None:
        """Read bytes that are in host memory, without a stream."""
        self.say(f"{held.what} on the host")
        if self.device.knows(held.tensor):
            self.device.host_read(held.tensor, held.expected, held.what)
        else:  # an empty one, or outside of the tier
            assert np.array_equal(held.tensor.numpy(), held.expected), f"wrong bytes: of {held.what}, on the host"

    def tell(self, held: Held, stream: SimStream) -> None:
        """`record_stream`."""
        self.cache.record_stream(held.tensor, stream)
        held.recorded.add(stream)

    @contextlib.contextmanager
    def wrapped(self, wrap: Callable[[ShardReader], GatedReader]) -> Iterator[list[GatedReader]]:
        """Let readers opened meanwhile be wrapped; the list fills as they are opened."""
        readers: list[GatedReader] = []

        def keep(reader: ShardReader) -> ShardReader:
            readers.append(wrap(reader))
            return readers[-1]

        self.source.wrap = keep
        try:
            yield readers
        finally:
            self.source.wrap = lambda reader: reader

    def await_moves(self) -> None:
        """Let shards come back from the host tier: they have no gate."""
        for task in list(self.cache._tasks):
            if isinstance(task.reader, ResidentReader):
                task.done.result(20)

    def fly(self, flight: Flight) -> None:
        """A fetch stands still from here on, until `land`."""
        self.ledger.awaited_bytes = nbytes_of(flight.asked)
        self.flight = flight
        flight.wait_for_gate()
        self.await_moves()

    def land(self) -> None:
        """Let the fetch that stands still go on to its end."""
        flight, self.flight = self.flight, None
        if flight is None:
            return
        flight.reader.gate.set()
        self.ledger.awaited_bytes = 0
        with contextlib.suppress(FetchError), self.ledger.receiving(flight.asked):  # a prefetch may find no room
            flight.future.result(20)
        assert not [key for key in flight.cleared if key in self.cache], "cleared on its way, and cached"


def _overwritten(expected: np.ndarray, begin: int, values: np.ndarray) -> np.ndarray:
    """Bytes, after others were written from `begin` on, where they overlap."""
    changed = expected.copy()
    first, end = max(begin, 0), min(begin + len(values), len(expected))
    if first < end:
        changed[first:end] = values[first - begin : end - begin]
    return changed


def names(keys: Sequence[Hashable]) -> str:
    """Keys, as a trace tells them."""
    return f"[{' '.join(map(str, keys))}]"
