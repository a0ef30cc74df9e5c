"""Time reads through Ray's store, grouped as this project stores, beside plain Ray and HTTP: in turns, in one run.

An actor of a Ray that this program starts stores a workload's shards; this process reads them. Each round stores
afresh, reads once, and clears. Plain Ray is an object for each shard, got without a copy and copied into one array.
With two nodes the actor is on the second, with a store of its own on this machine. Run it with a Python that has Ray.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from bench.workloads import Workload, make_workload

from gpu_cache.rpc import runtime
from gpu_cache.rpc.client.ray import RayRTensorBackend
from gpu_cache.rpc.rtensor import HttpRTensorBackend, RTensor, clear_fetch_buffer, set_backend
from gpu_cache.rpc.server import main as rpc_server

STORE_BYTES = 1536 << 20
_MS = 1e3


class Owner:
    """The actor: stores a workload in the form that it is asked for."""

    def __init__(self, name: str, fraction: float) -> None:
        torch.set_num_threads(1)
        self._batch = [tensor for one in make_workload(name, fraction).trajectories() for tensor in one.values()]
        self._server = rpc_server.start()
        self._kept: Any = None

    def store(self, form: str) -> tuple[float, Any]:
        """Seconds that storing took, and handles or references."""
        if form != "plain":
            set_backend(RayRTensorBackend() if form == "grouped" else HttpRTensorBackend())
        began = time.perf_counter()
        if form == "plain":
            ray = importlib.import_module("ray")
            self._kept = [ray.put(tensor.reshape(-1).view(torch.uint8).numpy()) for tensor in self._batch]
            return time.perf_counter() - began, self._kept
        handles = RTensor.remotize(self._batch, self._server.address)
        return time.perf_counter() - began, handles

    def forget(self, shard_ids: list[Any]) -> None:
        """Drop what the latest `store` keeps here."""
        self._kept = None
        if shard_ids and not str(shard_ids[0]).startswith("ray:"):
            runtime.current().store.remove(shard_ids)


class Reader:
    """Reads and clears what the owner stored.

    Args:
        ray: The module.
        owner: The actor.
        workload: What it stores.
    """

    def __init__(self, ray: Any, owner: Any, workload: Workload) -> None:
        self._ray, self._owner = ray, owner
        self._array = np.zeros(workload.nbytes, np.uint8)
        self._source = np.ones(workload.nbytes, np.uint8)
        quiet = {"http": HttpRTensorBackend(same_host=False), "shm": HttpRTensorBackend(same_host=True)}
        self._backends: dict[str, Any] = {"grouped": RayRTensorBackend(), **quiet}

    def memcpy(self) -> tuple[float, float]:
        """The same bytes within this process."""
        began = time.perf_counter()
        self._array[:] = self._source
        return 0.0, time.perf_counter() - began

    def plain(self) -> tuple[float, float]:
        """An object for each shard."""
        put_s, refs = self._ray.get(self._owner.store.remote("plain"))
        began, at = time.perf_counter(), 0
        for found in self._ray.get(refs):
            self._array[at : at + found.nbytes] = found
            at += found.nbytes
        taken_s = time.perf_counter() - began
        self._ray.get(self._owner.forget.remote([]))
        return put_s, taken_s

    def cached(self, form: str) -> tuple[float, float]:
        """Through the cache, whose slabs are kept."""
        set_backend(self._backends[form])
        put_s, handles = self._ray.get(self._owner.store.remote(form))
        ids = [handle.shard.shard_id for handle in handles]
        began = time.perf_counter()
        tensors = RTensor.localize(handles)
        taken_s = time.perf_counter() - began
        del tensors
        if form == "grouped":
            asyncio.run(RTensor.clear_everywhere(handles))
        clear_fetch_buffer(ids)
        self._ray.get(self._owner.forget.remote(ids))
        return put_s, taken_s


def main() -> int:
    """Run the rounds and print medians."""
    options = _parser().parse_args()
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")  # more than Ray gives a node to start
    ray = importlib.import_module("ray")
    torch.set_num_threads(1)
    os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:2], os.environ.get("PYTHONPATH", "")])
    with contextlib.ExitStack() as stack:
        placement = _start(ray, options.nodes, stack)
        for name in options.workloads:
            _run(ray, make_workload(name, options.fraction), options, placement)
    return 0


def _start(ray: Any, num_nodes: int, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Start the nodes, which end with `stack`; returns options of an actor on the last."""
    settings = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": STORE_BYTES}
    if num_nodes == 1:
        stack.callback(ray.shutdown)
        ray.init(address="local", **settings, log_to_driver=False, logging_level="ERROR")
        return {}
    cluster = importlib.import_module("ray.cluster_utils").Cluster(initialize_head=True, head_node_args=settings)
    stack.callback(cluster.shutdown)
    stack.callback(ray.shutdown)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES, resources={"second": 1})
    return {"resources": {"second": 1}}


def _run(ray: Any, workload: Workload, options: argparse.Namespace, placement: dict[str, Any]) -> None:
    runtime.configure(device="cpu", pool_bytes=2 * workload.nbytes + (64 << 20), prealloc_bytes=2 * workload.nbytes)
    owner = ray.remote(Owner).options(**placement).remote(workload.name, options.fraction)
    reader = Reader(ray, owner, workload)
    paths: dict[str, Callable[[], tuple[float, float]]] = {
        "memcpy": reader.memcpy,
        "Ray, grouped": lambda: reader.cached("grouped"),
        "Ray, an object for each shard": reader.plain,
        "HTTP": lambda: reader.cached("http"),
        "shared memory": lambda: reader.cached("shm"),
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in paths}
    for number in range(options.rounds + 1):  # the first is not counted
        names = list(paths)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            taken[name].append(paths[name]())
    print(
        f"\n{workload.name}: {workload.num_shards:,} shards, {workload.nbytes / 1e6:,.0f} MB, {options.nodes} node(s)"
    )
    print(f"{'path':32}{'store ms':>10}{'read ms':>10}{'of memcpy':>11}{'us a shard':>12}")
    for name, found in taken.items():
        store_s, read_s = (statistics.median(column) for column in zip(*found[1:], strict=True))
        pairs = zip(taken["memcpy"][1:], found[1:], strict=True)
        share = statistics.median(reference[1] / one[1] for reference, one in pairs)
        each_us = read_s / workload.num_shards * 1e6
        print(f"{name:32}{store_s * _MS:>10.1f}{read_s * _MS:>10.1f}{share:>11.2f}{each_us:>12.1f}", flush=True)
    ray.kill(owner)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=["rollout", "distillation"], help="default: %(default)s")
    parser.add_argument("--fraction", type=float, default=1.0, help="of each workload (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--nodes", type=int, choices=[1, 2], default=1, help="default: %(default)s")
    return parser


if __name__ == "__main__":
    sys.exit(main())
