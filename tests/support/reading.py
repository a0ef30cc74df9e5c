"""Readers of one node, and what they deliver."""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import pytest
import torch

from areal.infra.rpc.backends.connection_pool import ConnectionPool
from areal.infra.rpc.backends.http_reader import HttpReader
from areal.infra.rpc.backends.http_requester import FETCH, HttpSettings, Requester
from areal.infra.rpc.backends.node_state import NodeState
from areal.infra.rpc.shard import ShardFetchError
from gpu_cache import ShardReader
from tests.support.areal_fixtures import LONG_S
from tests.support.fault_server import FaultServer


def reader_of(
    address: str,
    keys: Sequence[Hashable],
    *,
    nbytes: Mapping[Hashable, int] | None = None,
    pool: ConnectionPool | None = None,
    timeout_s: float = LONG_S,
    node: NodeState | None = None,
    **settings: Any,
) -> HttpReader:
    """Tries again without a pause, and keeps its connection in a pool that is closed."""
    if pool is None:
        pool = ConnectionPool()
        pool.close()
    chosen = HttpSettings({}, **{"retry_pause_s": 0.0, **settings})
    requester = Requester(address, FETCH, pool, chosen, time.monotonic() + timeout_s, node or NodeState())
    expected = {key: torch.empty(length, dtype=torch.uint8, device="meta") for key, length in (nbytes or {}).items()}
    return HttpReader(keys, expected, requester, chosen)


def drained(reader: ShardReader, buffer_bytes: int = 1 << 30) -> dict[Hashable, torch.Tensor]:
    """Everything that a reader delivers; each part by one read into buffers of at most so many bytes."""
    tensors: dict[Hashable, torch.Tensor] = {}
    try:
        while (specs := reader.next_specs()) is not None:
            flats = [torch.empty(spec.nbytes, dtype=torch.uint8) for spec in specs]
            views = [flat.numpy().data for flat in flats if len(flat)]
            reader.read_into([v[at : at + buffer_bytes] for v in views for at in range(0, len(v), buffer_bytes)])
            for spec, flat in zip(specs, flats, strict=True):
                tensors[spec.key] = flat.view(spec.dtype).view(spec.shape)
    finally:
        reader.close()
    return tensors


def failure(server: FaultServer, *keys: str, **settings: Any) -> str:
    """What fetching says; it names the shards and the address."""
    wanted = keys or ("a", "b")
    with pytest.raises(ShardFetchError) as caught:
        drained(reader_of(server.address, wanted, **settings))
    text = str(caught.value)
    assert server.address in text
    assert f"(shards {', '.join(wanted)})" in text
    return text
