"""Reference and critic as processes of their own, each with a cache: they read the batches that the actor reads."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from demo.handles import RemoteBatch
from demo.learner import Learner, LearnerConfig
from demo.rollouts import Child, Workers, environment
from demo.trajectory import rewards
from demo.worker import ClearOrder, Failure, StopOrder
from gpu_cache.rpc import runtime
from gpu_cache.rpc.rtensor import buffer_stats, clear_batches

ACTOR, REFERENCE, CRITIC = ROLES = ("actor", "ref", "critic")


@dataclass(frozen=True, slots=True)
class ReadOrder:
    """Read a batch, and say what the role has to say of it.

    Attributes:
        role: REFERENCE: log-probs, `(rows, tokens - 1)`. CRITIC: advantages, `(rows,)`, and the mean reward.
        texts: Of the batch.
        is_cached: Whether it is read through the cache.
        seed: Of the policy.
        config: Of the update.
    """

    role: str
    texts: Sequence[str]
    is_cached: bool
    seed: int
    config: LearnerConfig


@dataclass(frozen=True, slots=True)
class StatsOrder:
    """Say what the cache has fetched so far, and how."""


def fetched() -> dict[str, Any]:
    """What this process's cache has fetched: bytes, and each source's transport."""
    sources = runtime.current().cache.source_stats()
    return {
        "fetch_bytes": int(buffer_stats()["fetch_bytes"]),
        "sources": {address: one["transport"] for address, one in sources.items() if one["fetch_bytes"]},
    }


def main(connection: Connection, port: int, number: int) -> None:
    """Run a role until it is told to stop or the trainer is gone. Sends its name first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    role = ROLES[number]
    runtime.configure(device="cpu", role=role, rank=0)
    learner: Learner | None = None
    with contextlib.suppress(EOFError, ConnectionError):
        connection.send(role)
        while not isinstance(order := connection.recv(), StopOrder):
            if isinstance(order, ReadOrder) and learner is None:
                learner = Learner(torch.device("cpu"), order.seed, order.config)
            connection.send(_obey(order, learner))


def _obey(order: ReadOrder | ClearOrder | StatsOrder, learner: Learner | None) -> Any:
    try:
        if isinstance(order, ReadOrder):
            assert learner is not None
            return _read(order, learner)
        return fetched() if isinstance(order, StatsOrder) else clear_batches(order.shard_ids)
    except Exception:
        return Failure(traceback.format_exc())


def _read(order: ReadOrder, learner: Learner) -> Any:
    batch = RemoteBatch(order.texts, is_cached=order.is_cached).read()
    if order.role == REFERENCE:
        return learner.reference_logprobs(batch)
    return learner.advantages(batch), float(rewards(batch).mean())


class Roles:
    """The roles that are processes of their own. A context manager: leaving it leaves no process behind.

    Args:
        names: Of ROLES; the actor is this process.
        seed: Of the policy.
        config: Of the update.
    """

    def __init__(self, names: Sequence[str], seed: int, config: LearnerConfig) -> None:
        self._seed, self._config, self.names = seed, config, names
        others = [name for name in names if name != ACTOR]
        self._children = {name: Child(main, ROLES.index(name), f"role {name}") for name in others}

    def __enter__(self) -> Roles:
        return self

    def __exit__(self, *error: object) -> None:
        for one in self._children.values():
            one.request_stop()
        for one in self._children.values():
            one.stop()

    def ask(self, batch: RemoteBatch) -> dict[str, Future[Any]]:
        """Have all roles read a batch at once; what they say, by name."""
        return {
            name: one.order(ReadOrder(name, batch.texts, batch.is_cached, self._seed, self._config))
            for name, one in self._children.items()
        }

    def clear(self, shard_ids: list[Any]) -> None:
        """Make every role forget shards, and wait until it has."""
        for done in [one.order(ClearOrder(shard_ids)) for one in self._children.values()]:
            done.result()

    def fetched(self) -> dict[str, dict[str, Any]]:
        """What each role, and this process as the actor, has fetched so far."""
        asked = {name: one.order(StatsOrder()) for name, one in self._children.items()}
        return {name: asked[name].result() if name in asked else fetched() for name in self.names}


@contextlib.contextmanager
def node_cache() -> Iterator[None]:
    """A node cache that this process, and those that it starts meanwhile, read by way of."""
    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        path = Path(folder, "node-cache")
        command = [sys.executable, "-m", "gpu_cache.rpc.node_cache", "--path", str(path), "--log-level", "WARNING"]
        own = {"PYTHONPATH": os.pathsep.join(sys.path)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **own}) as process:
            try:
                assert process.stdout is not None
                if not process.stdout.readline():
                    raise RuntimeError("the node cache did not start")
                with environment(GPU_CACHE_NODE_CACHE=str(path)):
                    yield
            finally:
                process.terminate()


def remote_workers(num_workers: int) -> Workers:
    """Rollout workers as of other hosts: their memory is not shared."""
    return Workers(num_workers, GPU_CACHE_SHM="0")
