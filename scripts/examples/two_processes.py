"""The data plane without AReaL: a rollout worker keeps tensors, a trainer reads each batch five times, and clears it.

    python scripts/examples/two_processes.py

In a real job a launcher starts the processes, on many nodes, and the messages travel in its RPCs.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from multiprocessing.connection import Connection

import torch

from gpu_cache.rpc import RTensor, deserialize_value, serialize_value
from gpu_cache.rpc.rtensor import buffer_stats
from gpu_cache.rpc.server import main as rpc_server

STEPS, READS = 3, 5


def rollout_worker(pipe: Connection) -> None:
    """Serve from a thread; make a batch whenever the trainer asks for one, and send its handles."""
    with rpc_server.start() as server:
        while pipe.recv() == "next":
            batch = {"input_ids": torch.randint(0, 1000, (64, 512)), "logprobs": torch.randn(64, 512)}
            pipe.send(serialize_value(RTensor.remotize(batch, node_addr=server.address)))


def train_step(message: object) -> float:
    """Read the batch as the phases of a step do, each through handles of its own; then clear it everywhere."""
    total = 0.0
    for _ in range(READS):
        batch = RTensor.localize(deserialize_value(message))
        total += batch["logprobs"].mean().item()
    report = asyncio.run(RTensor.clear_everywhere(deserialize_value(message)))
    if not report.is_complete:
        raise SystemExit(f"not cleared: {report.failures}")
    return total


def main() -> None:
    ours, theirs = multiprocessing.Pipe()
    worker = multiprocessing.get_context("spawn").Process(target=rollout_worker, args=(theirs,), daemon=True)
    worker.start()
    for step in range(STEPS):
        ours.send("next")
        train_step(ours.recv())
        stats = buffer_stats()
        print(f"step {step}: {stats['misses']} shards fetched, {stats['hits']} hits, {stats['num_entries']} left")
    ours.send("end")
    worker.join()


if __name__ == "__main__":
    main()
