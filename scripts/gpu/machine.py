"""Which machine and which software this is."""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
from pathlib import Path
from typing import Any

import torch

import gpu_cache

_DRIVER = Path("/proc/driver/nvidia/version")


def versions() -> dict[str, str]:
    """What a bug report must say, by name; needs a CUDA device."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu_cache": gpu_cache.__version__,
        "GPU": f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, {torch.cuda.device_count()} visible",
        "compute capability": f"{properties.major}.{properties.minor}",
        "driver": driver_version(),
        "CUDA of torch": str(torch.version.cuda),
        "torch": torch.__version__,
        "allocator": f"{torch.cuda.get_allocator_backend()} {os.environ.get('PYTORCH_CUDA_ALLOC_CONF', '')}".strip(),
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}, {os.cpu_count()} CPUs",
    }


def driver_version() -> str:
    """Of NVIDIA's kernel driver, "unknown" where nothing tells."""
    with contextlib.suppress(ImportError):
        nvml: Any = importlib.import_module("pynvml")
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlInit()
            return str(nvml.nvmlSystemGetDriverVersion())
    return _DRIVER.read_text().splitlines()[0] if _DRIVER.exists() else "unknown"
