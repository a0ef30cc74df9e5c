"""Owners, servers and backends that tests of the data plane share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from gpu_cache import CacheConfig, TensorCache
from gpu_cache.device.host import HostDevice
from gpu_cache.rpc import runtime
from gpu_cache.rpc.client.http import HttpRTensorBackend
from gpu_cache.rpc.rtensor import set_backend
from gpu_cache.rpc.server import main as rpc_server
from gpu_cache.rpc.server.main import ServerHandle
from tests.support.areal_fixtures import fault_servers, nothing_forgotten, with_settings
from tests.support.fake_owner import FakeOwner
from tests.support.fault_server import FaultServer
from tests.support.users_backend import UsersBackend


@pytest.fixture
def serve() -> Iterator[Callable[..., FaultServer]]:
    """Start servers that follow a script."""
    with nothing_forgotten(), fault_servers() as start:
        yield start


@pytest.fixture
def owner() -> FakeOwner:
    """An owner that has no shard yet."""
    return FakeOwner()


@pytest.fixture
def server(owner: FakeOwner) -> Iterator[ServerHandle]:
    """The real server of `owner`."""
    with rpc_server.start(owner=owner) as server:
        yield server


@pytest.fixture
def backend() -> Iterator[HttpRTensorBackend]:
    """A backend that retries at once."""
    backend = with_settings(HttpRTensorBackend(), retry_pause_s=0.0)
    yield backend
    backend.close()


@pytest.fixture
def hasty_backend() -> Iterator[HttpRTensorBackend]:
    """This process's backend: it retries at once, and a clear waits 1 s at most."""
    backend = with_settings(HttpRTensorBackend(), retry_pause_s=0.0, delete_timeout_s=1.0)
    set_backend(backend)
    yield backend
    backend.close()


@pytest.fixture
def users_backend() -> Iterator[UsersBackend]:
    """This process's backend: it has the three methods that AReaL's protocol names, and no more."""
    backend = UsersBackend()
    set_backend(backend)
    yield backend
    set_backend(None)


@pytest.fixture(params=["into the pool", "through staging"])
def placed(request: pytest.FixtureRequest) -> None:
    """Receive shards straight into the pool's memory, or into staging buffers and copy them, as on a GPU."""
    runtime.configure(device="cpu")
    if request.param == "through staging":
        config = CacheConfig(staging_slots=2, staging_slot_bytes="4MiB", run_bytes="1MiB")
        runtime.current().cache = TensorCache(config, device=HostDevice(stages=True))
