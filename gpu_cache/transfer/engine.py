"""The parts of a cache that belong to one device. They are built together, once the device is known."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from gpu_cache import process
from gpu_cache.config import CacheConfig, ReadyMode, described
from gpu_cache.device.cuda import torch_cuda
from gpu_cache.device.placement import Placement, choose_device
from gpu_cache.device.protocol import Device
from gpu_cache.errors import CacheClosedError, TransferError
from gpu_cache.index.index import ShardIndex
from gpu_cache.index.room import RoomMaker
from gpu_cache.pool.block import TrimReport
from gpu_cache.pool.completion import Completion
from gpu_cache.pool.fence import StreamFence
from gpu_cache.pool.lease import Husks
from gpu_cache.pool.slab import SlabPool
from gpu_cache.reaper import Reaper
from gpu_cache.transfer.host_tier import HostTier
from gpu_cache.transfer.inflight import InflightBudget
from gpu_cache.transfer.lacks import Lacks
from gpu_cache.transfer.staging import StagingRing
from gpu_cache.transfer.transfer import Transfer

logger = logging.getLogger(__name__)


class Engine:
    """The parts for one device: its level of the cache, the host tier below it, fence and reaper.

    Allocates nothing before the first fetch.

    Args:
        device: Where shards are cached.
        config: Settings; a None is decided here.
        index: The cache's. If it has a level below, there is a host tier.
    """

    def __init__(self, device: Device, config: CacheConfig, index: ShardIndex) -> None:
        is_cuda = device.torch_device.type == "cuda"
        self.device, self.index = device, index
        self.config = config.resolved(is_cuda=is_cuda, device_bytes=device.memory_info()[1] if is_cuda else 0)
        self.fence = StreamFence(device, self.config.reuse_fence)
        self.husks = Husks()
        self.pool = SlabPool(device, self.config, self.fence, index.forget_dead, self.husks)
        inflight = InflightBudget(self.config.max_inflight_bytes)
        self.tier = (
            None
            if index.below is None
            else HostTier(device, self.config, self.fence, index.below, self.husks, inflight)
        )
        self.room = RoomMaker(index, self.pool, None if self.tier is None else self.tier.take_in)
        self.staging = StagingRing(device, self.config) if device.stages else None
        self.transfer = Transfer(device, self.pool, self.staging, self.config, self.room.make, inflight)
        self.fence.note(self.transfer.stream)
        self.pools = [self.pool] if self.tier is None else [self.pool, self.tier.pool]
        self.reaper = Reaper(self, self.husks)
        self.lacks = Lacks()
        self._parts = [part for part in (self.staging, self.tier) if part is not None]

    @property
    def host_level(self) -> Engine | HostTier:
        """Where calls that prefer the host place shards. A device that is the host needs no tier.

        Raises:
            ValueError: The tier is off.
        """
        if self.tier is None and self.device.stages:
            raise ValueError("prefer='host': the host tier is off; set host_tier_bytes (GPU_CACHE_HOST_TIER_BYTES)")
        return self.tier or self

    @property
    def is_busy(self) -> bool:
        """Whether bytes may become free without a call."""
        return any(pool.is_busy for pool in self.pools)

    def drain(self) -> None:
        """Free the bytes that can be freed now."""
        with process.no_interrupts:
            for pool in self.pools:
                pool.drain()

    def offload(self) -> TrimReport:
        """Evict everything, and give back every slab of the device that no reader holds."""
        self.room.empty()
        return self.pool.trim()

    def synchronize(self) -> None:
        """Wait until the bytes freed before this call are reusable."""
        for pool in self.pools:
            pool.synchronize()

    def settle(self, completions: Mapping[Completion, object], ready: ReadyMode) -> None:
        """Make handed-out tensors safe to read, on every stream ("host") or on the caller's ("stream").

        Args:
            completions: Of their copies. Those that map to true are of the host tier: no stream waits for these.
            ready: As `CacheConfig.ready`.
        Raises:
            TransferError: During CUDA graph capture, where nothing can be waited for.
        """
        if not self.reaper.awake.is_set():
            self.reaper.wake()
        stream = self.device.current_stream()
        self.fence.note(stream)
        unseen = [pair for pair in completions.items() if not pair[0].is_seen]
        if unseen and self.device.is_capturing():
            raise TransferError(f"{len(unseen)} copies were not seen complete before CUDA graph capture began")
        for completion, is_on_host in unseen:
            if is_on_host or ready == "host":
                completion.wait_host()
            else:
                completion.wait_on(stream)

    def close(self) -> None:
        """Give back unused memory now, and held memory when its last alias dies. Idempotent."""
        try:
            self.finish()
        finally:
            self.reaper.retire()  # which tries again where the device failed

    def finish(self) -> None:
        """Give back unused memory. Waits for copies under way."""
        self.transfer.finish()
        if self.tier is not None:
            self.tier.finish()

    def stats(self) -> dict[str, float]:
        """The device's part of `BufferStats`."""
        found = {**self.pool.stats(), **self.transfer.inflight.stats(), **self.transfer.copied.stats("h2d")}
        for part in self._parts:
            found |= part.stats()
        return found

    def details(self) -> dict[str, int]:
        """Further figures of a report, under the report's names."""
        return {name: number for part in self._parts for name, number in part.details().items()}

    def gather(self) -> None:
        """Count copies that are done by now; waits for none. Not for a thread that captures a CUDA graph."""
        for one in (self, self.tier):
            if one is not None:
                one.transfer.copied.gather()

    def reset_peaks(self) -> None:
        """Set the peaks to the bytes in use now."""
        for pool in self.pools:
            pool.reset_peak()
        if self.staging is not None:
            self.staging.reset_peak()


