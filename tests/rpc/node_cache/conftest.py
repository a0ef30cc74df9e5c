"""A node cache, an owner on another host, and consumers."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu_cache.rpc import runtime
from gpu_cache.rpc.client.http import HttpRTensorBackend
from gpu_cache.rpc.node_cache import Running
from gpu_cache.rpc.rtensor import set_backend
from tests.support.fake_owner import FakeOwner
from tests.support.interleave_stage import eventually
from tests.support.node_caches import Consumer, serve_remote


@pytest.fixture
def address(owner: FakeOwner, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with serve_remote(monkeypatch, owner) as server:
        yield server.address


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "node-cache"


@pytest.fixture
def running(path: Path) -> Iterator[Running]:
    with Running(path, 64 << 20) as running:
        yield running
    gc.collect()
    eventually(lambda: running.cache.segments.stats()["shared_bytes"] == 0)


@pytest.fixture
def consumers(path: Path) -> Iterator[list[Consumer]]:
    made = [Consumer(path) for _ in range(3)]
    yield made
    for one in made:
        one.backend.close()
        assert one.backend.memories is not None
        assert one.backend.memories.stats() == {"owners": 0, "segments": 0, "mapped_bytes": 0}


@pytest.fixture
def local(path: Path) -> Iterator[HttpRTensorBackend]:
    """This process's backend."""
    runtime.configure(device="cpu")
    backend = HttpRTensorBackend(same_host=True, node_cache=str(path))
    set_backend(backend)
    yield backend
    backend.close()
