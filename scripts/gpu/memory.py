"""Assumptions about device memory and pinned host memory."""

from __future__ import annotations

import time

import torch

from gpu.findings import Assumption
from gpu_cache.device import CudaDevice
from tests.support.gpu_scene import GPU, MIB, SLACK_BYTES, free_bytes, is_about

_ARENA_BYTES = 256 * MIB
_SMALL_BYTES = 4 * MIB
_TORCHS_SEGMENT_BYTES = 20 * MIB  # torch's kLargeBuffer: what it takes for anything from 1 to 10 MiB
_PORTABLE = 1


def look_at_the_pool() -> tuple[bool, str]:
    """Take an arena and give it back, beside memory that torch keeps for itself."""
    device = CudaDevice(0)
    device.release_arena(device.arena(_ARENA_BYTES))
    cached = torch.empty(64 * MIB, dtype=torch.uint8, device=GPU)
    del cached
    before, kept = free_bytes(), torch.cuda.memory_reserved(GPU)
    arena = device.arena(_ARENA_BYTES)
    taken = before - free_bytes()
    arena.tensor.fill_(1)
    torch.cuda.synchronize(GPU)
    device.release_arena(arena)
    left = before - free_bytes()
    is_ok = is_about(taken, _ARENA_BYTES) and is_about(left, 0) and torch.cuda.memory_reserved(GPU) == kept
    torchs = "keeps its own" if torch.cuda.memory_reserved(GPU) == kept else "has lost some"
    return is_ok, f"{taken / MIB:.0f} MiB taken, {left / MIB:.0f} MiB not given back; torch {torchs}"


def look_at_a_small_arena() -> tuple[bool, str]:
    """What the driver is short of for an arena of 4 MiB."""
    device = CudaDevice(0)
    device.release_arena(device.arena(_SMALL_BYTES))
    before = free_bytes()
    arenas = [device.arena(_SMALL_BYTES) for _ in range(8)]
    taken = (before - free_bytes()) / len(arenas)
    for arena in arenas:
        device.release_arena(arena)
    is_ok = taken <= _TORCHS_SEGMENT_BYTES + SLACK_BYTES / len(arenas)
    return is_ok, f"{taken / MIB:.1f} MiB each; {(before - free_bytes()) / MIB:.0f} MiB not given back"


def look_at_rounding() -> tuple[bool, str]:
    """Pin one byte more than a power of two, by torch and by ourselves."""
    nbytes = 64 * MIB + 1
    before = _torchs_pinned_bytes()
    theirs = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    rounded = _torchs_pinned_bytes() - before
    del theirs
    device = CudaDevice(0)
    ours = device.pinned(nbytes)
    is_ok = ours.is_pinned and ours.tensor.is_pinned() and len(ours.view) == nbytes
    device.release_pinned(ours)
    return is_ok, f"torch takes {rounded / MIB:.0f} MiB for 64 MiB and a byte; ours is pinned: {is_ok}"


def look_at_pinning() -> tuple[bool, str]:
    """How long it takes to make a staging buffer, and to unmake it."""
    device, nbytes = CudaDevice(0), _ARENA_BYTES
    began = time.perf_counter()
    pinned = device.pinned(nbytes)
    made = time.perf_counter()
    is_pinned, kept = pinned.tensor.is_pinned(), pinned.tensor
    device.release_pinned(pinned)
    ended = time.perf_counter()
    scale = 2**30 / nbytes * 1e3
    is_ok = is_pinned and not kept.is_pinned()
    return is_ok, f"ms per GiB: {(made - began) * scale:.0f} to make, {(ended - made) * scale:.0f} to unmake"


def look_at_sticky_errors() -> tuple[bool, str]:
    """Register a buffer twice, by a raw call and by ours; see what the next kernel says."""
    device = CudaDevice(0)
    pinned = device.pinned(MIB)
    address = pinned.tensor.data_ptr()
    with device._here():
        code = int(torch.cuda.cudart().cudaHostRegister(address, MIB, _PORTABLE))
        raw = _next_kernel()
        _next_kernel()
        is_refused = not device._runtime.pin(address, MIB)
        ours = _next_kernel()
    device.release_pinned(pinned)
    return is_refused and ours == "works", f"raw: code {code}, the next kernel {raw}; ours: refused, it {ours}"


def _next_kernel() -> str:
    try:
        float(torch.ones(4, device=GPU).sum())
    except RuntimeError as error:
        return f"fails ({str(error).splitlines()[0]})"
    return "works"


def _torchs_pinned_bytes() -> int:
    return int(torch.cuda.host_memory_stats().get("allocated_bytes.current", 0))


ASSUMPTIONS = [
    Assumption("pool memory", "goes back to the driver when its pool dies, without emptying torch's cache",
               look_at_the_pool),
    Assumption("small arena", "takes up to 20 MiB if it is over 1 MiB: torch's smallest such segment",
               look_at_a_small_arena),
    Assumption("pinned rounding", "torch's rounds up to a power of two (128 MiB), ours does not", look_at_rounding),
    Assumption("pinning", "registering works, and is undone", look_at_pinning),
    Assumption("sticky error", "fails the next kernel unless it is cleared, as ours is", look_at_sticky_errors),
]  # fmt: skip
