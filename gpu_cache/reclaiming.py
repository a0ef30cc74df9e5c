"""Memory that a cache no longer needs: waited for, and given back."""

from __future__ import annotations

import torch

from gpu_cache.block import TrimReport
from gpu_cache.device import Stream
from gpu_cache.errors import TransferError
from gpu_cache.lease import eager
from gpu_cache.observed import ObservedCache

_HOST = torch.device("cpu")  # where the host tier's tensors are


class ReclaimingCache(ObservedCache):
    """The part of a `TensorCache` that deals with memory alone. Any thread."""

    def record_stream(self, tensor: torch.Tensor, stream: Stream) -> None:
        """Say that `stream` reads `tensor`: its bytes are reused only after what is enqueued there when it dies.

        `Tensor.record_stream` does nothing for tensors of this cache. With `reuse_fence="all"` only streams made
        outside of torch need it.
        """
        if (engine := self._engine) is not None and tensor.device in (engine.device.torch_device, _HOST):
            engine.fence.note(stream)

    def synchronize(self) -> None:
        """Block until everything that was freed before this call is reusable.

        Raises:
            TransferError: During CUDA graph capture.
        """
        self._refuse_capture("synchronize")
        if (engine := self._engine) is not None:
            engine.synchronize()

    def trim(self, to_bytes: int = 0) -> TrimReport:
        """Give empty slabs back to the device's allocator until `to_bytes` are left, and keep no more until `resume`.

        Returns:
            How much was given back, true if anything was, and how much stays because its shards are cached or held.
        Raises:
            TransferError: During CUDA graph capture.
        """
        self._refuse_capture("trim")
        return TrimReport() if (engine := self._engine) is None else engine.pool.trim(to_bytes)

    @eager
    def offload(self) -> TrimReport:
        """Give the device's memory back, as for an engine that shares it: every slab is freed.

        What is cached moves to the host tier; where that is off or full, it goes, as does what somebody holds, who may
        be writing into it. What is handed out stays valid; its slabs stay too, until the last alias of a shard in them
        is gone. What is on its way lands after all, so let fetches end first. Waits for the work that was enqueued
        before.

        Returns:
            How much was given back, and how much is held.
        Raises:
            TransferError: During CUDA graph capture.
        """
        self._refuse_capture("offload")
        if (engine := self._engine) is None:
            return TrimReport()
        report = engine.offload()
        engine.reaper.wake()
        self._publisher.soon()
        return report

    def resume(self) -> None:
        """Take back what `offload` or `trim` said: the next use preallocates, and slabs are kept from step to step.

        Without it the cache works too, and takes and releases its slabs at each step.
        """
        if (engine := self._engine) is not None:
            engine.pool.resume()

    def _refuse_capture(self, action: str) -> None:
        if (engine := self._engine) is not None and engine.device.is_capturing():
            raise TransferError(f"cannot {action} the cache during CUDA graph capture")
