from __future__ import annotations

import threading
from pathlib import Path

import pytest

from gpu_cache.config import MIB, CacheConfig
from gpu_cache.device.cuda import CudaDevice
from gpu_cache.device.host import HostDevice
from gpu_cache.errors import CacheClosedError, TransferError
from gpu_cache.transfer.staging import Slot, StagingRing
from tests.support.cuda_devices import cuda_device
from tests.support.fake_cuda import FakeCuda
from tests.support.threads import run_threads

CONFIG = CacheConfig(staging_slots=2, staging_slot_bytes=MIB, run_bytes=4096)


def host_ring(config: CacheConfig = CONFIG) -> StagingRing:
    return StagingRing(HostDevice(stages=True), config)


def test_slots_are_allocated_when_first_needed_and_then_reused() -> None:
    ring = host_ring()
    assert ring.stats()["pinned_capacity_bytes"] == 0
    first = ring.acquire(1.0)
    assert (ring.stats()["pinned_capacity_bytes"], ring.stats()["pinned_bytes"]) == (MIB, MIB)
    ring.release(first)
    assert ring.acquire(1.0) is first
    assert ring.stats()["pinned_capacity_bytes"] == MIB
    ring.release(first)
    assert ring.stats()["pinned_bytes"] == 0


def test_no_slot_in_time_is_told_in_numbers() -> None:
    ring = host_ring()
    slots = [ring.acquire(1.0), ring.acquire(1.0)]
    with pytest.raises(TransferError, match=r"no staging buffer came free in 0\.0 s: all 2 of 1,048,576 bytes"):
        ring.acquire(0.0)
    for slot in slots:
        ring.release(slot)
    assert ring.acquire(0.0) in slots


def test_a_waiter_gets_the_slot_that_comes_back() -> None:
    ring = host_ring(CacheConfig(staging_slots=1, staging_slot_bytes=MIB, run_bytes=4096))
    slot = ring.acquire(1.0)
    waiting = threading.Event()
    got: list[object] = []

    def wait() -> None:
        waiting.set()
        got.append(ring.acquire(30.0))

    thread = threading.Thread(target=wait)
    thread.start()
    assert waiting.wait(30)
    ring.release(slot)
    thread.join(30)
    assert got == [slot]


def test_closing_wakes_waiters_and_frees_returned_slots() -> None:
    ring = host_ring(CacheConfig(staging_slots=1, staging_slot_bytes=MIB, run_bytes=4096))
    slot = ring.acquire(1.0)
    errors: list[Exception] = []

    def wait() -> None:
        try:
            ring.acquire(30.0)
        except CacheClosedError as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    ring.close()
    thread.join(30)
    assert len(errors) == 1
    ring.release(slot)
    assert ring.stats()["pinned_capacity_bytes"] == 0
    ring.close()


def copied_from(ring: StagingRing, device: CudaDevice) -> Slot:
    """A slot that was given back while it is copied from."""
    slot, stream = ring.acquire(1.0), device.new_stream()
    slot.guard = device.record(stream)
    ring.release(slot)
    return slot


def test_a_slot_is_given_out_only_after_its_own_last_copy(tmp_path: Path) -> None:
    cuda = FakeCuda()
    device: CudaDevice = cuda_device(cuda, tmp_path)
    ring = StagingRing(device, CacheConfig(staging_slots=1, staging_slot_bytes=MIB, run_bytes=4096))
    slot = copied_from(ring, device)
    guard = slot.guard
    assert guard is not None
    assert not device.query(guard)
    assert ring.acquire(1.0) is slot
    assert device.query(guard), "the host waited for it"
    assert slot.guard is None
    ring.release(slot)
    ring.close()
    assert not cuda.pinned


def test_receiving_goes_on_in_another_slot_while_one_is_copied_from(tmp_path: Path) -> None:
    cuda = FakeCuda()
    device: CudaDevice = cuda_device(cuda, tmp_path)
    ring = StagingRing(device, CONFIG)
    first = copied_from(ring, device)
    second = copied_from(ring, device)
    assert second is not first
    assert first.guard is not None
    assert not device.query(first.guard), "no thread waited"
    assert ring.acquire(1.0) is first, "both are in use, and it was given back first"
    assert ring.acquire(1.0) is second
    ring.release(first)
    ring.release(second)
    ring.close()


def test_a_failed_allocation_leaves_room_for_the_next() -> None:
    device = HostDevice(stages=True)
    ring = StagingRing(device, CacheConfig(staging_slots=1, staging_slot_bytes=MIB, run_bytes=4096))
    working, device.pinned = device.pinned, lambda nbytes: (_ for _ in ()).throw(MemoryError("no pages"))  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        ring.acquire(1.0)
    device.pinned = working  # type: ignore[method-assign]
    ring.release(ring.acquire(1.0))


def test_a_slot_whose_copies_the_device_does_not_tell_of_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = cuda_device(FakeCuda(), tmp_path)
    ring = StagingRing(device, CacheConfig(staging_slots=1, staging_slot_bytes=MIB, run_bytes=4096))
    slot = copied_from(ring, device)
    with monkeypatch.context() as patched:
        patched.setattr(device, "query", failing)
        with pytest.raises(RuntimeError, match="lost"):
            ring.acquire(1.0)
    assert ring.acquire(1.0) is slot


def test_slots_that_the_device_fails_to_wait_for_are_freed_by_the_next_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = cuda_device(FakeCuda(), tmp_path)
    ring = StagingRing(device, CONFIG)
    slots = [ring.acquire(1.0), ring.acquire(1.0)]
    for slot in slots:
        slot.guard = device.record(device.new_stream())
        ring.release(slot)
    real, faulty = device.synchronize, {id(slots[0].guard)}
    monkeypatch.setattr(device, "synchronize", lambda event: failing(event) if id(event) in faulty else real(event))
    with pytest.raises(RuntimeError, match="lost"):
        ring.close()
    assert ring.stats()["pinned_capacity_bytes"] == MIB, "the other one is free"
    faulty.clear()
    ring.close()
    assert ring.stats()["pinned_capacity_bytes"] == 0


def test_a_slot_that_comes_back_after_the_close_and_cannot_be_freed_is_freed_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = cuda_device(FakeCuda(), tmp_path)
    ring = StagingRing(device, CONFIG)
    slot = ring.acquire(1.0)
    slot.guard = device.record(device.new_stream())
    ring.close()
    with monkeypatch.context() as patched:
        patched.setattr(device, "synchronize", failing)
        with pytest.raises(RuntimeError, match="lost"):
            ring.release(slot)
    ring.close()
    assert ring.stats()["pinned_capacity_bytes"] == 0


def failing(event: object) -> bool:
    raise RuntimeError("the device is lost")


def test_threads_never_share_a_slot() -> None:
    ring = host_ring()
    owners: dict[int, int] = {}

    def work() -> None:
        for _ in range(200):
            slot = ring.acquire(30.0)
            assert owners.setdefault(id(slot), threading.get_ident()) == threading.get_ident()
            del owners[id(slot)]
            ring.release(slot)

    run_threads([work] * 4)
    assert ring.stats()["pinned_bytes"] == 0
    assert ring.stats()["pinned_capacity_bytes"] <= 2 * MIB
