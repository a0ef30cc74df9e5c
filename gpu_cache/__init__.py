"""A GPU-resident tensor cache with pinned-memory staging.

Names load when they are first used, so that tools which only read reports never import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu_cache.cache import TensorCache
    from gpu_cache.config import CacheConfig
    from gpu_cache.errors import (
        CacheClosedError,
        CacheFullError,
        FetchError,
        FetchTimeoutError,
        GpuCacheError,
        MutatedError,
        PromiseError,
        TransferError,
    )
    from gpu_cache.index.entry import Promise
    from gpu_cache.index.scope import Scope
    from gpu_cache.pool.block import TrimReport
    from gpu_cache.report.counters import BufferStats, stats_delta
    from gpu_cache.report.schema import EntryInfo, SourceStats
    from gpu_cache.source import ShardReader, ShardSource, ShardSpec
    from gpu_cache.transfer.tensor_reader import TensorReader

__version__ = "0.1.0"

_HOME = {
    "TensorCache": "cache",
    "CacheConfig": "config",
    "CacheClosedError": "errors",
    "CacheFullError": "errors",
    "FetchError": "errors",
    "FetchTimeoutError": "errors",
    "GpuCacheError": "errors",
    "MutatedError": "errors",
    "PromiseError": "errors",
    "TransferError": "errors",
    "ShardReader": "source",
    "ShardSource": "source",
    "ShardSpec": "source",
    "TensorReader": "transfer.tensor_reader",
    "BufferStats": "report.counters",
    "stats_delta": "report.counters",
    "SourceStats": "report.schema",
    "EntryInfo": "report.schema",
    "Promise": "index.entry",
    "Scope": "index.scope",
    "TrimReport": "pool.block",
}

__all__ = [
    "adopt",
    "TensorCache",
    "CacheConfig",
    "ShardSource",
    "ShardReader",
    "ShardSpec",
    "TensorReader",
    "BufferStats",
    "stats_delta",
    "SourceStats",
    "EntryInfo",
    "Promise",
    "Scope",
    "TrimReport",
    "GpuCacheError",
    "CacheFullError",
    "CacheClosedError",
    "FetchError",
    "FetchTimeoutError",
    "TransferError",
    "MutatedError",
    "PromiseError",
]


def adopt() -> None:
    """Make the installed AReaL use our handles, cache and wire, in this process and its children: docs/areal.md.

    A program calls it before anything imports `areal`. `GPU_CACHE_AREAL=1` in the environment does the same.

    Raises:
        gpu_cache.rpc.adopt.AdoptError: It comes too late, or AReaL is not one that was checked; says which, and why.
    """
    importlib.import_module(f"{__name__}.rpc.adopt").adopt()


if not TYPE_CHECKING:  # else a checker would take any name for one of these

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
