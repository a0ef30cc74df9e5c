"""A real Ray on this machine: started for the tests of a module, and looked at after each of them."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
STORE_BYTES = 512 << 20
PATIENCE_S = 20.0
# Ray's workers import this project from the checkout. Ray writes no token into the home of whoever runs the tests, and
# tells nobody of its use.
os.environ |= {
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_prestart_worker_first_driver": "0",  # workers that no test asks for
    "RAY_raylet_start_wait_time_s": "120",  # a busy machine exceeds what Ray gives a node to start
}


def started() -> Any:
    """Start a Ray of this process, without a dashboard, and return its module."""
    ray = pytest.importorskip("ray", reason="needs Ray: make ray")
    for is_last in (False, True):
        try:
            ray.init(
                address="local", num_cpus=2, include_dashboard=False, object_store_memory=STORE_BYTES,
                log_to_driver=False, logging_level="ERROR",
            )  # fmt: skip
            break
        except Exception as error:
            if is_last or "timed out during startup" not in str(error):
                raise
            ray.shutdown()
    return ray


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A Ray of one node."""
    found = started()
    yield found
    found.shutdown()


@pytest.fixture
def used_bytes(ray: Any) -> Callable[[], float]:
    """Bytes of objects that the node's store has to keep."""

    def used() -> float:
        return float(ray.cluster_resources()["object_store_memory"] - ray.available_resources()["object_store_memory"])

    return used


@pytest.fixture
def nothing_stored(used_bytes: Callable[[], float]) -> Callable[[], None]:
    """Wait until the store has nothing to keep; the raylet reports every 100 ms or so."""

    def check() -> None:
        gc.collect()  # errors that tests caught, and the handles in their frames
        deadline = time.monotonic() + PATIENCE_S
        while (left := used_bytes()) > 0:
            assert time.monotonic() < deadline, f"{left:,.0f} bytes stay in the object store"
            time.sleep(0.05)

    return check


@pytest.fixture
def stored(used_bytes: Callable[[], float]) -> Callable[[int], None]:
    """Wait until the store has to keep at least so many bytes."""

    def check(nbytes: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while (found := used_bytes()) < nbytes:
            assert time.monotonic() < deadline, f"{found:,.0f} bytes in the object store, of {nbytes:,}"
            time.sleep(0.05)

    return check
