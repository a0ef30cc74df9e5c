"""Every alias of a shard on a GPU keeps its bytes; the last one gives them back, on any thread."""

from __future__ import annotations

import gc
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.dlpack import from_dlpack, to_dlpack

from gpu_cache import TensorCache
from gpu_cache.pool.lease import Lease
from tests.support.gpu_scene import GPU, SHARD_BYTES, filled, small_cache
from tests.support.sources import DictSource

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("failures_stay_alone")]

VALUES = torch.arange(1000.0)


class Witness(deque[Lease]):
    """Stands for the deque that leases fire into, and remembers on which threads they did."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: list[int] = []

    def append(self, lease: Lease) -> None:
        self.threads.append(threading.get_ident())
        super().append(lease)


@pytest.fixture
def cache() -> TensorCache:
    return small_cache()


@pytest.fixture
def witness(cache: TensorCache) -> Witness:
    cache._lazy.open().pool._freed = seen = Witness()
    return seen


def floats(cache: TensorCache) -> torch.Tensor:
    """A shard of numbers, dropped from the cache: only its holder keeps it."""
    (shard,) = cache.get_many(["a"], DictSource({"a": VALUES}))
    cache.clear()
    return shard


def weight() -> torch.Tensor:
    return torch.ones(1000, device=GPU, requires_grad=True)


def held_bytes(cache: TensorCache) -> int:
    """Bytes that an alias keeps, when everything else had its chance to go."""
    gc.collect()
    cache.synchronize()
    stats = cache.buffer_stats()
    assert stats["device_quarantined_bytes"] == 0
    return stats["device_bytes"]


KEEPERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "slice": lambda shard: shard[1:],
    "other shape": lambda shard: shard.view(10, -1),
    "other dtype": lambda shard: shard.view(torch.uint8),
    "alias": lambda shard: shard.detach(),
    "parameter": torch.nn.Parameter,
    "storage": lambda shard: shard.untyped_storage(),
    "DLPack capsule": to_dlpack,
    "DLPack tensor": from_dlpack,
    "DLPack tensor of a capsule": lambda shard: from_dlpack(to_dlpack(shard)),
    "list of a list": lambda shard: [[shard[2:4]]],
}


@pytest.mark.parametrize("keep", KEEPERS.values(), ids=KEEPERS)
def test_an_alias_of_any_kind_keeps_the_bytes(cache: TensorCache, keep: Callable[[torch.Tensor], Any]) -> None:
    shard = floats(cache)
    kept = keep(shard)
    del shard
    assert held_bytes(cache) == 4096
    del kept
    assert held_bytes(cache) == 0


def test_a_block_is_its_shard_and_nothing_else(cache: TensorCache) -> None:
    arena = cache._lazy.open().device.arena(1 << 20)
    assert arena.tensor.data_ptr() % 512 == 0
    cache._lazy.open().device.release_arena(arena)
    shard = floats(cache)
    assert shard.data_ptr() % 512 == 0
    assert (shard.untyped_storage().nbytes(), shard.storage_offset()) == (4000, 0)
    with pytest.raises(RuntimeError, match="resiz"):
        shard.resize_(2000)


def test_backward_frees_its_saved_tensors_on_the_autograd_thread(cache: TensorCache, witness: Witness) -> None:
    factor = weight()
    loss = (factor * floats(cache)).sum()
    assert held_bytes(cache) == 4096
    loss.backward()
    assert witness.threads
    assert threading.get_ident() not in witness.threads
    assert held_bytes(cache) == 0
    assert factor.grad is not None
    assert torch.equal(factor.grad.cpu(), VALUES)


def test_a_retained_graph_keeps_the_bytes_for_the_next_backward(cache: TensorCache) -> None:
    factor = weight()
    loss = (factor * floats(cache)).sum()
    loss.backward(retain_graph=True)
    assert held_bytes(cache) == 4096
    loss.backward()
    assert held_bytes(cache) == 0
    assert factor.grad is not None
    assert torch.equal(factor.grad.cpu(), 2 * VALUES)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_keeps_the_bytes_until_it_has_recomputed(cache: TensorCache, use_reentrant: bool) -> None:
    factor = weight()
    loss = checkpoint(lambda one, other: (one * other).sin(), factor, floats(cache), use_reentrant=use_reentrant).sum()
    assert held_bytes(cache) == 4096
    loss.backward()
    del loss
    assert held_bytes(cache) == 0
    assert factor.grad is not None
    assert torch.allclose(factor.grad.cpu(), VALUES * VALUES.cos(), atol=1e-2)


def test_saved_tensors_that_move_to_the_host_free_the_bytes_before_backward(cache: TensorCache) -> None:
    factor = weight()
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        loss = (factor * floats(cache)).sum()
    assert held_bytes(cache) == 0
    loss.backward()
    assert factor.grad is not None
    assert torch.equal(factor.grad.cpu(), VALUES)


class Saved(torch.autograd.Function):
    """A user's function that saves its input."""

    @staticmethod
    def forward(ctx: Any, factor: torch.Tensor, shard: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(shard)
        return factor * shard

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (shard,) = ctx.saved_tensors
        return grads[0] * shard, None


def test_a_users_function_frees_its_saved_tensors(cache: TensorCache, witness: Witness) -> None:
    loss = Saved.apply(weight(), floats(cache)).sum()
    assert held_bytes(cache) == 4096
    loss.backward()
    assert threading.get_ident() not in witness.threads
    assert held_bytes(cache) == 0


def test_many_threads_train_on_the_same_shards_and_leave_nothing(cache: TensorCache) -> None:
    source = DictSource({key: VALUES + key for key in range(8)})
    sums: list[float] = []

    def train() -> None:
        factor = weight()
        for key in range(8):
            (factor * cache.get_many([key], source)[0]).sum().backward()
        assert factor.grad is not None
        sums.append(float(factor.grad.sum()))

    threads = [threading.Thread(target=train) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    cache.clear()
    assert sums == [float((8 * VALUES + 28).sum())] * 4
    assert held_bytes(cache) == 0


def test_the_next_shard_gets_the_bytes_that_backward_freed(cache: TensorCache) -> None:
    whole = SHARD_BYTES // 4
    (shard,) = cache.get_many(["a"], DictSource({"a": torch.ones(whole)}))
    cache.clear()
    address = shard.data_ptr()
    loss = (torch.ones(whole, device=GPU, requires_grad=True) * shard).sum()
    del shard
    loss.backward()
    (successor,) = cache.get_many(["b"], DictSource({"b": filled(7)}))
    assert successor.data_ptr() == address
    assert cache.buffer_stats()["overflows"] == 0
