"""Consumers in threads with streams of their own, who read late while others clear; they count wrong bytes."""

from __future__ import annotations

import random
import time
from collections.abc import Hashable

import torch

from gpu_cache import TensorCache
from tests.support.gpu_scene import GPU, load_kernels
from tests.support.sources import DictSource
from tests.support.threads import run_threads

KIB = 1 << 10
_SEED = 20


class Consumers:
    """Readers of the same shards.

    Args:
        cache: Its pool is smaller than all shards together, so that bytes are reused all the time.
        num_shards: The number of shards, of 64 to 512 KiB, each with bytes of its own.
        seconds: How long they read.
    """

    def __init__(self, cache: TensorCache, num_shards: int, seconds: float) -> None:
        self._counts: list[tuple[int, int]] = []  # reads and wrong elements, of each thread
        self._cache, self._seconds = cache, seconds
        generator = torch.Generator().manual_seed(_SEED)
        sizes = torch.randint(64, 513, (num_shards,), generator=generator)
        shards = [
            torch.randint(0, 1 << 30, (int(size) * KIB // 4,), generator=generator, dtype=torch.int32) for size in sizes
        ]
        self._shards: dict[Hashable, torch.Tensor] = dict(enumerate(shards))
        self._expected = [shard.to(GPU) for shard in shards]

    @property
    def num_reads(self) -> int:
        """Shards read so far."""
        return sum(reads for reads, _ in self._counts)

    @property
    def num_wrong(self) -> int:
        """Elements that were not what they should have been."""
        return sum(wrong for _, wrong in self._counts)

    def run(self, num_threads: int) -> None:
        """Read in so many threads until the time is over."""
        streams = [torch.cuda.Stream(GPU) for _ in range(num_threads)]
        load_kernels(*streams)
        for expected in self._expected[:2]:
            int((expected != expected).sum())
        deadline = time.monotonic() + self._seconds
        run_threads([lambda at=at: self._read(random.Random(at), streams[at], deadline) for at in range(num_threads)])

    def _read(self, chance: random.Random, stream: torch.cuda.Stream, deadline: float) -> None:
        source = DictSource(self._shards)
        num_reads = 0
        with torch.cuda.stream(stream):
            num_wrong = torch.zeros((), dtype=torch.int64, device=GPU)
            while time.monotonic() < deadline:
                keys = chance.sample(range(len(self._expected)), 6)
                got = self._cache.get_many(keys, source, ready=chance.choice(("host", "stream")))
                torch.cuda._sleep(chance.choice((0, 1_000_000, 20_000_000)))
                for key, tensor in zip(keys, got, strict=True):
                    num_wrong += (tensor != self._expected[key]).sum()
                num_reads += len(got)
                del got, tensor
                self._cache.clear(chance.sample(range(len(self._expected)), chance.choice((1, 8, 24))))
            self._counts.append((num_reads, int(num_wrong)))
