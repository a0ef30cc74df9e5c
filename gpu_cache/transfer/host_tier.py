"""The host tier: the level below the device, in pinned memory. A copy brings a shard back, instead of a fetch."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import math
import time
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import Future

from gpu_cache.config import CacheConfig
from gpu_cache.device.host_arenas import HostArenas
from gpu_cache.device.protocol import Device
from gpu_cache.errors import CacheFullError, FetchTimeoutError
from gpu_cache.index.entry import Candidate, Entry
from gpu_cache.index.index import ShardIndex
from gpu_cache.index.room import RoomMaker
from gpu_cache.pool.block import Copy
from gpu_cache.pool.completion import Completion
from gpu_cache.pool.fence import StreamFence
from gpu_cache.pool.lease import Husks, Lease
from gpu_cache.pool.slab import SlabPool
from gpu_cache.source import ShardSpec
from gpu_cache.throttle import Throttle
from gpu_cache.transfer.inflight import InflightBudget
from gpu_cache.transfer.transfer import Transfer

logger = logging.getLogger(__name__)


class ResidentReader:
    """A `ShardReader` of shards at another level. They are copied from there; nothing is read.

    Args:
        copies: Shards that are there.
        awaited: Shards that are there or on their way there, and stay until this call has them.
        deadline: By `time.monotonic()`; the wait for these ends then.
    """

    node = ""

    def __init__(
        self, copies: Mapping[Hashable, Copy], awaited: Mapping[Hashable, Entry], deadline: float = math.inf
    ) -> None:
        self.keys = [*copies, *awaited]
        self.failures: dict[Hashable, Exception] = {}
        self._next, self._awaited, self._deadline = dict(copies), dict(awaited), deadline
        self._part: dict[Hashable, Copy] = {}
        self._cancelled: Future[None] = Future()

    def next_specs(self) -> Sequence[ShardSpec] | None:
        """Describe the shards that are there; once these are copied, those that came meanwhile, after a wait."""
        while not self._next and self._awaited:
            self._collect()
        self._part, self._next = self._next, {}
        return [ShardSpec(key, one.base.dtype, tuple(one.base.shape)) for key, one in self._part.items()] or None

    def resident(self, specs: Sequence[ShardSpec]) -> list[Copy]:
        """The copies at the other level of shards of the part."""
        return [self._part[spec.key] for spec in specs]

    def read_into(self, buffers: Sequence[memoryview]) -> None:
        """Never asked for."""
        raise NotImplementedError

    def cancel(self) -> None:
        """End the wait."""
        if not self._cancelled.done():
            self._cancelled.set_result(None)

    def close(self) -> None:
        """Let go of the copies."""
        self._part, self._next, self._awaited = {}, {}, {}

    def _collect(self) -> None:
        """Take settled shards. If there are none, wait for all, and take those that come in time."""
        settled = [key for key, entry in self._awaited.items() if entry.is_settled]
        if not settled:
            self._wait()
        for key in settled or list(self._awaited):
            entry = self._awaited.pop(key)
            if entry.copy is not None:
                self._next[key] = entry.copy
            elif isinstance(entry.error, Exception):
                self.failures[key] = entry.error
            else:
                self.failures[key] = FetchTimeoutError(f"Failed to fetch shard {key!r}: not in the host tier in time")

    def _wait(self) -> None:
        left = {entry.flight.landed for entry in self._awaited.values()}
        while (left_s := self._deadline - time.monotonic()) > 0 and left and not self._cancelled.done():
            wanted = [*(one for one in left if one is not None), self._cancelled]
            done, _ = concurrent.futures.wait(wanted, min(left_s, 60.0), concurrent.futures.FIRST_COMPLETED)
            left -= done


class Refuges:
    """A `Sink` that takes the copies of victims, by key."""

    def __init__(self) -> None:
        self.copies: dict[Hashable, Copy] = {}

    def expect(self, specs: Sequence[ShardSpec]) -> None:
        """Accept all."""

    def land(self, landings: list[Copy], completion: Completion | None, *, is_overflow: bool) -> None:
        """Keep them for the index."""
        for one in landings:
            one.completion = completion
            self.copies[one.key] = one


class HostTier:
    """The level below the device: pinned host memory, received into, or filled by copies on a stream of its own.

    Args:
        device: Copies.
        config: Resolved settings.
        fence: The device pool's: ranges of either pool are reused only behind the copies between them.
        index: This level's.
        husks: Takes tensors of the tier that lost their bytes.
        inflight: Shared with the device's level.
    Thread-safety: any thread. Copies are enqueued, and waited for only where their bytes are wanted.
    """

    def __init__(
        self,
        device: Device,
        config: CacheConfig,
        fence: StreamFence,
        index: ShardIndex,
        husks: Husks,
        inflight: InflightBudget,
    ) -> None:
        # A pool of the tier's own capacity. It keeps the slabs that it took: pinning costs more than copying.
        sizes = dataclasses.replace(
            config,
            pool_bytes=config.host_tier_bytes,
            prealloc_bytes=0,
            slab_bytes=min(config.slab_bytes, config.host_tier_bytes),
        )
        self.index = index
        self.pool = SlabPool(HostArenas(device), sizes, fence, index.forget_dead, husks, "host tier")
        self.pool.keep(config.host_tier_bytes)
        self.room = RoomMaker(index, self.pool)
        self.transfer = Transfer(device, self.pool, None, config, self.room.make, inflight)
        fence.note(self.transfer.stream)
        self._run_bytes = config.run_bytes
        self._warnings = Throttle()

    def take_in(self, victims: Sequence[Candidate]) -> dict[Hashable, Copy]:
        """Begin to copy victims, the last ones first, as far as the tier has room; return the copies by key.

        The device's ranges may be given back at once: the fence, recorded when their tensors die, is behind the copies.
        """
        refuges = Refuges()
        reader = ResidentReader({one.key: one for one in _in_runs(victims, self._run_bytes)}, {})
        try:
            self.transfer.drain(reader, refuges, math.inf, may_overflow=False)
        except CacheFullError:
            pass  # the victims used longest ago go
        except RuntimeError as error:  # the device's: victims need not come here
            if self._warnings.opens():  # in text: a handler may keep the error, whose frames hold blocks
                logger.warning("evicted shards could not be copied to the host tier: %s", str(error))
        return refuges.copies

    def finish(self) -> None:
        """Give back unused memory. Waits for copies under way."""
        self.transfer.finish()

    def stats(self) -> dict[str, float]:
        """The tier's part of `BufferStats`."""
        return {
            "host_bytes": self.pool.stats()["device_bytes"],
            "host_capacity_bytes": self.pool.capacity,
            **self.transfer.copied.stats("d2h"),
        }

    def details(self) -> dict[str, int]:
        """Further figures of a report, under the report's names."""
        stats = self.pool.stats()
        return {
            "host_peak_bytes": stats["device_peak_bytes"],
            "host_largest_free_bytes": stats["device_largest_free_bytes"],
            "host_alloc_failures": stats["alloc_failures"],
        }


def _in_runs(victims: Sequence[Candidate], run_bytes: int) -> list[Copy]:
    """Order copies by runs of neighbours on the device, at most `run_bytes` each; the runs used last come first."""
    age = {id(one.copy): number for number, one in enumerate(victims)}
    leased = [(lease, one.copy) for one in victims if (lease := one.copy.lease) is not None]
    runs: list[list[Copy]] = []
    nbytes, before = 0, None
    for lease, one in sorted(leased, key=lambda pair: (id(pair[0].slab), pair[0].offset)):
        if before is None or not _is_followed_by(before, lease) or nbytes + lease.nbytes > run_bytes:
            runs.append([])
            nbytes = 0
        runs[-1].append(one)
        nbytes, before = nbytes + lease.nbytes, lease
    runs.sort(key=lambda run: max(age[id(one)] for one in run), reverse=True)
    return [one for run in runs for one in run]


def _is_followed_by(one: Lease, other: Lease) -> bool:
    return one.slab is other.slab and one.offset + one.nbytes == other.offset
