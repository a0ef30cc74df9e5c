"""A tensor as its owner keeps it, with what serving it takes."""

from __future__ import annotations

import torch

from gpu_cache.device.modes import plain_tensors
from gpu_cache.rpc.wire.layout import described
from gpu_cache.rpc.wire.serialization import check_travels, host_bytes


class OwnedShard:
    """A tensor and the facts about it that the binary form needs, taken when it is stored and not when it is fetched.

    Taking them costs 6 us, more than all else that serving a small shard takes, and trainers wait for the latter.
    Values written into the tensor later are served; another shape or memory given to it is not.

    Attributes:
        tensor: As it was stored.
        nbytes: Its length.
        text: Its dtype and shape, as a frame's header has them.
        memory: Its bytes, if it is dense and in host memory; else None.
        stored_at: When, by the clock of its store.
    """

    __slots__ = (
        "_fault", "_number", "_serial", "_version", "dtype", "memory", "nbytes", "shape", "stored_at", "tensor", "text",
    )  # fmt: skip

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.nbytes = tensor, tensor.nbytes
        self.dtype, self.shape = tensor.dtype, tuple(tensor.shape)
        self.text, self._fault = "", ""
        self.memory: memoryview | None = None
        self.stored_at = 0.0
        self._number, self._version, self._serial = 0, _version(tensor), ""
        try:
            check_travels(tensor)
        except TypeError as error:
            self._fault = str(error)
            return
        self.text = described(self.dtype, self.shape, self.nbytes)
        if tensor.is_cpu and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg():
            with plain_tensors():
                self.memory = host_bytes(tensor)

    @property
    def serial(self) -> str:
        """Tells this tensor, with what was written into it so far, from every other that its store has had.

        Empty outside a store. torch counts no writes into inference tensors, nor those past it, as through numpy.
        """
        if not self._serial or self._version is None or self._version == (version := self.tensor._version):
            return self._serial
        return f"{self._number}.{version}"

    def number(self, number: int) -> None:
        """Note its store's number for it, which no other of the store's shards gets."""
        self._number, self._serial = number, f"{number}.{self._version or 0}"

    def check(self, shard_id: str) -> None:
        """Raise `TypeError` if it cannot be sent."""
        if self._fault:
            raise TypeError(self._fault)
        if self.tensor.is_meta:
            raise TypeError(f"shard {shard_id} is a meta tensor: it has no bytes to send")


def _version(tensor: torch.Tensor) -> int | None:
    """How often it was written into; None where torch does not count that."""
    return None if tensor.is_inference() else tensor._version
