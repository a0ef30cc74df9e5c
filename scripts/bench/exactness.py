"""Did the same bits arrive? Compared with the workload made anew, one trajectory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from bench.workloads import Workload


class BenchError(RuntimeError):
    """A path brought other bits than were sent, or was measured under conditions that it should not have had."""


def check_batch(path: str, workload: Workload, batch: Iterable[Mapping[str, torch.Tensor]]) -> None:
    """Compare trajectories, the first ones of the workload or all.

    Raises:
        BenchError: One differs in name, dtype, shape or bits.
    """
    for number, found in enumerate(batch):
        expected = workload.trajectory(number)
        if found.keys() != expected.keys():
            raise BenchError(f"{path}: trajectory {number} has {sorted(found)}, not {sorted(expected)}")
        for name, tensor in expected.items():
            if not _is_same(found[name], tensor):
                raise BenchError(f"{path}: {name} of trajectory {number} is not what was sent")


def check_bytes(path: str, workload: Workload, joined: torch.Tensor) -> None:
    """Compare the bytes of all shards one behind another, `(nbytes,)` uint8.

    Raises:
        BenchError: They differ.
    """
    at = 0
    for trajectory in workload.trajectories():
        for name, tensor in trajectory.items():
            if not torch.equal(joined[at : at + tensor.nbytes], _bytes_of(tensor)):
                raise BenchError(f"{path}: {name} at byte {at:,} is not what was sent")
            at += tensor.nbytes


def _is_same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    is_alike = found.dtype is expected.dtype and found.shape == expected.shape
    return is_alike and torch.equal(_bytes_of(found.cpu()), _bytes_of(expected))


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
