"""The host tier: where evicted shards wait in pinned memory, to come back by a copy instead of a fetch."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Hashable, Iterator, Sequence
from typing import cast

from gpu_cache.config import CacheConfig
from gpu_cache.device.host_arenas import HostArenas
from gpu_cache.device.modes import plain_tensors
from gpu_cache.device.protocol import Device, Event, Stream
from gpu_cache.index.entry import Candidate, Parked
from gpu_cache.index.index import ShardIndex
from gpu_cache.index.room import RoomMaker
from gpu_cache.pool.block import Range
from gpu_cache.pool.completion import Completion
from gpu_cache.pool.fence import StreamFence
from gpu_cache.pool.lease import Husks
from gpu_cache.pool.slab import SlabPool
from gpu_cache.source import ShardSpec
from gpu_cache.throttle import Throttle

logger = logging.getLogger(__name__)

OUT, BACK = "d2h", "h2d"  # directions of copies


class HostTier:
    """A pool of pinned host memory, filled by copies on a stream of its own.

    Args:
        device: Copies.
        config: Resolved settings.
        fence: Of the device's pool: ranges of either are reused only behind the copies between them.
        index: Of the entries.
        husks: Takes what is left of the tier's tensors.
    Thread-safety: any thread. Copies are enqueued, and waited for only where their bytes are wanted.
    """

    def __init__(
        self, device: Device, config: CacheConfig, fence: StreamFence, index: ShardIndex, husks: Husks
    ) -> None:
        self._device, self._run_bytes = device, config.run_bytes
        # Of one capacity with the settings' slabs. What it took it keeps: pinning costs more than copying.
        sizes = dataclasses.replace(
            config,
            pool_bytes=config.host_tier_bytes,
            prealloc_bytes=0,
            slab_bytes=min(config.slab_bytes, config.host_tier_bytes),
        )
        self.arenas = cast(Device, HostArenas(device))
        self.pool = SlabPool(self.arenas, sizes, fence, index.forget_dead, husks)
        self.pool.keep(config.host_tier_bytes)
        self.room = RoomMaker(index, self.pool, parked=True)
        self._warnings = Throttle()
        self.stream: Stream = device.new_stream()
        fence.note(self.stream)
        # Guards every field below.
        self._lock = threading.Lock()
        self._timed: dict[tuple[Event, Event], str] = {}  # around copies not known to be done, each with its direction
        self._num_copies_in = 0
        self._copied_bytes, self._busy_s = {OUT: 0, BACK: 0}, {OUT: 0.0, BACK: 0.0}

    def take_in(self, victims: Sequence[Candidate]) -> dict[Hashable, Parked]:
        """Begin to copy what is to be evicted, the last ones first; what the tier has no room for is left out.

        The device's ranges may be given back at once: the fence, recorded when their tensors die, is behind the copies.
        """
        self.gather()
        parked: dict[Hashable, Parked] = {}
        with plain_tensors():
            for stretch in reversed(list(_stretches(victims, self._run_bytes))):
                nbytes = sum(one.lease.nbytes for one in stretch)
                if (taken := self._take(nbytes)) is None:
                    continue
                try:
                    parked |= self._copy_out(stretch, taken)
                except RuntimeError as error:  # of the device: what is evicted need not come here
                    self._warn(f"{nbytes:,} bytes could not be copied to the host tier: {error}")
                finally:
                    self.pool.abandon(taken)
        return parked

    def note_copies(self, direction: str, nbytes: int, started: Event, ended: Event, num_copies: int = 1) -> None:
        """Copies were enqueued between two events."""
        with self._lock:
            self._num_copies_in += num_copies * (direction == BACK)
            self._copied_bytes[direction] += nbytes
            self._timed[started, ended] = direction

    def gather(self) -> None:
        """Count the seconds of copies that are done by now. Waits for none; not during CUDA graph capture."""
        with self._lock:
            timed = list(self._timed)
        for pair in timed:
            if self._device.query(pair[1]):
                busy_s = self._device.elapsed_s(*pair)
                with self._lock:
                    if (direction := self._timed.pop(pair, None)) is not None:  # else another thread has counted it
                        self._busy_s[direction] += busy_s

    def stats(self) -> dict[str, float]:
        """The tier's part of `BufferStats`; what the staging ring counts too is to be added to its figures."""
        stats = self.pool.stats()
        with self._lock:
            return {
                "host_bytes": stats["device_bytes"],
                "host_capacity_bytes": self.pool.capacity,
                "d2h_bytes": self._copied_bytes[OUT],
                "d2h_busy_seconds": self._busy_s[OUT],
                "copies": self._num_copies_in,
                "h2d_bytes": self._copied_bytes[BACK],
                "h2d_busy_seconds": self._busy_s[BACK],
            }

    def details(self) -> dict[str, int]:
        """What a report has beyond that, under the report's names."""
        stats = self.pool.stats()
        return {
            "host_peak_bytes": stats["device_peak_bytes"],
            "host_largest_free_bytes": stats["device_largest_free_bytes"],
            "host_alloc_failures": stats["alloc_failures"],
        }

    def _warn(self, message: str) -> None:
        if self._warnings.opens():
            logger.warning(message)

    def _take(self, nbytes: int) -> Range | None:
        """Room in the tier, if need be by dropping what was longest there.

        Waits, if for anything, for what was enqueued before: no longer than whoever evicts from the device is about to.
        """
        taken = self.pool.take(nbytes) or self.pool.take_freed(nbytes)
        if taken is None and self.room.make(nbytes) >= nbytes:
            taken = self.pool.take_freed(nbytes)
        return taken

    def _copy_out(self, stretch: Sequence[Candidate], taken: Range) -> dict[Hashable, Parked]:
        """Enqueue the copy of neighbours on the device to a range of the tier."""
        first = stretch[0].lease
        specs = [ShardSpec(one.entry.key, one.base.dtype, tuple(one.base.shape)) for one in stretch]
        landings = self.pool.carve(taken, specs, [one.lease.offset - first.offset for one in stretch])
        for completion in {one.completion: None for one in stretch if one.completion is not None}:
            completion.wait_on(self.stream)
        started = self._device.record(self.stream, timing=True)
        self._device.copy_async(
            taken.slab.arena.tensor[taken.offset :][: taken.nbytes],
            first.slab.arena.tensor[first.offset :][: taken.nbytes],
            self.stream,
        )
        ended = self._device.record(self.stream, timing=True)
        self.note_copies(OUT, taken.nbytes, started, ended)
        completion = Completion(self._device, ended)
        return {
            landing.key: Parked(landing.base, landing.lease, completion, landing.version, landing.loan)
            for landing, one in zip(landings, stretch, strict=True)
            if one.lease() is not None  # else others may have got its bytes before they were copied
        }


def _stretches(victims: Sequence[Candidate], run_bytes: int) -> Iterator[list[Candidate]]:
    """Neighbours on the device, at most `run_bytes` of them together, those used last at the end."""
    age = {one.entry.key: number for number, one in enumerate(victims)}
    ordered = sorted(victims, key=lambda one: (id(one.lease.slab), one.lease.offset))
    stretches: list[list[Candidate]] = []
    nbytes, follower = 0, None
    for one in ordered:
        if follower != (id(one.lease.slab), one.lease.offset) or nbytes + one.lease.nbytes > run_bytes:
            stretches.append([])
            nbytes = 0
        stretches[-1].append(one)
        nbytes += one.lease.nbytes
        follower = id(one.lease.slab), one.lease.offset + one.lease.nbytes
    yield from sorted(stretches, key=lambda stretch: max(age[one.entry.key] for one in stretch))
