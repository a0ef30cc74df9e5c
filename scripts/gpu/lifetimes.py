"""Assumptions about the lives of tensors in device memory."""

from __future__ import annotations

import gc
import math
import threading
from collections import deque

import torch

from gpu.findings import Assumption
from gpu_cache.device import Arena, CudaDevice
from gpu_cache.lease import Lease, carve, plain_tensors
from tests.support.gpu_scene import GPU, MIB

_NUM_FLOATS = 1024


class Watched(deque[Lease]):
    """Where a lease fires to; remembers on which threads."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: list[int] = []

    def append(self, lease: Lease) -> None:
        self.threads.append(threading.get_ident())
        super().append(lease)


def carved(arena: Arena, dtype: torch.dtype, shape: tuple[int, ...], fired: deque[Lease]) -> tuple[torch.Tensor, Lease]:
    """A block of an arena, 4,096 bytes from its beginning, as the pool carves it."""
    with plain_tensors():
        template = torch.empty(0, dtype=dtype, device=arena.tensor.device)
        nbytes = dtype.itemsize * math.prod(shape)
        return carve(arena.tensor.untyped_storage(), 4096, nbytes, template, shape, fired)


def _block(arena: Arena, fired: Watched) -> tuple[torch.Tensor, Lease]:
    block, lease = carved(arena, torch.float32, (_NUM_FLOATS,), fired)
    block.fill_(2)
    return block, lease


def look_at_the_hook() -> tuple[bool, str]:
    """Keep a block by a view, by dead cyclic garbage, and by a graph; see when and where its lease fires."""
    device = CudaDevice(0)
    arena, when = device.arena(MIB), []
    fired = Watched()
    block, lease = _block(arena, fired)
    cycle: list[object] = [block.untyped_storage(), block]
    cycle.append(cycle)
    view = block[1:]
    del block, cycle
    gc.collect()
    when.append(len(fired))
    del view
    when.append(len(fired))

    block, saved_lease = _block(arena, fired)
    weight = torch.ones(_NUM_FLOATS, device=GPU, requires_grad=True)
    loss = (weight * block).sum()
    del block
    when.append(len(fired))
    loss.backward()
    when.append(len(fired))
    torch.cuda.synchronize(GPU)
    device.release_arena(arena)
    is_elsewhere = len(fired.threads) == 2 and fired.threads[1] != threading.get_ident()
    is_ok = when == [0, 1, 1, 2] and is_elsewhere and list(fired) == [lease, saved_lease]
    place = "another thread" if is_elsewhere else "this thread"
    return is_ok, f"fired {when} times after each step, the last one on {place}"


def look_at_the_block() -> tuple[bool, str]:
    """Where a block lies, and whether it can grow."""
    device = CudaDevice(0)
    arena, fired = device.arena(MIB), Watched()
    block, lease = _block(arena, fired)
    facts = {
        "arena at a multiple of 512": arena.tensor.data_ptr() % 512 == 0,
        "block at its offset": block.data_ptr() == arena.tensor.data_ptr() + 4096,
        "storage of its own": (block.untyped_storage().nbytes(), block.storage_offset()) == (4 * _NUM_FLOATS, 0),
        "resize refused": _refuses_to_grow(block),
    }
    del block
    facts["lease fired"] = list(fired) == [lease]
    torch.cuda.synchronize(GPU)
    device.release_arena(arena)
    wrong = [name for name, is_so in facts.items() if not is_so]
    return not wrong, f"not so: {', '.join(wrong)}" if wrong else ", ".join(facts)


def _refuses_to_grow(block: torch.Tensor) -> bool:
    try:
        block.resize_(2 * _NUM_FLOATS)
    except RuntimeError:
        return True
    return False


ASSUMPTIONS = [
    Assumption(
        "lifetime hook",
        "fires with the last alias, not before; when backward frees it, on the autograd thread ([0, 1, 1, 2])",
        look_at_the_hook,
    ),
    Assumption("block layout", "aligned to 512 bytes, its own storage, no resize", look_at_the_block),
]
