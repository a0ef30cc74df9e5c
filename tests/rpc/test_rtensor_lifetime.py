"""Tensors that were handed out: whose storage they have, and that nothing takes it from them."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_cache.rpc import runtime
from gpu_cache.rpc.rtensor import RTensor, buffer_stats, clear_fetch_buffer
from gpu_cache.rpc.server import main as rpc_server
from gpu_cache.rpc.server.main import ServerHandle
from tests.support.areal_fixtures import remote
from tests.support.fake_owner import FakeOwner
from tests.support.sources import same_bytes

LENGTH = 10_000


@pytest.fixture
def owner() -> FakeOwner:
    owner = FakeOwner()
    for number in range(40):
        owner.store[f"s{number}"] = torch.full((LENGTH,), float(number))
    return owner


@pytest.fixture
def server(owner: FakeOwner) -> Iterator[ServerHandle]:
    """Read through a pool that soon uses its bytes again."""
    runtime.configure(device="cpu", slab_bytes="400KiB", pool_bytes="400KiB")
    with rpc_server.start(owner=owner) as server:
        yield server


def shard(server: ServerHandle, number: int) -> RTensor:
    return remote(server.address, f"s{number}", torch.empty(LENGTH))


def device_bytes() -> int:
    gc.collect()
    runtime.current().cache.synchronize()
    return buffer_stats()["device_bytes"]


def with_gradient(tensor: torch.Tensor) -> torch.Tensor:
    """A graph that keeps the tensor for its backward pass."""
    return (torch.ones(LENGTH, requires_grad=True) * tensor).sum()


def gradient(loss: torch.Tensor) -> torch.Tensor:
    assert loss.grad_fn is not None
    (leaf, _) = loss.grad_fn.next_functions[0][0].next_functions
    loss.backward(retain_graph=True)
    grad = leaf[0].variable.grad
    assert grad is not None
    return grad


KEEPERS: dict[str, tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]] = {
    "tensor": (lambda tensor: tensor, lambda kept: kept),
    "view": (lambda tensor: tensor[100:200].view(10, 10).t(), lambda kept: kept),
    "closure": (lambda tensor: lambda: tensor * 1, lambda kept: kept()),
    "autograd graph": (with_gradient, gradient),
    "numpy array": (lambda tensor: tensor.numpy()[50:], torch.from_numpy),
    "storage": (lambda tensor: tensor.untyped_storage(), lambda kept: torch.tensor([]).set_(kept)),
    "parameter": (torch.nn.Parameter, lambda kept: kept.detach()),
}


@pytest.mark.parametrize(("keep", "read"), KEEPERS.values(), ids=KEEPERS.keys())
def test_a_kept_alias_keeps_its_bytes_until_it_dies(
    server: ServerHandle, keep: Callable[[torch.Tensor], Any], read: Callable[[Any], torch.Tensor]
) -> None:
    kept = keep(shard(server, 7).to_local())
    asyncio.run(RTensor.clear_node(server.address, ["s7"]))
    assert device_bytes() == 40_448  # 40,000, in units of 512
    for first in (10, 20, 30):  # more than the pool has room for beside it
        RTensor.localize([shard(server, number) for number in range(first, first + 10)])
    assert bool((read(kept) == 7).all())
    clear_fetch_buffer()
    assert device_bytes() == 40_448
    del kept
    assert device_bytes() == 0


def test_a_handle_that_was_filled_keeps_its_bytes_too(server: ServerHandle) -> None:
    handle = shard(server, 3)
    handle.to_local()
    asyncio.run(RTensor.clear_node(server.address, ["s3"]))
    assert same_bytes(handle.to_local(), torch.full((LENGTH,), 3.0))
    del handle
    assert device_bytes() == 0


def test_a_tensor_has_a_storage_of_its_own(server: ServerHandle, tmp_path: Path) -> None:
    tensor = RTensor.localize([shard(server, number) for number in range(5)])[2]
    assert tensor.untyped_storage().nbytes() == tensor.nbytes == 4 * LENGTH
    assert tensor.storage_offset() == 0
    torch.save(tensor, tmp_path / "shard.pt")
    assert 4 * LENGTH < (tmp_path / "shard.pt").stat().st_size < 4 * LENGTH + 4096
    assert same_bytes(torch.load(tmp_path / "shard.pt"), tensor)
    with pytest.raises(RuntimeError, match="resize"):
        tensor.resize_(2 * LENGTH)


def test_a_shard_first_read_in_inference_mode_can_be_trained_on(server: ServerHandle) -> None:
    with torch.inference_mode():
        first = shard(server, 5).to_local()
        assert float(first.sum()) == 5 * LENGTH
    second = shard(server, 5).to_local()
    assert second.data_ptr() == first.data_ptr()
    for tensor in (first, second):
        weight = torch.ones(LENGTH, requires_grad=True)
        (weight * tensor).sum().backward()
        assert weight.grad is not None
        assert same_bytes(weight.grad, tensor)
        assert not tensor.is_inference()


def test_autograd_sees_writes_in_training(server: ServerHandle) -> None:
    tensor = shard(server, 5).to_local()
    loss = with_gradient(tensor)
    tensor.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_handle_keeps_no_tensor_that_a_caller_took_out_of_it() -> None:
    tensor = torch.ones(3)
    handle, alive = remote("me:1", "a", tensor), weakref.ref(tensor)
    handle.data = tensor
    assert handle.promise[1] == (3,)
    handle.data = torch.ones(3, device="meta")
    del tensor
    assert alive() is None
