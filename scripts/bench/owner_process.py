"""The owner: a process with the real shard server, which does what it is told over a pipe."""

from __future__ import annotations

import contextlib
import json
import signal
import time
import traceback
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from bench.raw_socket import RawSender
from bench.workloads import Workload, make_workload
from gpu_cache.rpc import runtime, serialize_value
from gpu_cache.rpc.rtensor import RTensor
from gpu_cache.rpc.server import main as rpc_server

CPU, RESTORE, STOP = "cpu", "restore", "stop"


@dataclass(frozen=True, slots=True)
class Offer:
    """What the owner has.

    Attributes:
        address: Of its shard server.
        handles: The batch in handles, as text.
        shard_ids: In the order of the batch.
        raw_location: Of its raw sender, which has the bytes of all shards in that order.
    """

    address: str
    handles: str
    shard_ids: list[str]
    raw_location: tuple[str, int]


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong; sent in the place of an answer."""

    text: str


def main(connection: Connection, name: str, fraction: float) -> None:
    """Own a workload until told to stop, or until the client is gone, which closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the client decides
    torch.set_num_threads(1)
    runtime.configure(device="cpu")
    with contextlib.suppress(EOFError, ConnectionError):
        try:
            _serve(connection, make_workload(name, fraction))
        except Exception:
            connection.send(Failure(traceback.format_exc()))


def _serve(connection: Connection, workload: Workload) -> None:
    with rpc_server.start() as server:
        handles = [RTensor.remotize(trajectory, server.address) for trajectory in workload.trajectories()]
        shards = dict(runtime.current().store)
        orders = _orders(shards)
        joined = _joined(shards)
        with RawSender(joined.numpy().data) as raw:
            ids = [handle.shard.shard_id for trajectory in handles for handle in trajectory.values()]
            connection.send(Offer(server.address, json.dumps(serialize_value(handles)), ids, raw.location))
            while (order := connection.recv()) != STOP:
                connection.send(orders[order]())


def _orders(shards: Mapping[Hashable, torch.Tensor]) -> dict[str, Callable[[], Any]]:
    """What can be asked for: CPU seconds so far; the cleared shards back in the store."""
    return {CPU: time.process_time, RESTORE: lambda: runtime.current().store.update(shards)}


def _joined(shards: Mapping[Hashable, torch.Tensor]) -> torch.Tensor:
    """The bytes of all shards one behind another."""
    return torch.cat([shard.view(-1).view(torch.uint8) for shard in shards.values()])
