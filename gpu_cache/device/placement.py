"""The choice of the device that this process's cache uses."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gpu_cache.device.cuda import CudaDevice, torch_cuda
from gpu_cache.device.cudart import has_context
from gpu_cache.device.host import HostDevice
from gpu_cache.device.private_pools import is_memory_tracked
from gpu_cache.device.protocol import Device


@dataclass(frozen=True, slots=True)
class Placement:
    """A device, why it was chosen, and whether that still holds once this process initialises CUDA."""

    device: Device
    reason: str
    is_final: bool = True


def group_device() -> torch.device | None:
    """The device that the default process group is bound to, if there is one."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    return getattr(distributed.group.WORLD, "bound_device_id", None)


def choose_device(
    setting: str = "auto",
    *,
    cuda: Any = torch_cuda,
    environ: Mapping[str, str] = os.environ,
    bound_device: Callable[[], torch.device | None] = group_device,
    has_context: Callable[[int], bool] = has_context,
) -> Placement:
    """Turn the setting `device` into a device.

    "auto" never initialises CUDA: a controller on a GPU node must not take GPU memory by importing us. It means the
    host until the process has initialised CUDA by itself. `is_final` is False then: choose again while the cache is
    empty. It means the host under torch_memory_saver too, which unmaps device memory while requests still arrive.

    Args:
        setting: "auto", "cpu", "cuda" or "cuda:N".
        cuda: Torch's CUDA module.
        environ: Where LOCAL_RANK and TMS_INIT_ENABLE are looked up.
        bound_device: Asks for the device of the default process group.
        has_context: Asks whether this process uses a CUDA device already.
    Raises:
        ValueError: Not such a setting, or no such device.
        RuntimeError: There is no CUDA, or nothing tells which of several devices is this process's.
    """
    match = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", setting)
    if match is None:
        raise ValueError(f"device={setting!r}: use 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if setting == "cpu":
        return Placement(HostDevice(), "device='cpu'")
    if setting == "auto":
        if is_memory_tracked(environ):
            return Placement(HostDevice(), "torch_memory_saver may unmap device memory at any time (TMS_INIT_ENABLE)")
        if not cuda.is_initialized():
            return Placement(HostDevice(), "this process has not initialised CUDA", is_final=False)
    elif not cuda.is_available():
        raise RuntimeError(
            f"device={setting!r}, but CUDA is not available here; use 'auto' or 'cpu' (GPU_CACHE_DEVICE)"
        )
    if match[1] is None:
        index, reason = _which(setting, cuda, environ, bound_device, has_context)
    else:
        index, reason = int(match[1]), f"device={setting!r}"
    if index >= cuda.device_count():
        raise ValueError(f"cuda:{index} ({reason}): only {cuda.device_count()} CUDA devices are visible")
    return Placement(CudaDevice(index, cuda), reason)


def _which(
    setting: str,
    cuda: Any,
    environ: Mapping[str, str],
    bound_device: Callable[[], torch.device | None],
    has_context: Callable[[int], bool],
) -> tuple[int, str]:
    """This process's CUDA device, and how that is known. Not the current one: in a request thread that is device 0."""
    bound = bound_device()
    if bound is not None and bound.type == "cuda" and bound.index is not None:
        return bound.index, "the device of the process group"
    count = cuda.device_count()
    if count == 1:
        return 0, "the only visible device"
    local_rank = environ.get("LOCAL_RANK", "")
    if local_rank.isdecimal() and int(local_rank) < count:
        return int(local_rank), f"LOCAL_RANK={local_rank}"
    used = [index for index in range(count) if has_context(index)] if cuda.is_initialized() else []
    if len(used) == 1:
        return used[0], "the only device that this process uses"
    raise RuntimeError(
        f"device={setting!r}: {count} CUDA devices are visible, this process uses {len(used)} of them, and neither a "
        f"process group nor LOCAL_RANK ({local_rank or 'not set'}) tells which one is its own; set device='cuda:N' "
        "(GPU_CACHE_DEVICE)"
    )
