"""Padding at the end of a batch is not worth storing or sending."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from gpu_cache.rpc.wire.serialization import bytes_for_now, is_dense

_MASK = "attention_mask"
_SHORT_BYTES = 1 << 20  # read within a millisecond


def trim_padding(batch: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Cut trailing padding off a batch that says with its `attention_mask` where it is.

    Args:
        batch: `attention_mask` is (batch, ..., tokens), true or non-zero where there is a token. It is cut on its last
            dimension; other tensors on dimension 1, and only where their shape begins with (batch, tokens).
    Returns:
        A new dict with views, or `batch` itself where there is nothing to cut.
    """
    mask = batch.get(_MASK)
    if not isinstance(mask, torch.Tensor) or mask.ndim < 2 or mask.is_meta:
        return batch
    num_rows, num_tokens = mask.shape[0], mask.shape[-1]
    length = _num_used(mask)
    if length == num_tokens:
        return batch

    def cut(name: Any, value: Any) -> Any:
        if name == _MASK:
            return mask[..., :length]
        if isinstance(value, torch.Tensor) and value.shape[:2] == (num_rows, num_tokens):
            return value[:, :length]
        return value

    return {name: cut(name, value) for name, value in batch.items()}


def _num_used(mask: torch.Tensor) -> int:
    """Up to the last token of any row. A short mask is read as bytes: each operation of torch gives the GIL away."""
    if mask.nbytes > _SHORT_BYTES or mask.dtype.is_floating_point or mask.dtype.is_complex or not is_dense(mask):
        used = mask.detach().bool().flatten(0, -2).any(dim=0).nonzero()
        return int(used[-1]) + 1 if len(used) else 0
    memory, row = bytes(bytes_for_now(mask)), mask.shape[-1] * mask.itemsize
    rows = [memory[start : start + row].rstrip(b"\0") for start in range(0, len(memory), row)] if row else []
    return -(-max(map(len, rows), default=0) // mask.itemsize)
