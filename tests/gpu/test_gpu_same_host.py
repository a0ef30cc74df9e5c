"""Shards of another process on a real GPU: one copy from its memory to the device, without staging."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator

import pytest
import torch

from gpu_cache.device.cuda import CudaDevice
from gpu_cache.rpc import runtime
from gpu_cache.rpc.client.http import HttpRTensorBackend
from gpu_cache.rpc.client.memory import Segment
from gpu_cache.rpc.rtensor import RTensor, clear_fetch_buffer, set_backend
from gpu_cache.rpc.segments import Segment as OwnSegment
from tests.support.gpu_scene import MIB
from tests.support.same_host_process import KEYS, Nursery, handles, nursery, original
from tests.support.wire_tensors import same_bits

pytestmark = [pytest.mark.gpu]


@pytest.fixture(scope="module")
def processes() -> Iterator[Nursery]:
    with nursery() as made:
        yield made


def test_another_processes_shards_arrive_bit_by_bit_and_unstaged(processes: Nursery) -> None:
    told = processes.start("owner")
    runtime.configure(device="cuda")
    backend = HttpRTensorBackend(same_host=True)
    set_backend(backend)
    for _ in range(3):
        found = RTensor.localize(handles(told["address"]))
        assert all(one.is_cuda for one in found)
        assert all(same_bits(one.cpu(), original(key)) for key, one in zip(KEYS, found, strict=True))
        clear_fetch_buffer()
    assert runtime.current().cache._index.report()["sources"][told["address"]]["transport"] == "shm"
    assert backend.memories is not None
    (owner,) = backend.memories._owners.values()
    assert all(list(segment.lent.readers.values()) == [True] for segment in owner.segments.values())
    processes.send(told["pid"], signal.SIGKILL)
    backend.close()


def test_a_read_only_mapping_is_registered_and_copied_at_the_speed_of_pinned_memory(device: CudaDevice) -> None:
    nbytes = 256 * MIB
    own = OwnSegment(1, nbytes)
    own.memory[:] = 7
    with contextlib.closing(Segment(own.descriptor, nbytes)) as segment:
        assert device.reads(segment.lent)
        arena, pinned, stream = device.arena(nbytes), device.pinned(nbytes), device.new_stream()
        rates = []
        for source in (segment.lent.tensor, pinned.tensor):
            device.copy_all([(arena.tensor, source)], stream)
            device.synchronize(device.record(stream))
            began = time.perf_counter()
            device.copy_all([(arena.tensor, source)], stream)
            device.synchronize(device.record(stream))
            rates.append(nbytes / (time.perf_counter() - began) / 1e9)
        device.copy_all([(arena.tensor, segment.lent.tensor)], stream)
        device.synchronize(device.record(stream))
        assert bool((arena.tensor == 7).all())
        print(f"from another process's memory {rates[0]:.1f} GB/s, from pinned memory {rates[1]:.1f}")
        device.release_arena(arena)
        device.release_pinned(pinned)
    assert not segment.lent.endings
    torch.cuda.synchronize()
    own.close()
