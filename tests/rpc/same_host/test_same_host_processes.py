"""Owners and consumers that are killed, stopped and forked: no wrong byte, and nothing stays."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time

import pytest
import torch

from gpu_cache import FetchError
from gpu_cache.rpc import runtime
from gpu_cache.rpc.client.http import HttpRTensorBackend, SameHostReader
from gpu_cache.rpc.client.memory import OwnersMemory
from gpu_cache.rpc.rtensor import clear_fetch_buffer
from gpu_cache.rpc.server import main as rpc_server
from gpu_cache.rpc.server import same_host
from gpu_cache.rpc.server.main import ServerHandle
from gpu_cache.rpc.server.same_host import Limits
from gpu_cache.rpc.shard import ShardUnreachableError
from tests.support.fake_owner import FakeOwner
from tests.support.interleave_stage import eventually
from tests.support.same_host_process import KEYS, Nursery, fetched, fill, num_descriptors
from tests.support.same_host_reads import reader, transport


def test_an_owner_that_came_back_says_so_for_what_it_lost(processes: Nursery, shared: HttpRTensorBackend) -> None:
    told = processes.start("owner")
    fetched(told["address"])
    fetched(told["address"])
    assert transport(told["address"]) == "shm"
    processes.send(told["pid"], signal.SIGKILL)
    with pytest.raises(FetchError) as caught:
        fetched(told["address"], timeout_s=5.0)
    assert {type(one) for one in caught.value.failures.values()} == {ShardUnreachableError}
    del caught


def kill_owners(processes: Nursery, shared: HttpRTensorBackend, rounds: int, seed: int) -> None:
    """Fetch from owners that are killed meanwhile: right bytes or an error, and nothing of them stays."""
    chance = random.Random(seed)
    assert shared.memories is not None
    for number in range(rounds):
        told = processes.start("owner")
        timer = threading.Timer(chance.uniform(0.0, 0.5), processes.send, (told["pid"], signal.SIGKILL))
        timer.start()
        with contextlib.suppress(FetchError):
            while True:
                fetched(told["address"], timeout_s=10.0)
        timer.join()
        clear_fetch_buffer()
        if number == 0:
            settle(shared.memories)
            before = num_descriptors()
    settle(shared.memories)
    assert num_descriptors() <= before + 1
    assert shared.memories.stats()["owners"] == 0


def settle(memories: OwnersMemory) -> None:
    """Forget owners that are gone, as the next fetch does."""
    memories._looked_at = 0.0
    memories._close_gone()
    http = runtime.current().backend._connections  # type: ignore[attr-defined]
    while http._idle:
        http._idle.pop().close()


def kill_consumers(processes: Nursery, owner: FakeOwner, address: str, rounds: int, seed: int) -> None:
    """Kill consumers in mid-fetch: what they held comes free, and no descriptor stays."""
    chance = random.Random(seed)
    fill(owner.store)
    for number in range(rounds):
        consumer = processes.start("consumer", address)
        time.sleep(chance.uniform(0.0, 0.1))
        processes.send(consumer["pid"], signal.SIGKILL)
        owner.store.remove(KEYS)
        eventually(lambda: owner.store.segments.stats()["shared_bytes"] == 0)
        fill(owner.store)
        if number == 0:
            before = num_descriptors()
    assert num_descriptors() <= before + 1


def test_owners_killed_in_mid_fetch_cost_no_wrong_byte_and_leave_nothing(
    processes: Nursery, shared: HttpRTensorBackend
) -> None:
    kill_owners(processes, shared, rounds=3, seed=1)


def test_killed_consumers_hold_no_range(processes: Nursery, owner: FakeOwner, server: ServerHandle) -> None:
    kill_consumers(processes, owner, server.address, rounds=3, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_fifty_owners_killed_in_mid_fetch(processes: Nursery, shared: HttpRTensorBackend, seed: int) -> None:
    kill_owners(processes, shared, rounds=50, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_fifty_consumers_killed_in_mid_fetch(
    processes: Nursery, owner: FakeOwner, server: ServerHandle, seed: int
) -> None:
    kill_consumers(processes, owner, server.address, rounds=50, seed=seed)


def test_a_consumer_that_was_stopped_takes_no_bytes_that_came_meanwhile(
    processes: Nursery, owner: FakeOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(same_host, "Limits", lambda: Limits(hold_s=0.05))
    fill(owner.store)
    with rpc_server.start(owner=owner) as server:
        consumer = processes.start("consumer", server.address)
        for _ in range(5):
            processes.send(consumer["pid"], signal.SIGSTOP)
            time.sleep(0.1)
            owner.store.remove(KEYS)
            eventually(lambda: owner.store.segments.stats()["shared_bytes"] == 0)
            junk = owner.store.copies([torch.full((8 << 20,), 0xEE, dtype=torch.uint8)] * 4)
            processes.send(consumer["pid"], signal.SIGCONT)
            time.sleep(0.02)
            del junk
            fill(owner.store)
            time.sleep(0.02)
        processes.send(consumer["pid"], signal.SIGKILL)
    processes.start("owner")  # which fails if the consumer has told of wrong bytes


def test_an_owner_that_was_stopped_answers_when_it_goes_on(processes: Nursery, shared: HttpRTensorBackend) -> None:
    told = processes.start("owner")
    fetched(told["address"])
    processes.send(told["pid"], signal.SIGSTOP)
    timer = threading.Timer(0.3, processes.send, (told["pid"], signal.SIGCONT))
    timer.start()
    fetched(told["address"])
    timer.join()
    processes.send(told["pid"], signal.SIGKILL)


def test_a_forked_child_of_a_consumer_has_connections_of_its_own(processes: Nursery) -> None:
    told = processes.start("owner")
    assert processes.start("forking_consumer", told["address"])["problems"] == []
    processes.send(told["pid"], signal.SIGKILL)


def test_a_killed_owner_is_gone_at_once_though_its_child_lives(processes: Nursery, shared: HttpRTensorBackend) -> None:
    told = processes.start("forking_owner")
    fetched(told["address"])
    source = reader(shared, told["address"], KEYS[0])
    assert source.next_specs() is not None
    source.confirm()
    processes.send(told["pid"], signal.SIGUSR1)
    child = processes.told()["child"]
    processes.send(told["pid"], signal.SIGKILL)
    try:
        with pytest.raises(ShardUnreachableError):
            await_loss(source)
        source.close()
    finally:
        os.kill(child, signal.SIGKILL)


def await_loss(source: SameHostReader) -> None:
    """Confirm until that fails."""
    ends = time.monotonic() + 10
    while time.monotonic() < ends:
        source.confirm()
