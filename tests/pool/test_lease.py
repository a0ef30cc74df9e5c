from __future__ import annotations

import gc
import threading
from collections import deque
from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from gpu_cache.device.modes import plain_tensors
from gpu_cache.pool.lease import AliasCounter, Lease, aliases_of, carve, lease_fault


def carved(
    arena: torch.Tensor, offset: int, nbytes: int, template: torch.Tensor, shape: tuple[int, ...], freed: deque[Lease]
) -> tuple[torch.Tensor, Lease]:
    """One tensor of a block, and its lease."""
    base, _, lease = carve(arena.untyped_storage(), offset, nbytes, template, shape, freed.append)
    return base, lease


class Block:
    """One block of 64 floats in the middle of an arena, and where its lease goes."""

    def __init__(self) -> None:
        self.arena = torch.zeros(4096, dtype=torch.uint8)
        self.freed: deque[Lease] = deque()
        with plain_tensors():
            base, self.lease = carved(self.arena, 512, 256, torch.empty(0), (8, 8), self.freed)
        base.copy_(torch.arange(64.0).reshape(8, 8))
        self.base: torch.Tensor | None = base

    def hand_out(self) -> torch.Tensor:
        """The only alias: the index has dropped its own."""
        assert self.base is not None
        (alias,) = aliases_of([self.base])
        self.base = None
        return alias

    @property
    def is_freed(self) -> bool:
        return list(self.freed) == [self.lease]


def test_this_torch_is_sound() -> None:
    assert lease_fault() == ""


def test_a_block_is_a_tensor_of_its_own() -> None:
    block = Block()
    tensor = block.hand_out()
    assert tensor.data_ptr() == block.arena.data_ptr() + 512
    assert (tensor.shape, tensor.stride(), tensor.storage_offset()) == ((8, 8), (8, 1), 0)
    assert tensor.untyped_storage().nbytes() == 256
    with pytest.raises(RuntimeError, match="resiz"):
        tensor.resize_(4096)


def test_neighbours_have_version_counters_of_their_own() -> None:
    arena, freed = torch.zeros(1024, dtype=torch.uint8), deque[Lease]()
    with plain_tensors():
        left, _lease = carved(arena, 0, 512, arena, (512,), freed)
        right, _lease_too = carved(arena, 512, 512, arena, (512,), freed)
    before = (left._version, right._version)
    left.fill_(1)
    assert (left._version, right._version) == (before[0] + 1, before[1])


def test_a_lease_fires_with_its_only_alias() -> None:
    block = Block()
    tensor = block.hand_out()
    assert not block.is_freed
    del tensor
    assert block.is_freed


def keep_view(tensor: torch.Tensor) -> object:
    return tensor[1:].t()


def keep_graph(tensor: torch.Tensor) -> object:
    weight = torch.ones(8, 8, requires_grad=True)
    return (weight * tensor).sum()


def keep_checkpoint(tensor: torch.Tensor) -> object:
    weight = torch.ones(8, 8, requires_grad=True)
    return checkpoint(lambda t: (weight * t).sum(), tensor, use_reentrant=False)


def keep_closure(tensor: torch.Tensor) -> object:
    return lambda: tensor.sum()


def keep_parameter(tensor: torch.Tensor) -> object:
    return torch.nn.Parameter(tensor)


def keep_under_inference(tensor: torch.Tensor) -> object:
    with torch.inference_mode():
        return tensor[2:]


