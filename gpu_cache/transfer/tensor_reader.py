"""A reader of tensors in host memory: for `put`, and for transports that deliver tensors."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from gpu_cache.device.hostmem import copy_on_host
from gpu_cache.errors import FetchError
from gpu_cache.source import ShardSpec

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class TensorReader:
    """A `ShardReader` that loads its tensors with one call and then copies their bytes.

    Args:
        node: The node that they come from, for messages.
        keys: The shards to load.
        load: Called once, by the draining thread; returns a tensor or an exception for each key, in order.
            An object that is no dense tensor in host memory fails alone.
        on_cancel: Makes a blocked `load` fail, where that is possible.
    """

    def __init__(
        self,
        node: str,
        keys: Sequence[Hashable],
        load: Callable[[], Sequence[torch.Tensor | Exception]],
        on_cancel: Callable[[], None] | None = None,
    ) -> None:
        self.node, self.keys = node, keys
        self.failures: dict[Hashable, Exception] = {}
        self._load, self._on_cancel = load, on_cancel
        self._is_loaded = False
        self._left: list[torch.Tensor] = []  # bytes not yet read, each (n,) uint8, last first

    def __repr__(self) -> str:
        return f"TensorReader({self.node!r}, {len(self.keys)} shards)"

    def next_specs(self) -> Sequence[ShardSpec] | None:
        """Load all tensors, and describe them: there is one part."""
        if self._is_loaded:
            return None
        self._is_loaded = True
        loaded: Any = self._load()
        if not is_list(loaded):
            found = "one tensor" if isinstance(loaded, torch.Tensor) else f"a {type(loaded).__name__}"
            raise FetchError(f"{self.node} returned {found}: a list with a tensor for each shard is expected")
        if len(loaded) != len(self.keys):
            raise FetchError(f"{self.node} returned {len(loaded)} shards for {len(self.keys)} requested")
        specs: list[ShardSpec] = []
        for key, one in zip(self.keys, loaded, strict=True):
            tensor = _checked(key, one)
            if isinstance(tensor, Exception):
                self.failures[key] = tensor
                continue
            specs.append(ShardSpec(key, tensor.dtype, tuple(tensor.shape)))
            if tensor.numel():
                self._left.append(host_bytes(tensor))
        self._left.reverse()
        return specs

    def read_into(self, buffers: Sequence[memoryview]) -> None:
        """Copy the next bytes. A tensor may be read in pieces; a buffer never spans two tensors."""
        pairs = []
        for buffer in buffers:
            tensor = self._left.pop()
            if tensor.numel() > len(buffer):
                self._left.append(tensor[len(buffer) :])
                tensor = tensor[: len(buffer)]
            pairs.append((torch.frombuffer(buffer, dtype=torch.uint8), tensor))
        copy_on_host(pairs)

    def cancel(self) -> None:
        """Make a blocked load fail, where `on_cancel` does."""
        if self._on_cancel is not None:
            self._on_cancel()

    def close(self) -> None:
        """Let go of the tensors."""
        self._left = []


def is_list(loaded: object) -> bool:
    """Whether it may be a list with a tensor for each shard; rows of one tensor would pass for shards."""
    return hasattr(loaded, "__len__") and not isinstance(loaded, torch.Tensor)


def _checked(key: Hashable, one: object) -> torch.Tensor | Exception:
    """A loaded object, if it can be copied from; else an error that says why not."""
    if isinstance(one, Exception):
        return one
    if not isinstance(one, torch.Tensor):
        return TypeError(f"shard {key!r} is a {type(one).__name__}: a Tensor is expected")
    kind = _other_kind(one)
    if kind or one.device.type != "cpu":
        kind = kind or str(one.layout)
        return ValueError(f"shard {key!r}: need a dense tensor in host memory, got {kind} on {one.device}")
    if lacks_memory(one):
        return ValueError(f"shard {key!r}: the tensor's memory was given back, as FSDP does between uses")
    return one


def _other_kind(tensor: torch.Tensor) -> str:
    """The kind of a tensor that has no bytes of its elements one after the other; "" of one that has."""
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return type(tensor).__name__
    if tensor.is_nested or tensor.layout is not torch.strided:
        return "a nested one" if tensor.is_nested else str(tensor.layout)
    return str(tensor.dtype) if tensor.is_quantized else ""


def lacks_memory(tensor: torch.Tensor) -> bool:
    """Whether a strided tensor's storage was cut; a read would end the process."""
    return tensor.untyped_storage().nbytes() < _least_nbytes(tensor)


def _least_nbytes(tensor: torch.Tensor) -> int:
    """The length that its storage must have to hold all elements."""
    if not (num_elements := tensor.numel()):
        return 0
    if tensor.is_contiguous():
        return int(tensor.storage_offset() + num_elements) * tensor.itemsize
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset() + last + 1) * tensor.itemsize


def host_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a host tensor in C order, `(nbytes,)` uint8: an alias where it is contiguous, else a copy."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    if not plain.is_contiguous():
        # By its bits: torch copies no elements of some dtypes, and makes every true bool a 1.
        plain = plain.view(_BITS.get(plain.itemsize, plain.dtype)).contiguous()
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8)  # any stride is contiguous to a single element
