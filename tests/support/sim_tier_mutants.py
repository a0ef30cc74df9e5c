"""Mutants of the host tier: copies between it and the device that nothing orders."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from gpu_cache.config import ReadyMode
from gpu_cache.index.entry import Candidate
from gpu_cache.index.room import RoomMaker
from gpu_cache.pool.block import Copy
from gpu_cache.pool.fence import StreamFence
from gpu_cache.transfer.engine import Engine
from gpu_cache.transfer.host_tier import HostTier, ResidentReader
from tests.support.sim_mutant import Mutants

TIER_MUTANTS = Mutants()
_mutant = TIER_MUTANTS.enter


@_mutant("a device range reused before its copy out ran", HostTier, "__init__")
def _unfenced_out(original: Any, self: HostTier, device: Any, *args: Any) -> None:
    original(self, device, *args)
    self.transfer.stream = device.new_stream()  # which no fence knows


@_mutant("a copy out that does not wait for the copy in", HostTier, "take_in")
def _early_out(original: Any, self: HostTier, victims: Sequence[Candidate]) -> Any:
    return original(self, [one._replace(copy=dataclasses.replace(one.copy, completion=None)) for one in victims])


@_mutant("a copy back that does not wait for the copy out", ResidentReader, "resident")
def _early_back(original: Any, self: ResidentReader, *args: Any) -> list[Copy]:
    found = original(self, *args)
    is_out = self._deadline == math.inf
    return found if is_out else [dataclasses.replace(one, completion=None) for one in found]


@_mutant("a range of the tier reused before its copy back ran", HostTier, "__init__")
def _unfenced_back(original: Any, self: HostTier, device: Any, *args: Any) -> None:
    original(self, device, *args)
    self.pool._fence = StreamFence(device, "noted")
    self.pool._fence.note(self.transfer.stream)


@_mutant("handed out on the host before the copy out ran", Engine, "settle")
def _early_on_host(original: Any, self: Engine, completions: Any, ready: ReadyMode) -> None:
    original(self, {one: False for one, is_on_host in completions.items() if not is_on_host}, ready)


@_mutant("a written shard that goes to the host tier", RoomMaker, "_evict")
def _parked_as_written(original: Any, self: RoomMaker, victims: list[Candidate], *, held: bool = False) -> Any:
    for entry in (one.entry for one in victims):
        if (copy := entry.copy) is not None:
            copy.version = copy.counted._version
    return original(self, victims, held=held)
