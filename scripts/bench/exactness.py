"""Did the same bits arrive? Compared with the workload made anew on this side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from bench.workloads import Workload


class BenchError(RuntimeError):
    """A path brought other bits than were sent, or was measured under conditions that it should not have had."""


class Original:
    """The bits that the owner has, made a second time.

    Args:
        workload: Whose.
    Attributes:
        joined: All shards one behind another, `(nbytes,)` uint8 on the host.
    """

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self.joined = torch.empty(workload.nbytes, dtype=torch.uint8)
        at = 0
        for trajectory in workload.trajectories():
            for tensor in trajectory.values():
                self.joined[at : at + tensor.nbytes] = _bytes_of(tensor)
                at += tensor.nbytes

    def check_batch(self, path: str, batch: Sequence[Mapping[str, torch.Tensor]], num_trajectories: int) -> None:
        """Compare the first trajectories of the workload.

        Raises:
            BenchError: There are more or fewer, or one differs in name, dtype, shape or bits.
        """
        if len(batch) != num_trajectories:
            raise BenchError(f"{path}: brought {len(batch)} trajectories, not {num_trajectories}")
        layout, at = self._workload.layout, 0
        for number, found in enumerate(batch):
            if found.keys() != layout.keys():
                raise BenchError(f"{path}: trajectory {number} has {sorted(found)}, not {sorted(layout)}")
            for name, (dtype, shape_for) in layout.items():
                shape = shape_for(self._workload.lengths[number])
                end = at + math.prod(shape) * dtype.itemsize
                if not _is_same(found[name], dtype, shape, self.joined[at:end]):
                    raise BenchError(f"{path}: {name} of trajectory {number} is not what was sent")
                at = end

    def check_bytes(self, path: str, joined: torch.Tensor) -> None:
        """Compare the bytes of all shards one behind another, `(nbytes,)` uint8.

        Raises:
            BenchError: They differ.
        """
        if not torch.equal(joined.cpu(), self.joined):
            raise BenchError(f"{path}: the bytes are not what was sent")


def check_tensors(expected: Sequence[torch.Tensor], path: str, found: Sequence[torch.Tensor]) -> None:
    """Raise `BenchError` unless the tensors are the same."""
    if len(found) != len(expected):
        raise BenchError(f"{path}: brought {len(found)} tensors, not {len(expected)}")
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        if one.dtype is not other.dtype or not torch.equal(one.cpu(), other):
            raise BenchError(f"{path}: tensor {number} is not what was sent")


def _is_same(found: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], expected: torch.Tensor) -> bool:
    return found.dtype is dtype and tuple(found.shape) == shape and torch.equal(_bytes_of(found.cpu()), expected)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
