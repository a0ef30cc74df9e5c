"""Beside AReaL: its names, its codec and its blueprint, with this cache and binary frames beneath.

    python scripts/examples/beside_areal.py     # in an environment with AReaL; not in a checkout's own environment

Instead of the call of `adopt`, set GPU_CACHE_AREAL=1: then AReaL's own programs need no line at all.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
from multiprocessing.connection import Connection

import gpu_cache

gpu_cache.adopt()  # before anything of AReaL is imported; children inherit it

import torch
from areal.infra.rpc.guard.data_blueprint import data_bp
from areal.infra.rpc.rtensor import RTensor, fetch_buffer_stats
from areal.infra.rpc.serialization import deserialize_value, serialize_value
from flask import Flask
from werkzeug.serving import make_server

READS = 5


def rollout_worker(pipe: Connection) -> None:
    """Serve AReaL's `/data` routes, as its guards and workers do; send the handles of one batch."""
    app = Flask("worker")
    app.register_blueprint(data_bp)
    server = make_server("127.0.0.1", 0, app, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    batch = {"input_ids": torch.randint(0, 1000, (64, 512)), "logprobs": torch.randn(64, 512)}
    pipe.send(serialize_value(RTensor.remotize(batch, node_addr=f"127.0.0.1:{server.server_port}")))
    pipe.recv()
    server.shutdown()


def main() -> None:
    ours, theirs = multiprocessing.Pipe()
    worker = multiprocessing.get_context("spawn").Process(target=rollout_worker, args=(theirs,))
    worker.start()
    message = ours.recv()
    for _ in range(READS):
        batch = RTensor.localize(deserialize_value(message))
    print("class:", RTensor.__module__, "- batch:", tuple(batch["logprobs"].shape), "- cached:", fetch_buffer_stats())
    for node_addr, shard_ids in RTensor.collect_shards(deserialize_value(message)).items():
        asyncio.run(RTensor.clear_node(node_addr, shard_ids))
    print("after the clear:", fetch_buffer_stats())
    ours.send("end")
    worker.join()


if __name__ == "__main__":
    main()
