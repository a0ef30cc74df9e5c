"""Readers of one node, and what they deliver."""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import pytest
import torch

from gpu_cache import FetchError, Promise, ShardReader, ShardSpec
from gpu_cache.rpc.client.pool import ConnectionPool, NodeState
from gpu_cache.rpc.client.reader import HttpReader
from gpu_cache.rpc.client.requester import FETCH, HttpSettings, Requester
from gpu_cache.rpc.shard import ShardFetchError
from gpu_cache.rpc.wire.records import Answer, Foreseen
from tests.support.areal_fixtures import LONG_S
from tests.support.fault_server import FaultServer


def reader_of(
    address: str,
    keys: Sequence[Hashable],
    *,
    promised: Mapping[Any, torch.Tensor] | None = None,
    pool: ConnectionPool | None = None,
    timeout_s: float = LONG_S,
    node: NodeState | None = None,
    **settings: Any,
) -> HttpReader:
    """Tries again without a pause, and keeps its connection in a pool that is closed; knows what is `promised`."""
    if pool is None:
        pool = ConnectionPool()
        pool.close()
    chosen = HttpSettings({}, **{"retry_pause_s": 0.0, **settings})
    requester = Requester(address, FETCH, pool, chosen, time.monotonic() + timeout_s, node or NodeState())
    return HttpReader(keys, promises_of(promised or {}, address), requester, chosen)


def promises_of(tensors: Mapping[Any, torch.Tensor], owner: str) -> dict[Hashable, Promise]:
    """As handles of these tensors promise them."""
    return {key: (one.dtype, tuple(one.shape), owner) for key, one in tensors.items()}


def parse_records(records: bytes, ids: Sequence[Hashable]) -> Answer:
    """The answer for shards that no handle promises, by an owner's records."""
    return Foreseen(ids, {}).compared(records, lambda _: True)


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


def drained_by_windows(reader: ShardReader, window_bytes: int) -> dict[Hashable, torch.Tensor]:
    """As a cache reads: a shard is there once a read has brought its last byte; what a part lost comes with another."""
    tensors: dict[Hashable, torch.Tensor] = {}
    try:
        while (specs := reader.next_specs()) is not None:
            try:
                _read_windows(reader, specs, window_bytes, tensors)
            except FetchError as error:
                if not error.may_go_on:
                    raise
    finally:
        reader.close()
    return tensors


def _read_windows(
    reader: ShardReader, specs: Sequence[ShardSpec], window_bytes: int, tensors: dict[Hashable, torch.Tensor]
) -> None:
    built = {spec.key: torch.empty(spec.shape, dtype=spec.dtype) for spec in specs}
    tensors |= {key: tensor for key, tensor in built.items() if not tensor.nbytes}
    windows: list[list[tuple[memoryview, list[Hashable]]]] = [[]]  # pieces, with the shard that each completes
    room = window_bytes
    for spec in specs:
        view = built[spec.key].view(-1).view(torch.uint8).numpy().data if spec.nbytes else memoryview(b"")
        for at in range(0, spec.nbytes, window_bytes):
            piece = view[at : at + window_bytes]
            if len(piece) > room:
                windows.append([])
                room = window_bytes
            windows[-1].append((piece, [spec.key] if at + len(piece) == spec.nbytes else []))
            room -= len(piece)
    for window in windows:
        reader.read_into([piece for piece, _ in window])
        tensors |= {key: built[key] for _, completed in window for key in completed}


def failure(server: FaultServer, *keys: str, **settings: Any) -> str:
    """The error of a fetch; it names the shards and the address."""
    wanted = keys or ("a", "b")
    with pytest.raises(ShardFetchError) as caught:
        drained(reader_of(server.address, wanted, **settings))
    text = str(caught.value)
    assert server.address in text
    assert f"(shards {', '.join(map(repr, wanted))})" in text
    return text
