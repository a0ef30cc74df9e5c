"""Assumptions about the lives of tensors in device memory."""

from __future__ import annotations

import gc
import math
import threading
from collections import deque

import torch

from gpu.findings import Assumption, Figures, exactly
from gpu_cache.device.modes import plain_tensors
from gpu_cache.device.protocol import Arena
from gpu_cache.pool.lease import Lease, carve
from tests.support.gpu_scene import MIB, Rig

_NUM_FLOATS = 1024
_AUTOGRADS = "another thread"


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
        base, _, lease = carve(arena.tensor.untyped_storage(), 4096, nbytes, template, shape, fired.append)
        return base, lease


def _block(arena: Arena, fired: Watched) -> tuple[torch.Tensor, Lease]:
    block, lease = carved(arena, torch.float32, (_NUM_FLOATS,), fired)
    block.fill_(2)
    return block, lease


def look_at_the_hook(rig: Rig) -> Figures:
    """Keep a block by a view, by dead cyclic garbage, and by a graph; see when and where its lease fires."""
    arena, fired = rig.device.arena(MIB), Watched()
    when: list[int] = []
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
    weight = torch.ones(_NUM_FLOATS, device=rig.where, requires_grad=True)
    loss = (weight * block).sum()
    del block
    when.append(len(fired))
    loss.backward()
    when.append(len(fired))
    rig.synchronize()
    rig.device.release_arena(arena)
    is_elsewhere = len(fired.threads) == 2 and fired.threads[1] != threading.get_ident()
    return {
        "fired after each step": when,
        "the last one on": _AUTOGRADS if is_elsewhere else "this thread",
        "fires in order": list(fired) == [lease, saved_lease],
    }


def look_at_the_block(rig: Rig) -> Figures:
    """Where a block lies, and whether it can grow."""
    arena, fired = rig.device.arena(MIB), Watched()
    block, lease = _block(arena, fired)
    found = {
        "arena at a multiple of 512": arena.tensor.data_ptr() % 512 == 0,
        "block at its offset": block.data_ptr() == arena.tensor.data_ptr() + 4096,
        "storage of its own": (block.untyped_storage().nbytes(), block.storage_offset()) == (4 * _NUM_FLOATS, 0),
        "resize refused": _refuses_to_grow(block),
    }
    del block
    found["lease fired"] = list(fired) == [lease]
    rig.synchronize()
    rig.device.release_arena(arena)
    return found


def _refuses_to_grow(block: torch.Tensor) -> bool:
    try:
        block.resize_(2 * _NUM_FLOATS)
    except RuntimeError:
        return True
    return False


# Source: an H100 80GB HBM3, torch 2.11: leases fire with the last alias; backward frees on the autograd thread.
ASSUMPTIONS = [
    Assumption(
        "lifetime hook",
        "fires with the last alias, not before",
        look_at_the_hook,
        {
            "fired after each step": exactly([0, 1, 1, 2]),
            "the last one on": exactly(_AUTOGRADS),
            "fires in order": exactly(True),
        },
    ),
    Assumption(
        "block layout",
        "aligned to 512 bytes, its own storage, no resize",
        look_at_the_block,
        dict.fromkeys(
            (
                "arena at a multiple of 512",
                "block at its offset",
                "storage of its own",
                "resize refused",
                "lease fired",
            ),
            exactly(True),
        ),
    ),
]
