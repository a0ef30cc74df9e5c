"""The tensors that travel: batches as post-training by reinforcement learning makes them, seeded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

_SEED = 0
_VOCABULARY = 32_000

Trajectory = dict[str, torch.Tensor]
# Name of a tensor -> dtype, and the shape for the trajectory's length.
Layout = Mapping[str, tuple[torch.dtype, Callable[[int], tuple[int, ...]]]]


@dataclass(frozen=True)
class Workload:
    """A batch of trajectories. Equal names and fractions mean equal tensors, in every process.

    Attributes:
        name: Short, for tables.
        title: What it stands for.
        lengths: One for each trajectory.
        layout: The tensors of a trajectory.
    """

    name: str
    title: str
    lengths: tuple[int, ...]
    layout: Layout

    @property
    def num_shards(self) -> int:
        """Tensors in all."""
        return len(self.lengths) * len(self.layout)

    @cached_property
    def shard_bytes(self) -> list[int]:
        """Bytes of each shard, in the order of the batch."""
        return [nbytes for length in self.lengths for nbytes in self.trajectory_bytes(length)]

    @property
    def nbytes(self) -> int:
        """Bytes in all."""
        return sum(self.shard_bytes)

    def trajectory_bytes(self, length: int) -> list[int]:
        """Bytes of each tensor of a trajectory of this length."""
        return [math.prod(shape(length)) * dtype.itemsize for dtype, shape in self.layout.values()]

    def trajectory(self, number: int) -> Trajectory:
        """The trajectory at a place in the batch, made anew."""
        generator = torch.Generator().manual_seed((_SEED << 32) + number)
        length = self.lengths[number]
        return {name: _values(dtype, shape(length), generator) for name, (dtype, shape) in self.layout.items()}

    def trajectories(self) -> Iterator[Trajectory]:
        """All of them, in order, made one by one."""
        return map(self.trajectory, range(len(self.lengths)))


def make_workload(name: str, fraction: float = 1.0) -> Workload:
    """One of the catalogue, or a fraction of its trajectories.

    Raises:
        KeyError: There is none of this name.
    """
    title, lengths, layout = _CATALOGUE[name]
    drawn = lengths(np.random.default_rng(_SEED))
    kept = drawn[: max(1, round(len(drawn) * fraction))]
    return Workload(name, title, tuple(int(length) for length in kept), layout)


def _values(dtype: torch.dtype, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if dtype is torch.bool:  # a mask without padding: what is masked at the end would be trimmed
        return torch.ones(shape, dtype=dtype)
    if dtype.is_floating_point:
        return torch.rand(shape, dtype=dtype, generator=generator)
    return torch.randint(_VOCABULARY, shape, dtype=dtype, generator=generator)


def _rollout_lengths(rng: np.random.Generator) -> np.ndarray:
    return rng.lognormal(7.6, 0.7, 512).clip(256, 8192)


def _distillation_lengths(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(4096, 400, 256).clip(3000, 5200)


def _vision_lengths(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(512, 4096, 64, endpoint=True)


def _image_lengths(rng: np.random.Generator) -> np.ndarray:
    return np.full(64, 1190)  # 5.6 MB each


def _row(length: int) -> tuple[int, ...]:
    return (1, length)


def _one(length: int) -> tuple[int, ...]:
    return (1,)


def _top_64(length: int) -> tuple[int, ...]:
    return (1, length, 64)


def _patches(length: int) -> tuple[int, ...]:
    return (length, 1176)


def _merged_patches(length: int) -> tuple[int, ...]:
    """Four patches are one token; and some words."""
    return (1, length // 4 + 256)


_ROLLOUT: Layout = {
    "input_ids": (torch.int64, _row),
    "attention_mask": (torch.bool, _row),
    "loss_mask": (torch.int32, _row),
    "logprobs": (torch.float32, _row),
    "versions": (torch.int32, _row),
    "rewards": (torch.float32, _one),
}
_DISTILLATION: Layout = {"topk_logits": (torch.bfloat16, _top_64), "topk_ids": (torch.int32, _top_64)}
_VISION: Layout = {"pixel_values": (torch.float32, _patches), "input_ids": (torch.int64, _merged_patches)}
_IMAGES: Layout = {"pixel_values": (torch.float32, _patches)}

_CATALOGUE: dict[str, tuple[str, Callable[[np.random.Generator], np.ndarray], Layout]] = {
    "rollout": ("many small shards", _rollout_lengths, _ROLLOUT),
    "distillation": ("top-64 logits", _distillation_lengths, _DISTILLATION),
    "vision": ("pixel values", _vision_lengths, _VISION),
    "images": ("equal shards of 5.6 MB", _image_lengths, _IMAGES),
}
NAMES = tuple(_CATALOGUE)
