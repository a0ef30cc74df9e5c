"""What a phase of the run cost: counted by the trainer, by its cache and by the workers' servers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from demo.handles import RemoteBatch
from gpu_cache import stats_delta
from gpu_cache.rpc.rtensor import buffer_stats


@dataclass(frozen=True, slots=True)
class Phase:
    """The figures of some consecutive steps.

    Attributes:
        steps: Training steps.
        trajectories: Trajectories in their batches.
        shards: Tensors in their batches.
        read_bytes: What the reads asked for, each read counted in full.
        wire_bytes: What the trainer's cache fetched.
        served_bytes: What the workers' servers say they sent.
        hit_rate: Share of the cache's look-ups that found their shard; a prefetch looks up too, and misses.
        wait_s: Seconds that the reads waited for their tensors.
        evictions: Shards that the cache dropped to make room for others.
        overflows: Shards that it handed out without keeping them, for want of room.
    """

    steps: int
    trajectories: int
    shards: int
    read_bytes: int
    wire_bytes: int
    served_bytes: int
    hit_rate: float
    wait_s: float
    evictions: int
    overflows: int

    @property
    def saved_bytes(self) -> int:
        """What the reads would have fetched in addition, had there been no cache."""
        return self.read_bytes - self.wire_bytes

    @property
    def wait_s_per_step(self) -> float | None:
        """None where there was no step."""
        return self.wait_s / self.steps if self.steps else None


class Meter:
    """Counts one phase, from its creation on. One thread.

    Args:
        served_bytes: Asks the workers' servers what they have sent so far.
    """

    def __init__(self, served_bytes: Callable[[], int]) -> None:
        self._served_bytes = served_bytes
        self._served_before = served_bytes()
        self._stats_before = buffer_stats()
        self._steps = self._trajectories = self._shards = self._read_bytes = 0
        self._wait_s = 0.0

    def note(self, batch: RemoteBatch) -> None:
        """Count a step that has read `batch`."""
        self._steps += 1
        self._trajectories += len(batch.handles)
        self._shards += len(batch.shard_ids)
        self._read_bytes += batch.read_bytes
        self._wait_s += batch.wait_s

    def phase(self, *, ask_servers: bool) -> Phase:
        """The figures so far; `served_bytes` is 0 where the servers are not asked."""
        delta = stats_delta(self._stats_before, buffer_stats())
        return Phase(
            steps=self._steps,
            trajectories=self._trajectories,
            shards=self._shards,
            read_bytes=self._read_bytes,
            wire_bytes=int(delta["fetch_bytes"]),
            served_bytes=self._served_bytes() - self._served_before if ask_servers else 0,
            hit_rate=delta.get("hit_ratio", 0.0),
            wait_s=self._wait_s,
            evictions=int(delta["evictions"]),
            overflows=int(delta["overflows"]),
        )
