"""A tensor as its owner keeps it, with what serving it takes."""

from __future__ import annotations

import torch

from areal.infra.rpc.layout import described
from areal.infra.rpc.serialization import check_travels, host_bytes

# Up to this length tensors are sent from a joined copy of many: that costs less than a system call for each.
JOINED_BYTES = 128 << 10


class OwnedShard:
    """A tensor and the facts about it that the binary form needs, taken when it is stored and not when it is fetched.

    Taking them costs 6 us, more than all else that serving a small shard takes, and trainers wait for the latter.
    Values written into the tensor later are served; another shape or memory given to it is not.

    Attributes:
        tensor: As it was stored.
        nbytes: Its length.
        text: Its dtype and shape, as a frame's header has them.
        memory: Its bytes, if it is small, dense and in host memory; else None.
        stored_at: When, by the clock of its store.
    """

    __slots__ = ("_fault", "dtype", "memory", "nbytes", "shape", "stored_at", "tensor", "text")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.nbytes = tensor, tensor.nbytes
        self.dtype, self.shape = tensor.dtype, tuple(tensor.shape)
        self.text, self._fault = "", ""
        self.memory: memoryview | None = None
        self.stored_at = 0.0
        try:
            check_travels(tensor)
        except TypeError as error:
            self._fault = str(error)
            return
        self.text = described(self.dtype, self.shape, self.nbytes)
        is_plain = tensor.is_cpu and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
        if is_plain and self.nbytes <= JOINED_BYTES:
            self.memory = host_bytes(tensor)

    def check(self, shard_id: str) -> None:
        """Raise `TypeError` if it cannot be sent."""
        if self._fault:
            raise TypeError(self._fault)
        if self.tensor.is_meta:
            raise TypeError(f"shard {shard_id} is a meta tensor: it has no bytes to send")
