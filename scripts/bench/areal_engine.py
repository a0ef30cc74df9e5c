"""What AReaL's servers create and call in the comparison. Needs an installed AReaL."""

from __future__ import annotations

from typing import Any

from areal.api import TrainEngine

from areal.infra.rpc import rtensor
from bench.workloads import make_workload


class Engine(TrainEngine):
    """Makes the workloads, and takes them; AReaL asks it for no process group.

    Args:
        config: AReaL's.
    """

    initialized = False

    def make(self, name: str, fraction: float) -> list[dict[str, Any]]:
        """The workload's tensors."""
        return list(make_workload(name, fraction).trajectories())

    def touch(self, batch: list[dict[str, Any]]) -> int:
        """Take a batch, which AReaL has read for this call."""
        return len(batch)

    def clear_batches(self, shard_ids: list[str] | None = None) -> None:
        """Evict a step's shards, as AReaL's engines do."""
        if shard_ids:
            rtensor.clear_fetch_buffer(shard_ids)

    def held(self) -> dict[str, int]:
        """What this process owns and caches."""
        return {**rtensor.storage_stats(), **rtensor.fetch_buffer_stats()}


Engine.__abstractmethods__ = frozenset()
