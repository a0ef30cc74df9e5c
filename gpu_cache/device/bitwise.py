"""Whether two stretches of memory hold the same bytes, decided where they are."""

from __future__ import annotations

import torch

_WORD = 8
_PIECE_BYTES = 64 << 20  # compared at once: what is kept meanwhile takes an eighth of it


def differing(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Whether uint8 tensors of one length, each at the beginning of its storage, differ: a bool on their device.

    Bits are compared, so a NaN equals itself and 0.0 is not -0.0. Nothing is copied to the host.
    """
    whole = left.numel() // _WORD * _WORD
    steps = [(at, min(at + _PIECE_BYTES, whole)) for at in range(0, whole, _PIECE_BYTES)]
    words = [(left[at:end].view(torch.int64), right[at:end].view(torch.int64)) for at, end in steps]
    return torch.stack([(one != other).any() for one, other in [*words, (left[whole:], right[whole:])]]).any()
