"""Padding at the end of a batch is not worth storing or sending."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_MASK = "attention_mask"


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
    used = mask.detach().bool().flatten(0, -2).any(dim=0).nonzero()
    length = int(used[-1]) + 1 if len(used) else 0
    if length == num_tokens:
        return batch

    def cut(name: Any, value: Any) -> Any:
        if name == _MASK:
            return mask[..., :length]
        if isinstance(value, torch.Tensor) and value.shape[:2] == (num_rows, num_tokens):
            return value[:, :length]
        return value

    return {name: cut(name, value) for name, value in batch.items()}
