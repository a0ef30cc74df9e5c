"""A rollout worker: a process with a shard server of its own, which does what it is told over a pipe."""

from __future__ import annotations

import contextlib
import signal
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from demo.handles import from_text, to_text
from demo.policy import Policy, sample
from demo.task import random_prompts
from demo.trajectory import trajectories
from gpu_cache.rpc import runtime
from gpu_cache.rpc.rtensor import RTensor, clear_batches
from gpu_cache.rpc.server import main as rpc_server


@dataclass(frozen=True, slots=True)
class SampleOrder:
    """Answer some prompts and say where the trajectories are.

    Attributes:
        weights: A state dict of handles, as text.
        version: Of these weights.
        num_prompts: How many prompts to draw.
        group_rows: Answers to each.
        seed: Equal orders bring equal trajectories.
    """

    weights: str
    version: int
    num_prompts: int
    group_rows: int
    seed: int


@dataclass(frozen=True, slots=True)
class ClearOrder:
    """Forget shards, cached and owned."""

    shard_ids: Sequence[Any]


@dataclass(frozen=True, slots=True)
class StopOrder:
    """End the process."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong with an order; sent in the place of its result."""

    text: str


class RolloutWorker:
    """Samples from the weights it is given and keeps the trajectories for the trainer to fetch. One thread.

    Args:
        address: Of this process's shard server.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._policy = Policy()

    def obey(self, order: SampleOrder | ClearOrder) -> Any:
        """The result of an order, or the `Failure` that it ended in."""
        try:
            return self._sample(order) if isinstance(order, SampleOrder) else clear_batches(order.shard_ids)
        except Exception:
            return Failure(traceback.format_exc())

    def _sample(self, order: SampleOrder) -> str:
        """Handles of the trajectories, as text."""
        self._policy.load_state_dict(RTensor.localize(from_text(order.weights)))
        generator = torch.Generator().manual_seed(order.seed)
        prompts = random_prompts(order.num_prompts, generator).repeated(order.group_rows)
        batch = trajectories(prompts, sample(self._policy, prompts, generator), order.version)
        return to_text(RTensor.remotize(batch, node_addr=self._address))


def main(connection: Connection, port: int, number: int) -> None:
    """Run a worker until it is told to stop or the trainer is gone, which closes the pipe.

    Sends the address of its shard server first, then one answer for each order. Serves on another port than `port`
    if that is taken. Reports to `gpu-cache-smi` as the rollout of this `number`.
    """
    # Ctrl-C reaches the whole group; the trainer decides what becomes of its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    runtime.configure(device="cpu", role="rollout", rank=number)
    with _serving(port) as server, contextlib.suppress(EOFError, ConnectionError):
        worker = RolloutWorker(server.address)
        connection.send(server.address)
        while not isinstance(order := connection.recv(), StopOrder):
            connection.send(worker.obey(order))


def _serving(port: int) -> rpc_server.ServerHandle:
    try:
        return rpc_server.start(port=port)
    except OSError:
        return rpc_server.start()
