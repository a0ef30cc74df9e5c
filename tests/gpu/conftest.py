"""The GPU that tests use; a failed test does not fail the next."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Iterator

import pytest
import torch

from gpu_cache.device.cuda import CudaDevice
from tests.support.gpu_scene import GPU


@pytest.fixture
def failures_stay_alone() -> Iterator[None]:
    """Keep a test that fails from failing those after it.

    The frames of its traceback hold tensors, these a cache's memory and thread, which every later test would find.
    """
    for thread in threading.enumerate():
        if thread.name.startswith("gpu-cache-"):
            thread.name = f"left by a test before: {thread.name}"
    yield
    error: BaseException | None = getattr(sys, "last_value", None)
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        for frame, _ in traceback.walk_tb(error.__traceback__):
            assert frame.f_locals is not None  # a look at the dict brings it up to date, up to Python 3.12
        error = error.__cause__ or error.__context__


@pytest.fixture
def device() -> CudaDevice:
    torch.cuda.init()
    return CudaDevice(GPU.index)
