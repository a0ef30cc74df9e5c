"""Workers of the tests beside Ray: they store, read, clear, and end as no worker should."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from gpu_cache.rpc import rtensor
from gpu_cache.rpc.rtensor import RTensor
from tests.support.wire_tensors import WIRE_DTYPES, patterned, raw_bytes

SHAPES = [(), (3, 4), (0, 2), (1, 2, 1, 2, 1, 2, 1, 2)]


def every_tensor() -> list[torch.Tensor]:
    """Of every dtype, in every shape that is odd somewhere; and some that are not dense."""
    found = [patterned(dtype, *shape) for dtype in WIRE_DTYPES for shape in SHAPES]
    strided = patterned(torch.complex64, 6, 5)
    return [*found, torch.arange(6)[::2], torch.arange(20.0).view(4, 5).t(), strided.conj(), strided.t().imag]


def remote(handles: Sequence[RTensor]) -> list[RTensor]:
    """The handles as another process has them: without their tensors, and with references of their own."""
    return [RTensor(one.shard, torch.empty(one.shape, dtype=one.dtype, device="meta")) for one in handles]


class Worker:
    """An actor's class, which `ray.remote` takes."""

    def __init__(self) -> None:
        self.held: Any = None

    def pid(self) -> int:
        return os.getpid()

    def store(self, num_shards: int, nbytes: int) -> list[RTensor]:
        """Handles of shards of which the first bytes are their numbers."""
        tensors = [torch.full((nbytes,), number % 251, dtype=torch.uint8) for number in range(num_shards)]
        return RTensor.remotize(tensors, "")  # type: ignore[no-any-return]

    def store_every(self) -> list[RTensor]:
        return RTensor.remotize(every_tensor(), "")  # type: ignore[no-any-return]

    def read(self, handles: list[RTensor]) -> list[bytes]:
        """The shards' bytes; the handles are kept."""
        self.held = handles
        return [raw_bytes(tensor) for tensor in RTensor.localize(handles)]

    def clear(self, shard_ids: list[Any]) -> int:
        return rtensor.clear_batches(shard_ids)

    def sizes(self) -> dict[str, int]:
        return {**rtensor.storage_stats(), **rtensor.fetch_buffer_stats()}


class AsyncWorker:
    """An actor with an event loop, in which coroutines call what blocks."""

    async def handed_on(self, handles: list[RTensor]) -> list[RTensor]:
        """The same tensors, stored by this process."""
        return RTensor.remotize(RTensor.localize(handles), "")  # type: ignore[no-any-return]
