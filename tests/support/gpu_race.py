"""Races on a real GPU: a kernel that reads a block late while another shard wants its bytes; a copy that comes late."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gpu_cache import TensorCache
from gpu_cache.config import ReadyMode
from gpu_cache.device.cuda import CudaDevice
from tests.support.gpu_scene import GPU, LONG_CYCLES, REAL, SHARD_BYTES, Rig, fetch, is_all

OLD, NEW = 5, 9
_NON_BLOCKING = 1  # cudaStreamNonBlocking: does not wait for the default stream, as torch's own do not

consumers = REAL.consumers
Touch = Callable[[torch.Tensor, Any], object]


@dataclass(frozen=True)
class Outcome:
    """The end of a reader.

    Attributes:
        is_reused: The second shard got the bytes of the first.
        is_corrupt: The reader saw another shard than its own.
        has_waited: The call that fetched it returned after its copy was done.
    """

    is_reused: bool
    is_corrupt: bool
    has_waited: bool = True


def nothing(block: torch.Tensor, stream: Any) -> None:
    """Consume, and leave all order to the cache."""


def late_reader(
    cache: TensorCache, stream: Any, touch: Touch = nothing, cycles: int = LONG_CYCLES, rig: Rig = REAL
) -> Outcome:
    """Drop a block that `stream` has yet to read, and fetch a shard that fits nowhere else.

    Args:
        cache: Its pool holds one shard.
        stream: Reads the block, after a delay.
        touch: Called with block and stream before the block is dropped.
        cycles: The delay.
        rig: Where the cache is.
    """
    block = fetch(cache, "old", OLD)
    address, seen = block.data_ptr(), rig.blank(SHARD_BYTES)
    rig.synchronize()
    rig.keep_busy(stream, cycles)
    rig.read(block, seen, stream)
    touch(block, stream)
    cache.clear()
    del block
    successor = fetch(cache, "new", NEW)
    is_reused = successor.data_ptr() == address
    rig.synchronize()
    cache.clear()
    return Outcome(is_reused, not is_all(seen, OLD))


def race(cache: TensorCache, streams: Sequence[Any], touch: Touch = nothing, rig: Rig = REAL) -> list[Outcome]:
    """The same on several streams, one after the other: two may share a hardware queue, which orders them by chance."""
    rig.load_kernels(streams)
    late_reader(cache, streams[0], cycles=1, rig=rig)
    return [late_reader(cache, stream, touch, rig=rig) for stream in streams]


def late_copy(cache: TensorCache, stream: Any, ready: ReadyMode, rig: Rig = REAL) -> Outcome:
    """Read a shard on `stream` whose copy starts late, in a place that has another one's bytes.

    Args:
        cache: Its pool holds one shard; closed in the end.
        stream: Current when the shard is fetched.
        ready: The side that waits, host or stream.
        rig: Where the cache is.
    """
    address = fetch(cache, "old", OLD).data_ptr()
    cache.clear()
    cache.synchronize()
    seen = rig.blank(SHARD_BYTES)
    rig.synchronize()
    copies = cache._lazy.open().transfer.stream
    rig.keep_busy(copies)
    with rig.current(stream):
        tensor = fetch(cache, "new", NEW, ready=ready)
        has_waited = rig.is_idle(copies)
        rig.read(tensor, seen, stream)
    rig.synchronize()
    is_reused = tensor.data_ptr() == address
    del tensor
    cache.close()
    return Outcome(is_reused, not is_all(seen, NEW), has_waited)


@contextlib.contextmanager
def outside_stream(device: CudaDevice) -> Iterator[torch.cuda.ExternalStream]:
    """A stream that torch did not make. Close the caches that know of it before it goes."""
    create = device._runtime._symbols("cudaStreamCreateWithFlags")[0]
    handle = ctypes.c_void_p()
    with torch.cuda.device(GPU):
        assert create(ctypes.byref(handle), _NON_BLOCKING) == 0
        assert handle.value is not None
        try:
            yield torch.cuda.ExternalStream(handle.value, device=GPU)
        finally:
            torch.cuda.synchronize(GPU)
            torch.cuda.cudart().cudaStreamDestroy(handle.value)
