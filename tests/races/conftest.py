"""Stages on which tests stop threads, and heaps and logs that stay quiet meanwhile."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from gpu_cache import reaper
from gpu_cache.device.host import HostDevice
from tests.support.interleave_stage import Stage
from tests.support.sim_program import few_objects


@pytest.fixture(scope="module")
def quick_collections() -> Iterator[None]:
    """Collect garbage only where a test asks for it."""
    with few_objects():
        yield


@pytest.fixture(scope="module")
def quiet_simulation() -> Iterator[None]:
    """Log no warning and no error of small pools and broken caches; run no reaper and no collection unasked."""
    logging.disable(logging.ERROR)
    with pytest.MonkeyPatch.context() as patched, few_objects():
        patched.setattr(reaper, "PERIOD_S", 3600.0)  # the reaper would look between two looks of a test
        yield
    logging.disable(logging.NOTSET)


@pytest.fixture(params=["direct", "staged"])
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    """A cache whose fetches stop at gates, on a device that stages or does not."""
    made = Stage(HostDevice(stages=request.param == "staged"))
    yield made
    made.open_gates()
    made.check_nothing_lost()
