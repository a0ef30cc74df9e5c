"""The second GPU of a fake `torch.cuda`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu_cache.device.cuda import CudaDevice
from tests.support.cuda_devices import checked_device
from tests.support.fake_cuda import FakeCuda


@pytest.fixture
def gpu(cuda: FakeCuda, tmp_path: Path) -> Iterator[CudaDevice]:
    yield from checked_device(cuda, tmp_path)