KEEPERS: list[Callable[[torch.Tensor], object]] = [
    keep_view,
    keep_graph,
    keep_checkpoint,
    keep_closure,
    keep_parameter,
    keep_under_inference,
    lambda tensor: tensor.numpy(),
    lambda tensor: memoryview(tensor.numpy()),
    lambda tensor: torch.from_dlpack(tensor),
    lambda tensor: torch.utils.dlpack.to_dlpack(tensor),
    lambda tensor: tensor.untyped_storage(),
    lambda tensor: tensor.view(torch.uint8),
    lambda tensor: tensor.data,
    lambda tensor: torch.view_as_complex(tensor.reshape(8, 4, 2)),
    lambda tensor: tensor.unbind(),
    lambda tensor: torch.vmap(lambda row: row.expand(3, 8))(tensor),
    lambda tensor: torch.nn.utils.rnn.PackedSequence(tensor, torch.ones(8, dtype=torch.int64)),
    lambda tensor: {"nested": [tensor]},
    lambda tensor: torch.as_strided(tensor, (3,), (2,)),
    lambda tensor: tensor.detach().requires_grad_(),
]


@pytest.mark.parametrize("keep", KEEPERS)
def test_a_lease_waits_for_every_kind_of_alias(keep: Callable[[torch.Tensor], object]) -> None:
    block = Block()
    kept = keep(block.hand_out())
    gc.collect()
    assert not block.is_freed
    del kept
    gc.collect()
    assert block.is_freed


def test_a_storage_in_dead_cyclic_garbage_frees_nothing_while_a_view_lives() -> None:
    block = Block()
    tensor = block.hand_out()
    cycle: dict[str, object] = {"storage": tensor.untyped_storage(), "tensor": tensor}
    cycle["self"] = cycle
    view = tensor[1:]
    del tensor, cycle
    gc.collect()
    assert not block.is_freed
    assert torch.equal(view, torch.arange(64.0).reshape(8, 8)[1:])
    del view
    assert block.is_freed


def test_backward_frees_its_saved_tensors() -> None:
    block = Block()
    weight = torch.ones(8, 8, requires_grad=True)
    loss = (weight * block.hand_out()).sum()
    assert not block.is_freed
    loss.backward()
    assert block.is_freed
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.arange(64.0).reshape(8, 8))


def test_a_lease_may_fire_on_another_thread() -> None:
    block = Block()
    kept = [block.hand_out()]
    thread = threading.Thread(target=kept.clear)
    thread.start()
    thread.join()
    assert block.is_freed


def test_blocks_are_plain_in_every_autograd_mode() -> None:
    with torch.inference_mode():
        block = Block()
        (first,) = aliases_of([block.base])  # type: ignore[list-item]
    with FakeTensorMode():
        second = block.hand_out()
    assert type(second) is torch.Tensor
    assert not first.is_inference()
    weight = torch.ones(8, 8, requires_grad=True)
    (weight * first * second).sum().backward()


def test_a_scalar_and_a_single_byte_are_blocks_too() -> None:
    arena, freed = torch.zeros(1024, dtype=torch.uint8), deque[Lease]()
    with plain_tensors():
        scalar, scalar_lease = carved(arena, 0, 8, torch.empty(0, dtype=torch.float64), (), freed)
        byte, byte_lease = carved(arena, 512, 1, torch.empty(0, dtype=torch.bool), (1, 1), freed)
    assert (scalar.shape, byte.shape) == ((), (1, 1))
    del scalar, byte
    assert list(freed) == [scalar_lease, byte_lease]


def test_a_length_may_be_true_which_is_one() -> None:
    arena, freed = torch.zeros(1024, dtype=torch.uint8), deque[Lease]()
    with plain_tensors():
        first, _lease = carved(arena, 0, 17, arena, (True, 17), freed)
        other, _lease_too = carved(arena, 512, 17, arena, (1, 17), freed)
    assert first.shape == other.shape == (1, 17)


def test_the_counter_tells_whether_a_block_is_held() -> None:
    counter, block = AliasCounter(), Block()
    assert block.base is not None
    assert not counter.is_held(block.base)
    view = block.base.detach()[1:]
    assert counter.is_held(block.base)
    del view
    assert not counter.is_held(block.base)
    array = block.base.detach().numpy()
    assert counter.is_held(block.base)
    del array


def test_without_a_use_count_nothing_counts_as_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_storage_Use_Count")
    block = Block()
    alias = block.base
    assert alias is not None
    assert not AliasCounter().is_held(alias)
