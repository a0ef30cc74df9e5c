"""Shared by tests of the data plane: checked garbage, connections that have asked, handles of other processes."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from gpu_cache.rpc.clearing import ClearReport, StepClearer
from gpu_cache.rpc.client.connection import HttpAnswer, NodeConnection
from gpu_cache.rpc.client.http import HttpRTensorBackend
from gpu_cache.rpc.rtensor import RTensor, TensorShardInfo, get_backend
from tests.support.fault_server import FaultServer, reply

LONG_S = 60.0  # a time-out that no test lives to see
DONE = reply(b'{"status": "ok", "cleared_count": 1}', content_type="application/json")
THREE = torch.ones(3)  # of 12 bytes


@contextlib.contextmanager
def nothing_forgotten() -> Iterator[None]:
    """Collect the garbage made within: a socket left open warns then, and a warning is an error."""
    yield
    gc.collect()


@contextlib.contextmanager
def full_listener() -> Iterator[tuple[str, int]]:
    """An address that never answers: its queue of connections is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()


@contextlib.contextmanager
def fault_servers() -> Iterator[Callable[..., FaultServer]]:
    """Start servers with a script; they are closed in the end."""
    with contextlib.ExitStack() as stack:
        yield lambda *script, **where: stack.enter_context(FaultServer(*script, **where))


def ask(connection: NodeConnection, *, patience_s: float = LONG_S, deadline_s: float = LONG_S) -> HttpAnswer:
    body = json.dumps({"shard_ids": []}).encode()
    deadline = time.monotonic() + deadline_s
    return connection.request("POST", "/data/batch", body, {}, deadline=deadline, patience_s=patience_s)


def asked_once(address: str) -> NodeConnection:
    """A connection whose first answer was read."""
    connection = NodeConnection(address)
    ask(connection).read_rest(1 << 30)
    return connection


def remote(address: str, shard_id: str, like: torch.Tensor) -> RTensor:
    """A handle as it comes out of another process."""
    return RTensor(TensorShardInfo(shard_id, address), torch.empty(like.shape, dtype=like.dtype, device="meta"))


def with_settings(backend: HttpRTensorBackend, **settings: Any) -> HttpRTensorBackend:
    backend._settings = dataclasses.replace(backend._settings, **settings)
    return backend


def http_backend() -> HttpRTensorBackend:
    """This process's backend."""
    backend = get_backend()
    assert isinstance(backend, HttpRTensorBackend)
    return backend


def handles(address: str, *shard_ids: Any) -> list[RTensor]:
    """Handles of shards of 12 bytes."""
    return [remote(address, shard_id, THREE) for shard_id in shard_ids]


def end_step(obj: Any, *consumers: Any, clearer: StepClearer | None = None) -> ClearReport:
    return asyncio.run(RTensor.clear_everywhere(obj, consumers, clearer=clearer))


def delete(backend: HttpRTensorBackend, address: str, *shard_ids: Any) -> Any:
    return asyncio.run(backend.delete(address, list(shard_ids)))
