"""A cache on each kind of device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu_cache import TensorCache
from tests.support.mutation_scene import CONFIG
from tests.support.tier_scene import cache_on


@pytest.fixture(params=["host", "staged host", "fake cuda"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TensorCache]:
    """A cache of 8 MiB on each kind of device."""
    yield from cache_on(request.param, tmp_path, CONFIG)
