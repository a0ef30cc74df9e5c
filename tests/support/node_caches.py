"""Processes of a host that read by way of a node cache, and owners on another host."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_cache.rpc.client.http import HttpRTensorBackend, SameHostReader, drained
from gpu_cache.rpc.node_cache import Running
from gpu_cache.rpc.rtensor import TensorShardInfo
from gpu_cache.rpc.server import main as rpc_server
from gpu_cache.rpc.server.main import ServerHandle
from gpu_cache.rpc.shard import ShardMissingError
from tests.support.fake_owner import FakeOwner
from tests.support.reading import promises_of
from tests.support.wire_tensors import patterned, same_bits


def serve_remote(monkeypatch: pytest.MonkeyPatch, owner: FakeOwner, port: int = 0) -> ServerHandle:
    """The owner's server as of another host: it announces no memory."""
    with monkeypatch.context() as patch:
        patch.setenv("GPU_CACHE_SHM", "0")
        return rpc_server.start(owner=owner, port=port)


class Consumer:
    """A process of the host, with a backend of its own and no cache."""

    def __init__(self, path: Path) -> None:
        self.backend = HttpRTensorBackend(same_host=True, node_cache=str(path))
        self.transport = ""

    def reader(self, address: str, tensors: Mapping[str, torch.Tensor], timeout_s: float = 30.0) -> SameHostReader:
        shards = {key: TensorShardInfo(key, address) for key in tensors}
        (reader,) = self.backend.source(shards, promises_of(tensors, address)).open(list(tensors), timeout_s)  # type: ignore[arg-type]
        assert isinstance(reader, SameHostReader)
        return reader

    def read(self, address: str, tensors: Mapping[str, torch.Tensor], timeout_s: float = 30.0) -> None:
        """Fetch shards and look at every bit."""
        reader = self.reader(address, tensors, timeout_s)
        found = drained(reader)
        self.transport = reader.transport
        assert found.keys() == tensors.keys()
        assert all(same_bits(found[key], one) for key, one in tensors.items())


def batch(number: int = 6, seed: int = 0, nbytes: int = 5000) -> dict[str, torch.Tensor]:
    return {f"s{seed}-{one}": patterned(torch.uint8, nbytes, seed=seed + one) for one in range(number)}


def sent(monkeypatch: pytest.MonkeyPatch, owner: FakeOwner) -> list[str]:
    """The ids of all shards that the owner sends from now on."""
    ids: list[str] = []
    real = owner.store.get_many

    def look_up(wanted: Any) -> Any:
        found, missing = real(wanted)
        ids.extend(key for key, _ in found)
        return found, missing

    monkeypatch.setattr(owner.store, "get_many", look_up)
    return ids


def kept(running: Running) -> set[str]:
    """The ids of the shards that a node cache has."""
    return set(map(str, running.cache.cache.keys()))


def clear(address: str, *ids: str) -> None:
    """As a process that knows of no node cache."""
    backend = HttpRTensorBackend(same_host=False)
    asyncio.run(backend.delete(address, list(ids)))
    backend.close()


def lost(consumer: Consumer, address: str, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether none of the shards is served."""
    reader = consumer.reader(address, tensors)
    with pytest.raises(ShardMissingError):
        drained(reader)
    return reader.failures.keys() == tensors.keys()


def over_http(consumer: Consumer, address: str, tensors: Mapping[str, torch.Tensor]) -> None:
    for _ in range(2):
        consumer.read(address, tensors)
        assert consumer.transport == "http"
