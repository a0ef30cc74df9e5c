"""Paths that only a device with memory of its own has: what its link can do, and AReaL's way of getting there."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench.beside import TORCH
from bench.exactness import BenchError, Original, check_tensors
from bench.paths import DEFAULTS, TUNED, JsonPart, Path, Trainers
from bench.trainer import Trainer
from bench.workloads import Workload
from gpu_cache import ShardReader, ShardSpec

PINNED_PEAK, PIPELINE, FEW = "pinned_peak", "pipeline", "get_clear_30"
_NUM_FEW = 30
LARGER = "larger"
_NUM_BATCHES = 5  # in one read: more than a cache preallocates at defaults, where the batch is that of vision
UPSTREAM_COLD, UPSTREAM_SECOND = "upstream_cold", "upstream_second"


def _pinned_copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.pin_memory()


@dataclass(frozen=True)
class Link:
    """The way to a device.

    Attributes:
        device: "cuda:0".
        pinned: A copy of a host tensor in pinned memory.
        synchronize: Waits until the device has done everything.
    """

    device: str
    pinned: Callable[[torch.Tensor], torch.Tensor] = _pinned_copy
    synchronize: Callable[[Any], None] = torch.accelerator.synchronize

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """Copy a pinned tensor, and wait until it is there."""
        target.copy_(source, non_blocking=True)
        self.synchronize(target.device)
        return target

    def move(self, tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """Move pageable tensors one by one, and wait until they are there."""
        moved = [tensor.to(self.device) for tensor in tensors]
        self.synchronize(torch.device(self.device))
        return moved


def gpu_paths(
    workload: Workload, trainers: Trainers, original: Original, part: JsonPart, link: Link | None = None
) -> list[Path]:
    """Link and pipeline, and AReaL's way: host tensors from JSON, then `.to(device)` one by one; again at each read."""
    link = link or Link(trainers.tuned.device)
    source, target = link.pinned(original.joined), torch.empty_like(original.joined, device=link.device)
    all_of_it = (workload.nbytes, workload.num_shards)
    on_host = [tensor for trajectory in workload.trajectories() for tensor in trajectory.values()]
    trainers.defaults.cache.put("opens it", torch.zeros(1))
    trainers.defaults.clear_cache()
    room = trainers.defaults.stats()["device_capacity_bytes"]
    num_batches = max(1, min(_NUM_BATCHES, 3 * room // 4 // workload.nbytes))
    larger = _pipeline(f"{DEFAULTS}/{LARGER}", workload, trainers.defaults, num_batches)
    check_part, check_moved = partial(part.check, original), partial(check_tensors, on_host)
    return [
        Path(PINNED_PEAK, lambda _: link.copy(target, source), original.check_bytes, *all_of_it),
        _pipeline(f"{DEFAULTS}/{PIPELINE}", workload, trainers.defaults),
        _pipeline(f"{TUNED}/{PIPELINE}", workload, trainers.tuned),
        _few(f"{DEFAULTS}/{FEW}", workload, trainers.defaults),
        larger,
        larger.besides(TORCH, link.device),
        Path(UPSTREAM_COLD, lambda _: link.move(part.fetch()), check_part, part.nbytes, len(part.shard_ids)),
        Path(UPSTREAM_SECOND, lambda _: link.move(on_host), check_moved, *all_of_it, is_transfer=False),
    ]


def _pipeline(name: str, workload: Workload, trainer: Trainer, num_batches: int = 1) -> Path:
    """All that the cache does, from a source that takes no time; the bytes are whatever the staging buffers held."""
    specs = [one for batch in range(num_batches) for one in _specs(workload, batch)]
    keys, source = [spec.key for spec in specs], InstantSource(specs)

    def check(path: str, tensors: Sequence[torch.Tensor]) -> None:
        found = [(tensor.dtype, tuple(tensor.shape)) for tensor in tensors]
        if found != [(spec.dtype, spec.shape) for spec in specs]:
            raise BenchError(f"{path}: other dtypes or shapes than were announced")

    def run(_: None) -> list[torch.Tensor]:
        return trainer.cache.get_many(keys, source)

    finish = trainer.clear_cache  # a tuned pool has room for one batch
    return Path(name, run, check, workload.nbytes * num_batches, len(specs), trainer.clear_cache, finish)


def _few(name: str, workload: Workload, trainer: Trainer) -> Path:
    """What a small call costs beside its copies: get and clear of the first shards."""
    specs = _specs(workload)[:_NUM_FEW]
    keys, source = [spec.key for spec in specs], InstantSource(specs)

    def run(_: None) -> int:
        trainer.cache.get_many(keys, source)
        return trainer.cache.clear(keys)

    def check(path: str, num_cleared: int) -> None:
        if num_cleared != len(keys):
            raise BenchError(f"{path}: cleared {num_cleared} shards, not {len(keys)}")

    nbytes = sum(workload.shard_bytes[: len(keys)])
    return Path(name, run, check, nbytes, len(keys), trainer.clear_cache, is_transfer=False, is_reading=False)


def _specs(workload: Workload, batch: int = 0) -> list[ShardSpec]:
    return [
        ShardSpec(("pipeline", batch, number, name), dtype, shape(length))
        for number, length in enumerate(workload.lengths)
        for name, (dtype, shape) in workload.layout.items()
    ]


@dataclass(frozen=True)
class InstantSource:
    """Delivers shards of which only dtype and shape matter: its reader leaves each buffer as it is."""

    specs: Sequence[ShardSpec]

    def open(self, keys: Sequence[Hashable], timeout_s: float) -> list[ShardReader]:
        """One reader."""
        wanted = set(keys)
        return [_InstantReader([spec for spec in self.specs if spec.key in wanted])]


class _InstantReader:
    def __init__(self, specs: Sequence[ShardSpec]) -> None:
        self.node = "instant"
        self.keys: Sequence[Hashable] = [spec.key for spec in specs]
        self.failures: Mapping[Hashable, Exception] = {}
        self._parts = [specs]

    def next_specs(self) -> Sequence[ShardSpec] | None:
        return self._parts.pop() if self._parts else None

    def read_into(self, buffers: Sequence[memoryview]) -> None:
        pass

    def cancel(self) -> None:
        pass

    def close(self) -> None:
        pass