class LazyEngine:
    """Builds the engine at first use, and again if the device was not certain and nothing is cached yet.

    Args:
        config: Settings, as given.
        device: The device to use; None: as `config.device` and the process's state say.
        index: See `Engine`.
    Attributes:
        current: The engine, once there is one.
        index: As given.
        on_open: Called whenever a call of the cache opens the engine.
    Thread-safety: any thread.
    """

    def __init__(self, config: CacheConfig, device: Device | None, index: ShardIndex) -> None:
        self.current: Engine | None = None
        self._config, self.index = config, index
        self._given = None if device is None else Placement(device, "as given", is_final=True)
        # Guards `current` and _is_final.
        self._lock = threading.Lock()
        self._is_final = self._has_warned = False
        self.on_open: Callable[[], object] = lambda: None

    def open(self) -> Engine:
        """The engine, for a call that uses it now.

        Raises:
            CacheClosedError: The cache is closed.
            ValueError: The device named by the settings is not there.
            RuntimeError: It is not clear which one is meant.
        """
        if self.index.is_closed:
            raise CacheClosedError
        engine = self.current
        is_certain = self._is_final or not torch_cuda.is_initialized()
        if engine is None or not (is_certain or self._stays(engine)):
            engine = self._build(engine)
        if not engine.reaper.awake.is_set():
            engine.reaper.wake()
        self.on_open()
        return engine

    def _build(self, engine: Engine | None) -> Engine:
        """Build an engine. It takes the place of the present one if that has nothing cached or on its way."""
        placement = self._given or choose_device(self._config.device)
        built = Engine(placement.device, self._config, self.index)
        with self._lock:
            is_mine = self.current is engine and (engine is None or self.index.is_empty)
            if is_mine:
                self.current, self._is_final = built, placement.is_final
            chosen = self.current
        if is_mine:
            settings = described(self._config, built.config)
            logger.info("caching on %s (%s): %s", placement.device.torch_device, placement.reason, settings)
            process.warn_if_shared(placement.device.torch_device)
            if engine is not None:
                engine.close()
        assert chosen is not None
        return chosen

    def kept(self) -> Engine:
        """The engine that stays for as long as a shard is indexed that was claimed before this call."""
        with self._lock:
            assert self.current is not None
            return self.current

    def retire(self, drop_all: Callable[[], object]) -> None:
        """Let the reaper drop all entries and give everything back: the cache is gone. Only sets flags."""
        if self.current is not None:
            self.current.reaper.retire(drop_all)

    def close(self) -> None:
        """Close the engine, if there is one; it lives on while its blocks are held."""
        if self.current is not None:
            self.current.close()

    def _stays(self, engine: Engine) -> bool:
        """Whether the device chosen before CUDA was initialised stays. Warns once if it stays against the settings."""
        try:
            device = choose_device(self._config.device).device.torch_device
        except (ValueError, RuntimeError) as error:
            if self.index.is_empty:
                raise
            return self._warn_of_late_cuda(engine, str(error))
        if device == engine.device.torch_device:
            return True
        return not self.index.is_empty and self._warn_of_late_cuda(engine, f"{device} is there by now")

    def _warn_of_late_cuda(self, engine: Engine, why: str) -> bool:
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "shards stay on %s, where they were cached before CUDA was initialised (%s); initialise it first, or "
                "set device (GPU_CACHE_DEVICE)",
                engine.device.torch_device,
                why,
            )
        return True
