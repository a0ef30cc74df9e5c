"""Shards in the host tier, told to a transfer as a reader tells of those of a node."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from gpu_cache.index.entry import Entry, Parked
from gpu_cache.source import ShardSpec


class ParkedReader:
    """Gives specs, and where the bytes are; they are copied from there, so that there is nothing to read.

    Args:
        entries: Those that are to be brought back.
    """

    node = ""

    def __init__(self, entries: Mapping[Hashable, Entry]) -> None:
        self.keys = list(entries)
        found = {key: entry.origin for key, entry in entries.items()}  # None: it is given up on already
        self.origins: dict[Hashable, Parked] = {key: origin for key, origin in found.items() if origin is not None}
        self.failures: Mapping[Hashable, Exception] = {}

    def next_specs(self) -> Sequence[ShardSpec] | None:
        """All of them, once and for all."""
        return [ShardSpec(key, one.base.dtype, tuple(one.base.shape)) for key, one in self.origins.items()]

    def read_into(self, buffers: Sequence[memoryview]) -> None:
        """Nobody asks for it."""
        raise NotImplementedError

    def cancel(self) -> None:
        """There is nothing that takes long."""

    def close(self) -> None:
        """Let go of what was copied."""
        self.origins = {}
