"""This process's backend, an owner that it knows, and owners in other processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gpu_cache.rpc import runtime
from gpu_cache.rpc.client.http import HttpRTensorBackend
from gpu_cache.rpc.rtensor import TensorShardInfo, set_backend
from gpu_cache.rpc.server.main import ServerHandle
from tests.support.fake_owner import FakeOwner
from tests.support.same_host_process import Nursery, nursery


@pytest.fixture(autouse=True)
def on_the_host() -> None:
    runtime.configure(device="cpu", staging_slots=2, staging_slot_bytes="1MiB", run_bytes="512KiB")


@pytest.fixture
def shared() -> Iterator[HttpRTensorBackend]:
    """This process's backend."""
    backend = HttpRTensorBackend(same_host=True)
    set_backend(backend)
    yield backend
    backend.close()
    assert backend.memories is not None
    assert backend.memories.stats() == {"owners": 0, "segments": 0, "mapped_bytes": 0}


@pytest.fixture(scope="module")
def processes() -> Iterator[Nursery]:
    with nursery() as made:
        yield made


@pytest.fixture
def known(owner: FakeOwner, server: ServerHandle, shared: HttpRTensorBackend) -> str:
    """The address of an owner whose socket the backend knows."""
    owner.put({"first": torch.ones(1)})
    shared.fetch([TensorShardInfo("first", server.address)])
    return server.address
