"""Assumptions about device memory and pinned host memory."""

from __future__ import annotations

import time

from gpu.findings import Assumption, Figures, about, at_most, exactly
from tests.support.gpu_scene import Rig

# Of the rig's MiB. Torch keeps more than the slack: that it loses it shows.
_ARENA, _KEPT_BY_TORCH, _SMALL, _SLACK = 256, 64, 4, 16
_NUM_SMALL = 8
_TORCHS_SEGMENT = 20  # kLargeBuffer: what torch takes for anything from 1 to 10 MiB
_PORTABLE = 1


def look_at_the_pool(rig: Rig) -> Figures:
    """Take an arena and give it back, beside memory that torch keeps for itself."""
    device, mib = rig.device, rig.mib
    device.release_arena(device.arena(_ARENA * mib))
    cached = rig.empty(_KEPT_BY_TORCH * mib)
    del cached
    before = rig.free_bytes()
    arena = device.arena(_ARENA * mib)
    taken = before - rig.free_bytes()
    arena.tensor.fill_(1)
    rig.synchronize()
    device.release_arena(arena)
    return {"MiB taken": taken / mib, "MiB not given back": (before - rig.free_bytes()) / mib}


def look_at_a_small_arena(rig: Rig) -> Figures:
    """What the driver is short of for an arena of 4 MiB."""
    device, nbytes = rig.device, _SMALL * rig.mib
    device.release_arena(device.arena(nbytes))
    before = rig.free_bytes()
    arenas = [device.arena(nbytes) for _ in range(_NUM_SMALL)]
    taken = before - rig.free_bytes()
    for arena in arenas:
        device.release_arena(arena)
    left = before - rig.free_bytes()
    return {"MiB each": taken / _NUM_SMALL / rig.mib, "MiB not given back": left / rig.mib}


def look_at_rounding(rig: Rig) -> Figures:
    """Pin one byte more than a power of two."""
    nbytes = _KEPT_BY_TORCH * rig.mib + 1
    pinned = rig.device.pinned(nbytes)
    found = {"bytes too many": len(pinned.view) - nbytes, "is pinned": rig.is_pinned(pinned.tensor)}
    rig.device.release_pinned(pinned)
    return found


def look_at_pinning(rig: Rig) -> Figures:
    """How long it takes to make a staging buffer, and to unmake it."""
    nbytes = _ARENA * rig.mib
    began = time.perf_counter()
    pinned = rig.device.pinned(nbytes)
    made = time.perf_counter()
    is_pinned, kept = rig.is_pinned(pinned.tensor), pinned.tensor
    rig.device.release_pinned(pinned)
    ended = time.perf_counter()
    scale = 2**30 / nbytes * 1e3
    return {
        "is pinned": is_pinned, "is pinned afterwards": rig.is_pinned(kept),
        "ms per GiB to make": (made - began) * scale, "ms per GiB to unmake": (ended - made) * scale,
    }  # fmt: skip


def look_at_sticky_errors(rig: Rig) -> Figures:
    """Register a buffer twice, by a raw call and by ours; see what the next kernel says."""
    device, nbytes = rig.device, rig.mib
    pinned = device.pinned(nbytes)
    address = pinned.tensor.data_ptr()
    with device._here():
        code = int(rig.cuda.cudart().cudaHostRegister(address, nbytes, _PORTABLE))
        raw = _next_kernel(rig)
        _next_kernel(rig)
        is_refused = not device._runtime.pin(address, nbytes)
        ours = _next_kernel(rig)
    device.release_pinned(pinned)
    return {"ours is refused": is_refused, "the kernel after ours": ours, "raw code": code, "the kernel after it": raw}


def _next_kernel(rig: Rig) -> str:
    try:
        rig.launch()
    except RuntimeError as error:
        return f"fails ({str(error).splitlines()[0]})"
    return "works"


_GIVEN_BACK = about(0, _SLACK)

# The slack is what a driver may take by the way, and what torch keeps is more than it; both were chosen, not measured.
# That an arena of 4 MiB takes torch's segment is torch's constant. Times are told and not judged: on an H100's machine
# a GiB took 47 ms to populate and 53 to register.
ASSUMPTIONS = [
    Assumption("pool memory", "goes back to the driver when its pool dies, without emptying torch's cache",
               look_at_the_pool, {"MiB taken": about(_ARENA, _SLACK), "MiB not given back": _GIVEN_BACK}),
    Assumption("small arena", "takes up to 20 MiB if it is over 1 MiB: torch's smallest such segment",
               look_at_a_small_arena,
               {"MiB each": at_most(_TORCHS_SEGMENT + _SLACK / _NUM_SMALL), "MiB not given back": _GIVEN_BACK}),
    Assumption("pinned rounding", "a byte over a power of two costs no second one, as with torch's", look_at_rounding,
               {"bytes too many": exactly(0), "is pinned": exactly(True)}),
    Assumption("pinning", "registering works, and is undone", look_at_pinning,
               {"is pinned": exactly(True), "is pinned afterwards": exactly(False)}),
    Assumption("sticky error", "fails the next kernel unless it is cleared, as ours is", look_at_sticky_errors,
               {"ours is refused": exactly(True), "the kernel after ours": exactly("works")}),
]  # fmt: skip
