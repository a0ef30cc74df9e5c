"""A pool much smaller than what is read: over a real server process, with one staging slot, and at random."""

from __future__ import annotations

import dataclasses
import random
import subprocess
import sys
from collections import deque
from collections.abc import Hashable, Iterator
from pathlib import Path

import pytest
import torch

from gpu_cache import CacheConfig, FetchError, TensorCache
from gpu_cache.config import Prefer
from gpu_cache.device.host import HostDevice
from gpu_cache.rpc import RTensor, TensorShardInfo, runtime
from gpu_cache.rpc.rtensor import buffer_stats
from tests.support.sources import DictSource, same_bytes

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
NUM_SHARDS, SHARD_BYTES = 64, MIB
OWNER = f"""
import sys, torch
from gpu_cache.rpc.server import main as rpc_server
from gpu_cache.rpc.rtensor import store

with rpc_server.start() as server:
    for number in range({NUM_SHARDS}):
        store(f"shard-{{number}}", torch.full(({SHARD_BYTES},), number, dtype=torch.uint8))
    print(server.address, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of a server process with a batch of 64 MiB."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", OWNER]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        yield process.stdout.readline().strip()
        process.stdin.close()


def handles(address: str) -> list[RTensor]:
    meta = torch.empty(SHARD_BYTES, dtype=torch.uint8, device="meta")
    return [RTensor(TensorShardInfo(f"shard-{number}", address), meta) for number in range(NUM_SHARDS)]


def all_right(tensors: list[torch.Tensor]) -> bool:
    return all(bool((tensor == number).all()) for number, tensor in enumerate(tensors))


@pytest.mark.parametrize("staging_slots", [1, 2])
def test_a_batch_of_eight_times_the_pool_comes_whole_and_leaves_nothing(address: str, staging_slots: int) -> None:
    cache = runtime.configure(
        device="cpu", pool_bytes="8MiB", slab_bytes="4MiB", staging_slots=staging_slots, staging_slot_bytes="1MiB",
        run_bytes="1MiB",
    ).cache  # fmt: skip
    cache._given_device = HostDevice(stages=True)
    cache._start_empty()
    for _ in range(2):
        batch = RTensor.localize(handles(address))
        assert all_right(batch)
    stats = buffer_stats()
    assert stats["overflows"] >= NUM_SHARDS - 8
    assert stats["fetch_errors"] == 0
    assert stats["pinned_capacity_bytes"] <= staging_slots * MIB
    del batch
    for number in range(NUM_SHARDS):  # one by one: no caller holds the others
        assert RTensor.localize(handles(address)[number])[0] == number
    assert buffer_stats()["evictions"] > 0
    assert buffer_stats()["overflows"] == stats["overflows"]
    cache.clear()
    cache.synchronize()
    assert (buffer_stats()["device_bytes"], buffer_stats()["device_reserved_bytes"]) == (0, 8 * MIB)
    cache.trim()
    assert buffer_stats()["device_reserved_bytes"] == 0


def test_a_batch_on_the_host_takes_nothing_of_the_pool(address: str) -> None:
    cache = runtime.configure(
        device="cpu", pool_bytes="8MiB", slab_bytes="4MiB", host_tier_bytes="80MiB", staging_slots=1,
        staging_slot_bytes="1MiB", run_bytes="1MiB",
    ).cache  # fmt: skip
    cache._given_device = HostDevice(stages=True)
    cache._start_empty()
    assert RTensor.prefetch(handles(address)[:8], prefer="host").result(30) == 8
    batch = RTensor.localize(handles(address), prefer="host")
    assert all_right(batch)
    stats = buffer_stats()
    assert (stats["misses"], stats["host_hits"], stats["overflows"]) == (NUM_SHARDS, 8, 0)
    assert (stats["host_bytes"], stats["device_reserved_bytes"], stats["copies"]) == (NUM_SHARDS * MIB, 0, 0)
    del batch
    on_device = RTensor.localize(handles(address)[:4])
    assert all_right(on_device)
    cache.synchronize()
    assert buffer_stats()["fetch_bytes"] == NUM_SHARDS * MIB
    assert buffer_stats()["host_bytes"] == (NUM_SHARDS - 4) * MIB


LENGTHS = (100, 512, 3000, 4096, 9000, 30_000)
WORKING_SET: dict[Hashable, torch.Tensor] = {
    number: torch.randint(0, 255, (LENGTHS[number % 6],), generator=torch.Generator().manual_seed(number)).byte()
    for number in range(300)
}
TIGHT = CacheConfig(
    pool_bytes=sum(tensor.nbytes for tensor in WORKING_SET.values()) // 10, slab_bytes="32KiB", prealloc_bytes=0,
    staging_slots=1, staging_slot_bytes="16KiB", run_bytes="8KiB",
)  # fmt: skip


class Consumer:
    """Makes random calls, and looks at every byte that it gets.

    Args:
        cache: Much too small.
        seed: Of its random choices.
        host_share: Share of its calls that prefer the host.
    """

    def __init__(self, cache: TensorCache, seed: int, host_share: float = 0.0) -> None:
        self._cache, self._random, self._source = cache, random.Random(seed), DictSource(WORKING_SET)
        self._host_share = host_share
        self._held: deque[tuple[Hashable, torch.Tensor]] = deque()

    def step(self) -> None:
        chance = self._random
        keys = chance.sample(range(len(WORKING_SET)), chance.randint(1, 6))
        action = chance.choices((self._get, self._prefetch, self._clear, self._drop, self._trim), (60, 10, 10, 19, 1))
        action[0](keys)

    def finish(self) -> None:
        while self._held:
            self._drop([])

    def _get(self, keys: list[int]) -> None:
        tensors = self._cache.get_many(keys, self._source, prefer=self._some_place())
        for key, tensor in zip(keys, tensors, strict=True):
            assert same_bytes(tensor, WORKING_SET[key])
            if self._random.random() < 0.2:
                self._held.append((key, tensor))
        while len(self._held) > 8:
            self._drop([])

    def _prefetch(self, keys: list[int]) -> None:
        future = self._cache.prefetch(keys, self._source, prefer=self._some_place())
        if self._random.random() < 0.5 and (error := future.exception(30)) is not None:
            assert isinstance(error, FetchError)  # there was no room, which is no reason to overflow

    def _some_place(self) -> Prefer:
        return "host" if self._random.random() < self._host_share else "device"

    def _clear(self, keys: list[int]) -> None:
        self._cache.clear(keys)

    def _trim(self, keys: list[int]) -> None:
        self._cache.trim()

    def _drop(self, keys: list[int]) -> None:
        if self._held:
            key, tensor = self._held.popleft()
            assert same_bytes(tensor, WORKING_SET[key]), "overwritten while it was held"


@pytest.mark.parametrize(
    ("stages", "num_operations", "tier_bytes", "host_share"),
    [
        pytest.param(True, 1_500, 0, 0.0, id="staged"),
        pytest.param(True, 1_000, TIGHT.pool_bytes, 0.0, id="with a host tier"),
        pytest.param(True, 1_500, TIGHT.pool_bytes, 0.4, id="often on the host"),
        pytest.param(False, 1_000, 0, 0.0, id="direct"),
        pytest.param(True, 10_000, 0, 0.0, id="staged, long", marks=pytest.mark.slow),
        pytest.param(True, 3_000, TIGHT.pool_bytes, 0.0, id="with a host tier, long", marks=pytest.mark.slow),
        pytest.param(True, 10_000, TIGHT.pool_bytes, 0.4, id="often on the host, long", marks=pytest.mark.slow),
    ],
)
def test_random_operations_under_a_pool_a_tenth_of_the_working_set(
    stages: bool, num_operations: int, tier_bytes: int, host_share: float
) -> None:
    cache = TensorCache(dataclasses.replace(TIGHT, host_tier_bytes=tier_bytes), device=HostDevice(stages=stages))
    consumer = Consumer(cache, 1, host_share)
    for _ in range(num_operations):
        consumer.step()
    consumer.finish()
    stats = cache.buffer_stats()
    assert stats["evictions"] > num_operations // 2
    assert stats["fetch_errors"] <= stats["misses"] // 20
    cache.clear()
    while cache._tasks:
        pass
    cache.clear()
    cache.trim()
    after = cache.buffer_stats()
    assert (after["device_bytes"], after["device_reserved_bytes"], after["num_entries"]) == (0, 0, 0)
    assert after["host_bytes"] == 0
    assert (stats["host_hits"] > num_operations // 10) == (tier_bytes > 0)
