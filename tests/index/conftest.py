"""A cache on each kind of device, and three shards to write into."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gpu_cache import TensorCache
from gpu_cache.device.host import HostDevice
from tests.support.mutation_scene import CONFIG
from tests.support.sources import DictSource
from tests.support.tier_scene import cache_on


@pytest.fixture(params=["host", "staged host", "fake cuda"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TensorCache]:
    """A cache of 8 MiB on each kind of device."""
    yield from cache_on(request.param, tmp_path, CONFIG)


@pytest.fixture
def plain() -> TensorCache:
    """A cache for tests to which the device makes no difference."""
    return TensorCache(CONFIG, device=HostDevice())


@pytest.fixture
def source() -> DictSource:
    return DictSource({name: torch.randn(100) for name in "abc"})
