"""TensorCache: shards by key, fetched once, handed out as zero-copy tensors until they are cleared."""

from __future__ import annotations

import time
import weakref
import zlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextvars import ContextVar
from typing import Literal, overload

import torch

from gpu_cache import process
from gpu_cache.config import CacheConfig, OnError, Prefer, ReadyMode, seconds, settings_of
from gpu_cache.device.modes import HANDOUT, eager, profiled
from gpu_cache.device.protocol import Device, Stream
from gpu_cache.errors import CacheClosedError, FetchError, PromiseError, TransferError, several
from gpu_cache.index.entry import Entry, Promise
from gpu_cache.index.index import ShardIndex, tensors_of
from gpu_cache.index.mutation import Mutations
from gpu_cache.index.scope import Scope, ScopeVariable
from gpu_cache.pool.block import TrimReport
from gpu_cache.pool.lease import AliasCounter, aliases_of
from gpu_cache.report.counters import BufferStats, buffer_stats_of
from gpu_cache.report.publish import Publisher
from gpu_cache.report.schema import EntryInfo, SourceStats
from gpu_cache.source import NO_SOURCE, ShardSource, check_call, check_promises
from gpu_cache.transfer.engine import Engine, LazyEngine
from gpu_cache.transfer.fetch import Fetch, ReaderTask, put_one
from gpu_cache.transfer.tensor_reader import host_bytes

_HOST = torch.device("cpu")  # where the host tier's tensors are
_CLOSE_WAIT_S = 5.0  # how long `close` waits for reads that were cut off


