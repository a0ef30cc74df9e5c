"""Mutants of the host tier: copies between it and the device that nothing orders."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from gpu_cache.index.entry import Candidate
from gpu_cache.index.room import RoomMaker
from gpu_cache.pool.block import Range
from gpu_cache.pool.completion import Completion
from gpu_cache.pool.fence import StreamFence
from gpu_cache.transfer.fetch import Fetch
from gpu_cache.transfer.host_tier import HostTier
from gpu_cache.transfer.parked_reader import ParkedReader
from tests.support.sim_mutant import Mutants

TIER_MUTANTS = Mutants()
_mutant = TIER_MUTANTS.enter


@_mutant("a device range reused before its copy out ran", HostTier, "_copy_out")
def _unfenced_out(original: Any, self: HostTier, *args: Any) -> Any:
    if "unknown" not in self.__dict__:
        self.__dict__["unknown"] = self.stream = self._device.new_stream()
    return original(self, *args)


@_mutant("a copy out that does not wait for the copy in", HostTier, "_copy_out")
def _early_out(original: Any, self: HostTier, stretch: Sequence[Candidate], taken: Range) -> Any:
    return original(self, [one._replace(completion=None) for one in stretch], taken)


@_mutant("a copy back that does not wait for the copy out", ParkedReader, "__init__")
def _early_back(original: Any, self: ParkedReader, entries: Any) -> None:
    original(self, entries)
    done: Any = Completion(None, None)  # type: ignore[arg-type]
    self.origins = {key: dataclasses.replace(origin, completion=done) for key, origin in self.origins.items()}


@_mutant("a range of the tier reused before its copy back ran", HostTier, "__init__")
def _unfenced_back(original: Any, self: HostTier, device: Any, *args: Any) -> None:
    original(self, device, *args)
    self.pool._fence = StreamFence(device, "noted")
    self.pool._fence.note(self.stream)


@_mutant("handed out on the host before the copy out ran", Fetch, "host_completions")
def _early_on_host(original: Any, self: Fetch) -> Any:
    return ()


@_mutant("a written shard that goes to the host tier", RoomMaker, "_evict")
def _parked_as_written(original: Any, self: RoomMaker, victims: list[Candidate], *, held: bool = False) -> Any:
    for entry in (one.entry for one in victims):
        if (counted := entry.place.counted) is not None:
            entry.place.version = counted._version
    return original(self, victims, held=held)
