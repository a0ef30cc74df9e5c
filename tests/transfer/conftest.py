"""Caches with a host tier, and the shards that fill them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu_cache import TensorCache
from tests.support.sources import DictSource
from tests.support.tier_scene import CONFIG, KINDS, SHARDS, cache_on


@pytest.fixture
def source() -> DictSource:
    return DictSource(SHARDS)


@pytest.fixture(params=KINDS)
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TensorCache]:
    """A cache with a host tier, on each kind of device."""
    yield from cache_on(request.param, tmp_path, CONFIG)