class TensorCache:
    """Tensors of one device by key.

    Nothing is allocated, and no device is chosen, before the first use. Equal keys must mean equal bytes.

    Args:
        config: Settings; None reads the GPU_CACHE_* variables.
        device: A device to use instead of the one that `config.device` names.
        broken: Makes the error for a key whose shard is not as expected, from the expectation and its own data.
    Thread-safety: any thread. No lock is held over I/O, copies or waits.
    Source: the life of a shard follows vLLM's KV-cache off-loading and PyTorch's CachingHostAllocator.
    """

    def __init__(
        self,
        config: CacheConfig | None = None,
        *,
        device: Device | None = None,
        broken: Callable[[Hashable, Promise, Promise], Exception] = PromiseError,
    ) -> None:
        if isinstance(device, str | torch.device):
            raise TypeError(f"a Device is expected, not {device!r}: CacheConfig(device={str(device)!r}) names one")
        self.config = settings_of(config)
        self._given_device, self._broken = device, broken
        self._start_empty()
        process.register(self)

    def __repr__(self) -> str:
        return f"TensorCache({self.device_name or 'no device yet'}, {self._index!r})"

    def __contains__(self, key: Hashable) -> bool:
        return key in self._index

    def __len__(self) -> int:
        return len(self._index)

    def keys(self) -> list[Hashable]:
        """Keys of the cached shards, oldest first."""
        return self._index.keys()

    @property
    def _engine(self) -> Engine | None:
        return self._lazy.current

    @property
    def device_name(self) -> str:
        """The name of its device ("cuda:0", "cpu"); "" before the first use."""
        return "" if self._engine is None else str(self._engine.device.torch_device)

    def buffer_stats(self) -> BufferStats:
        """Counters and gauges; each part (index, pool, staging) is consistent in itself."""
        return buffer_stats_of(self._index.stats(), {} if self._engine is None else self._engine.stats())

    def source_stats(self) -> dict[str, SourceStats]:
        """Figures by source node: fetched shards, and cached ones. "local" is this process, as for `put`."""
        return self._index.report()["sources"]  # type: ignore[no-any-return]

    @eager
    def entries(self, oldest: int = 10) -> list[EntryInfo]:
        """The oldest cached shards, oldest first."""
        return self._index.oldest(oldest)

    def summary(self) -> str:
        """The line that `gpu-cache-smi` shows of this process, in its box, for a log or a notebook."""
        return self._publisher.summary() or repr(self)

    def report_beside(self, figures: Callable[[], Mapping[str, int]]) -> None:
        """Add figures of what is no part of the cache to its reports for `gpu-cache-smi`, under names that it knows."""
        self._publisher.report_beside(figures)

    def report(self) -> None:
        """Report for `gpu-cache-smi` now, and from now on.

        Before the first use of the cache there is something to report only if `report_beside` has given figures, and
        they are not empty. It chooses no device, and allocates nothing.
        """
        self._publisher.publish()

    def reset_peak_stats(self) -> None:
        """Set the peaks to what is in use now. Counters are never reset."""
        if (engine := self._engine) is not None:
            engine.reset_peaks()

    @overload
    def get_many(
        self,
        keys: Sequence[Hashable],
        source: ShardSource,
        *,
        timeout_s: float | None = ...,
        ready: ReadyMode | None = ...,
        keep: bool = ...,
        prefer: Prefer = ...,
        on_error: Literal["raise"] = ...,
        expected: Mapping[Hashable, Promise] | None = ...,
    ) -> list[torch.Tensor]: ...

    @overload
    def get_many(
        self,
        keys: Sequence[Hashable],
        source: ShardSource,
        *,
        timeout_s: float | None = ...,
        ready: ReadyMode | None = ...,
        keep: bool = ...,
        prefer: Prefer = ...,
        on_error: Literal["none"],
        expected: Mapping[Hashable, Promise] | None = ...,
    ) -> list[torch.Tensor | None]: ...

    @eager
    def get_many(
        self,
        keys: Sequence[Hashable],
        source: ShardSource,
        *,
        timeout_s: float | None = None,
        ready: ReadyMode | None = None,
        keep: bool = False,
        prefer: Prefer = "device",
        on_error: OnError = "raise",
        expected: Mapping[Hashable, Promise] | None = None,
    ) -> Sequence[torch.Tensor | None]:
        """Hand out the tensors of `keys`, fetching those that are not cached.

        Each tensor aliases the cache's memory: zero copy, `storage_offset()` 0, a storage of exactly the shard's
        bytes. It stays valid for as long as any alias of it lives, cleared or not. Do not write into it: other
        holders read the written bytes. A later call sees the write by torch's version counter and does as
        `config.on_mutation` says. By default the cache drops the shard, and the call fetches it: the caller gets the
        original bytes in a fresh block. The counter misses writes through `.data`, numpy, DLPack, fused optimisers,
        collectives and kernels of one's own; `config.debug_checksum` sees them. It counts writes that change nothing,
        such as `add_(0)`: each costs a fetch.

        Args:
            keys: Shard ids; one that repeats is fetched once and gives aliases of one block.
            source: Asked for the missing ones only.
            timeout_s: Longest wait, in seconds; None: `config.fetch_timeout_s`; `math.inf`: no limit.
            ready: Overrides `config.ready` for this call.
            keep: They are meant to outlive clears of other shards, as weights are. No report calls them a leak then.
            prefer: "host": shards that are not on the device come to the host tier, and are handed out there, in pinned
                memory. They take no memory of the device. Clone tensors that forked processes are to read: a forked
                process does not get pinned memory.
            on_error: "none": a shard that does not arrive is None in the result. The log warns once a minute for each
                node and reason. It has the failures between at the level DEBUG, and counts them in the next warning.
            expected: A tuple of dtype, shape and owner by key, where known. A shard of another dtype or shape fails,
                and stays cached for other callers. One cached for another owner is a miss, and the fetched one takes
                its place. None for an owner: any.
        Returns:
            One tensor for each key, in order, on the cache's device unless `prefer` is "host". Shards that find no room
            come all the same, uncached.
        Raises:
            FetchError: Some did not arrive; `failures` has the cause by key. The others are cached, so that another
                call asks for the rest only.
            CacheClosedError: The cache is closed.
            TransferError: During CUDA graph capture: a shard is not cached, a reader wrote into it, or its copy was not
                yet seen complete.
            MutatedError: A reader wrote into a shard, and `config.on_mutation` is "error".
            ValueError: On a GPU: the host is preferred, and the host tier is off (`config.host_tier_bytes`).
            TypeError: A shard is missing, and `source` is no ShardSource, or its `open` returned something else than
                readers; or `keys` is a text; or `expected` is no mapping of tuples.
        Thread-safety: any thread. Two calls for one key make one fetch.
        """
        if not isinstance(keys, (list, tuple)):
            keys = several(keys)  # they are walked several times
        if ready not in (None, "host", "stream"):
            raise ValueError(f"ready={ready!r}: must be 'host' or 'stream'")
        if on_error not in ("raise", "none"):
            raise ValueError(f"on_error={on_error!r}: must be 'raise' or 'none'")
        if expected is not None and type(expected) is not dict:
            check_promises(expected)
        limit_s = self._limit_s(timeout_s)
        may_be_plain = prefer == "device" and not (keep or self.config.debug_checksum)
        if may_be_plain and (hits := self._hits(keys, expected or {}, ready or self.config.ready)) is not None:
            return hits
        check_call(source, prefer, expected)
        fetch = Fetch(
            self._lazy, self._tasks, limit_s, hands_out=True, keep=keep, holding=self._scope.get(), prefer=prefer,
            expected=expected,
        )  # fmt: skip
        may_lack = on_error == "none"
        checks_bytes = self.config.debug_checksum
        try:
            if checks_bytes:
                self._check_bytes(keys)
            engine = fetch.complete(keys, source, may_lack=may_lack)
            with profiled(HANDOUT):
                engine.settle(fetch.claim.completions, ready or self.config.ready)
                tensors = fetch.hand_out()
            if checks_bytes:
                self._check_bytes(keys, only_new=True)  # before any caller has new bytes
        finally:
            fetch.finish()
        if may_lack and not tensors.keys() >= set(keys):
            return [aliases_of([tensors[key]])[0] if key in tensors else None for key in keys]
        found = [tensors[key] for key in keys]
        return found if len(tensors) == len(keys) else aliases_of(found)  # a key repeats: no two results are one object

    @eager
    def get(self, key: Hashable) -> torch.Tensor | None:
        """Hand out the tensor of one key if it is cached; a miss is None. Only a host hit counts as a look-up.

        The cache drops a shard that a reader wrote into, with a warning; the look-up is a miss.

        Raises:
            CacheClosedError: The cache is closed.
            TransferError: During CUDA graph capture: its copy was not yet seen complete.
            MutatedError: As for `get_many`.
        """
        engine = self._lazy.open()
        if self.config.debug_checksum:
            self._check_bytes([key])
        found = self._index.find(key)
        if found is None:
            return self._bring_back(key) if key in self._index else None
        tensor, completion = found
        try:
            engine.settle({} if completion is None else {completion: False}, self.config.ready)
        except BaseException:
            del tensor, found  # an error that a caller keeps must not keep the block
            raise
        return tensor

    @eager
    def prefetch(
        self,
        keys: Sequence[Hashable],
        source: ShardSource,
        *,
        timeout_s: float | None = None,
        keep: bool = False,
        prefer: Prefer = "device",
        expected: Mapping[Hashable, Promise] | None = None,
    ) -> Future[int]:
        """Begin to fetch the missing ones of `keys`, and return at once. Arguments as for `get_many`.

        A shard on its way to the device for another call comes there, also if this call prefers the host.

        Returns:
            A future of how many were missing. It is done when their readers have ended, and fails as `get_many` would.
            It need not be waited for.
        """
        limit_s, keys = self._limit_s(timeout_s), several(keys)
        check_call(source, prefer, expected)
        fetch = Fetch(
            self._lazy, self._tasks, limit_s, hands_out=False, keep=keep, holding=self._scope.get(), prefer=prefer,
            expected=expected,
        )  # fmt: skip
        try:
            fetch.begin(keys, source)
            return fetch.promise()
        except BaseException:
            fetch.finish()
            raise

    @eager
    def put(self, key: Hashable, tensor: torch.Tensor, *, node: str = "", timeout_s: float | None = None) -> bool:
        """Copy a host tensor into the pool and index it under `key`.

        Args:
            key: Shard id. A key that is cached already keeps its shard, unless a reader wrote into that.
            tensor: In host memory, any dtype and shape.
            node: The source that it counts for, and that `clear_node` clears.
            timeout_s: Longest wait for a staging buffer, in seconds.
        Returns:
            Whether this call cached it (False: it was there, another thread is loading it, or a clear came between).
        Raises:
            CacheFullError: No room even after evicting every entry that no reader holds; nothing was changed.
            FetchTimeoutError: It was not its turn in time; see `CacheConfig.max_inflight_bytes`.
            MutatedError: A reader wrote into the cached shard, and `config.on_mutation` is "error".
            TypeError: Not a tensor.
            ValueError: Not a dense tensor in host memory.
        """
        engine = self._lazy.open()
        if self.config.debug_checksum:
            self._check_bytes([key])
        if engine.device.is_capturing():
            raise TransferError(f"cannot put {key!r} during CUDA graph capture")
        deadline = time.monotonic() + self._limit_s(timeout_s)
        with process.no_interrupts:
            entry = self._index.reserve(key, deadline)
            if entry is None:
                return False
            engine = self._lazy.kept()  # another thread may have replaced the engine before the entry was there
            if (holding := self._scope.get()) is not None:
                self._index.adopt(holding, [entry])
            return put_one(entry, tensor, node, engine, deadline, self._tasks)

    def clear(self, keys: Iterable[Hashable] | None = None) -> int:
        """Drop shards by key, or all (None). A shard on its way will not be cached. Unknown keys are ignored.

        Their bytes are reusable once the last alias is gone and the work enqueued before is done. Returns how many
        shards were cached.
        """
        with process.no_interrupts:
            return self._drop(self._index.remove_node(None) if keys is None else self._index.remove(keys))

    def clear_node(self, node: str, keys: Iterable[Hashable] | None = None) -> int:
        """Drop the shards that came from `node`, or those of them that `keys` names; returns how many were cached."""
        with process.no_interrupts:
            return self._drop(self._index.remove_node(node) if keys is None else self._index.remove(keys, node))

    def scope(self, name: str = "") -> Scope:
        """A `with` whose end drops the shards that were fetched inside, as `clear` does, also if its body raises.

        Fetched means by `get_many`, `prefetch` or `put`, and not with `keep=True`. A shard that was cached before,
        or is on its way for another call, is a hit and stays. Scopes nest: a shard belongs to the innermost one that
        its fetch began in. A prefetch under way at the end is not cached when it lands. Tensors stay valid while held.

        Calls of this context are inside, and so are asyncio tasks started within. Other threads are inside only in a
        copy of the context (`asyncio.to_thread`, `contextvars.copy_context().run`). Shards that such a task fetches
        after the end belong to the next open scope around, or to none.

        Args:
            name: For messages, as in "step 17".
        """
        return Scope(name, lambda: self._index, self._scope, self._drop)

    def record_stream(self, tensor: torch.Tensor, stream: Stream) -> None:
        """Say that `stream` reads `tensor`. Its bytes are reused only after the work enqueued there when it dies.

        `Tensor.record_stream` does nothing for tensors of this cache. With `reuse_fence="all"` only streams made
        outside of torch need it.

        Raises:
            ValueError: It is no stream of the cache's device.
        """
        if (engine := self._engine) is not None and tensor.device in (engine.device.torch_device, _HOST):
            engine.fence.note_named(stream)

    def synchronize(self) -> None:
        """Block until all bytes freed before this call are reusable.

        Raises:
            TransferError: During CUDA graph capture.
        """
        self._refuse_capture("synchronize")
        if (engine := self._engine) is not None:
            engine.synchronize()

    def trim(self, to_bytes: int = 0) -> TrimReport:
        """Give empty slabs back to the device's allocator until `to_bytes` are left, and keep no more until `resume`.

        Returns:
            The bytes given back, and those that stay because shards in them are cached or held. True if any were given
            back.
        Raises:
            TransferError: During CUDA graph capture.
        """
        self._refuse_capture("trim")
        return TrimReport() if (engine := self._engine) is None else engine.pool.trim(to_bytes)

    @eager
    def offload(self) -> TrimReport:
        """Give the device's memory back, as for an engine that shares it: every slab is freed.

        Cached shards move to the host tier; if that is off or full, the cache drops them. It also drops shards that a
        reader holds, as that reader may be writing into them. Tensors in use stay valid. Their slabs stay until the
        last alias of a shard in them is gone. Shards on their way still land, so let fetches end first. Waits for the
        work that was enqueued before.

        Returns:
            The bytes given back, and those that stay, as `trim`.
        Raises:
            TransferError: During CUDA graph capture.
        """
        self._refuse_capture("offload")
        if (engine := self._engine) is None:
            return TrimReport()
        report = engine.offload()
        engine.reaper.wake()
        self._publisher.soon()
        return report

    def resume(self) -> None:
        """End what `offload` or `trim` began: the next use preallocates, and slabs are kept from step to step.

        Without it the cache works too, and takes and releases its slabs at each step.
        """
        if (engine := self._engine) is not None:
            engine.pool.resume()

    def close(self) -> None:
        """Drop everything, end every fetch, and refuse further calls; what was handed out stays valid. Idempotent.

        Waits at most a few seconds for reads that were cut off, and for the threads that made them. It may be called on
        such a thread, as by a callback of a prefetch.
        """
        self.end(time.monotonic() + _CLOSE_WAIT_S)

    def end(self, deadline: float) -> None:
        """Close, and wait for reads that were cut off until `deadline`, by `time.monotonic()`."""
        if self._index.is_closed:
            return
        self._refuse_capture("close")
        process.unregister(self)
        dropped = self._index.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel(CacheClosedError())
        for task in tasks:
            task.wait(deadline)
        with process.no_interrupts:
            self._drop(dropped)
        self._lazy.close()
        self._publisher.close()

    def disown(self) -> object:
        """Refuse every further call, in a child that inherited this cache. The result must never be freed."""
        inherited = self._lazy, self._index, self._publisher
        self._publisher.disown()
        self._start_empty()  # threads that do not exist here may hold the locks of the old parts
        self._index.close()
        return inherited

    def _start_empty(self) -> None:
        mutations = Mutations(self.config.on_mutation)
        index = self._index = ShardIndex(AliasCounter().is_held, mutations=mutations, broken=self._broken)
        if self.config.host_tier_bytes:
            index.add_level()
        self._scope: ScopeVariable = ContextVar("scope of a TensorCache", default=None)
        # Nothing here refers to the cache itself, so that a cache that is dropped without `close` can die.
        self._lazy = LazyEngine(self.config, self._given_device, index)
        self._tasks: set[ReaderTask] = set()  # readers that are being drained
        self._publisher = Publisher(index, self._lazy, self.config)
        self._lazy.on_open = self._publisher.touch
        weakref.finalize(self, self._lazy.retire, index.close).atexit = False
        weakref.finalize(self, self._publisher.retire).atexit = False

    def _limit_s(self, timeout_s: float | None) -> float:
        return self.config.fetch_timeout_s if timeout_s is None else seconds(timeout_s, "timeout_s")

    def _hits(
        self, keys: Sequence[Hashable], expected: Mapping[Hashable, Promise], ready: ReadyMode
    ) -> list[torch.Tensor] | None:
        """The tensors, if all are plain hits; else None."""
        engine = self._lazy.open()
        found = self._index.hits(keys, expected)
        if found is None or self._lazy.kept() is not engine:
            return None
        try:
            with profiled(HANDOUT):
                engine.settle(found[1], ready)
        except BaseException:
            found[0].clear()  # an error that a caller keeps must not keep blocks
            raise
        return found[0]

    def _check_bytes(self, keys: Sequence[Hashable], *, only_new: bool = False) -> None:
        """Take the checksums of cached shards that have none yet, and doubt those whose checksum is another by now.

        Slow: it waits for their copies, and copies them to the host. It sees writes that this thread's stream has done
        by then. The next look-up finds the doubted ones changed. Does nothing during CUDA graph capture.
        """
        if (engine := self._engine) is None or engine.device.is_capturing():
            return
        found = [pair for pair in self._index.aliases(dict.fromkeys(keys)) if pair[0].checksum is None or not only_new]
        engine.settle({one.completion: None for one, _ in found if one.completion is not None}, "host")
        sums = [(one, zlib.crc32(host_bytes(alias.cpu()).numpy().data)) for one, alias in found]
        self._index.compare_checksums(sums)

    def _refuse_capture(self, action: str) -> None:
        if (engine := self._engine) is not None and engine.device.is_capturing():
            raise TransferError(f"cannot {action} the cache during CUDA graph capture")

    def _bring_back(self, key: Hashable) -> torch.Tensor | None:
        try:
            return self.get_many([key], NO_SOURCE)[0]
        except FetchError:
            if key in self._index:
                raise
            return None  # it was cleared meanwhile

    def _drop(self, dropped: list[Entry]) -> int:
        """Let entries die, outside every lock, and start their bytes' way back. Call inside `no_interrupts`."""
        count = len(dropped)
        tensors = tensors_of(dropped)
        dropped.clear()
        if (engine := self._engine) is not None:
            engine.husks.strip(tensors)
            if count:
                engine.pool.end_step()
            engine.drain()
            engine.reaper.wake()
        self._publisher.soon()
        return count
