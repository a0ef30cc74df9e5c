"""Ways of writing into a shard, and caches that look for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gpu_cache import CacheConfig, TensorCache
from gpu_cache.device.host import HostDevice

SETTINGS: dict[str, Any] = {
    "slab_bytes": "2MiB", "pool_bytes": "8MiB", "prealloc_bytes": 0, "staging_slots": 2, "staging_slot_bytes": "256KiB",
    "run_bytes": "64KiB",
}  # fmt: skip
CONFIG = CacheConfig(**SETTINGS)
WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "an operator": lambda x: x.add_(1),
    "a view": lambda x: x[3:5].fill_(7),
    "another dtype": lambda x: x.view(torch.int32).add_(1),
    "a result": lambda x: torch.add(x, 1, out=x),
    "a list of tensors": lambda x: torch._foreach_add_([x], 1),
    "inference mode": torch.inference_mode()(lambda x: x.mul_(2)),
    "an optimiser": lambda x: step(x, fused=False),
}
UNSEEN: dict[str, Callable[[torch.Tensor], object]] = {
    ".data": lambda x: x.data.add_(1),
    "numpy": lambda x: x.numpy().fill(3),
    "DLPack": lambda x: torch.from_dlpack(x.__dlpack__()).add_(1),
    "a fused optimiser": lambda x: step(x, fused=True),
}


def step(x: torch.Tensor, *, fused: bool) -> None:
    weights = x.detach().requires_grad_()
    weights.grad = torch.ones_like(weights)
    torch.optim.SGD([weights], lr=1.0, fused=fused).step()


def figures(cache: TensorCache, *names: str) -> tuple[int, ...]:
    """Counters, after a look at whether all look-ups are accounted for."""
    stats: dict[str, Any] = dict(cache.buffer_stats())
    for suffix in ("", "_bytes"):
        kinds = ("hits", "joined", "misses") if not suffix else ("hit_bytes", "joined_bytes", "miss_bytes")
        assert stats[f"requested{suffix}"] == sum(stats[kind] for kind in kinds)
    return tuple(stats[name] for name in names)


def on_host(**settings: Any) -> TensorCache:
    return TensorCache(CacheConfig(**SETTINGS, **settings), device=HostDevice())
