"""What a cache tells of itself."""

from __future__ import annotations

from collections.abc import Hashable

from gpu_cache.engine import Engine, LazyEngine
from gpu_cache.entry import EntryInfo
from gpu_cache.index import ShardIndex
from gpu_cache.publish import Publisher
from gpu_cache.report import SourceStats
from gpu_cache.stats import BufferStats, buffer_stats_of
from gpu_cache.summary import summary_of


class ObservedCache:
    """The part of a `TensorCache` that only looks. Any thread; no device call."""

    _index: ShardIndex
    _lazy: LazyEngine
    _publisher: Publisher

    def __repr__(self) -> str:
        return f"TensorCache({self.device_name or 'no device yet'}, {self._index!r})"

    def __contains__(self, key: Hashable) -> bool:
        return key in self._index

    def __len__(self) -> int:
        return len(self._index)

    def keys(self) -> list[Hashable]:
        """Keys of what is cached, oldest first."""
        return self._index.keys()

    @property
    def _engine(self) -> Engine | None:
        return self._lazy.current

    @property
    def device_name(self) -> str:
        """Where it caches ("cuda:0", "cpu"); "" before the first use."""
        return "" if self._engine is None else str(self._engine.device.torch_device)

    def buffer_stats(self) -> BufferStats:
        """Counters and gauges; each part (index, pool, staging) is consistent in itself."""
        return buffer_stats_of(self._index.stats(), {} if self._engine is None else self._engine.stats())

    def source_stats(self) -> dict[str, SourceStats]:
        """What came from each source node and what of it is cached; "local" is this process, as for `put`."""
        return self._index.report()["sources"]  # type: ignore[no-any-return]

    def entries(self, oldest: int = 10) -> list[EntryInfo]:
        """The oldest of what is cached, oldest first."""
        return self._index.oldest(oldest)

    def summary(self) -> str:
        """The line that `gpu-cache-smi` shows of this process, in its box, for a log or a notebook."""
        return summary_of(self._publisher.report()) if self._engine is not None else repr(self)

    def reset_peak_stats(self) -> None:
        """Make the peaks what is in use now. Counters are never reset."""
        if (engine := self._engine) is not None:
            engine.reset_peaks()
