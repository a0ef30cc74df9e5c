"""Processes that fork while they own or fetch shards: `python -m tests.support.forking owner|consumer ADDRESS`.

Each prints a JSON line of what a test needs to know, and then waits to be killed. The child sleeps until it is killed.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time

import torch

from gpu_cache.rpc import runtime
from gpu_cache.rpc.rtensor import RTensor, TensorShardInfo
from gpu_cache.rpc.server import main as rpc_server
from tests.support.areal_fixtures import remote

NUM_ELEMENTS = 4 << 20  # 16 MiB: more than two sockets buffer


def forked_sleeper(**known: object) -> None:
    """Fork, and print the child's pid beside what is known."""
    if (child := os.fork()) == 0:
        while True:
            time.sleep(3600)
    print(json.dumps({"child": child, **known}), flush=True)


def owner() -> None:
    """Serve a shard; fork when the line "fork" comes."""
    current = runtime.current()
    current.store.put("a", torch.zeros(NUM_ELEMENTS))
    server = rpc_server.start(owner=current)
    print(json.dumps({"address": server.address}), flush=True)
    sys.stdin.readline()
    forked_sleeper()
    sys.stdin.readline()


def consumer(address: str) -> None:
    """Fetch a shard, keep the connection, and fork."""
    RTensor.localize([remote(address, "a", torch.ones(4))])
    forked_sleeper()
    sys.stdin.readline()


def child(address: str) -> None:
    """Fork a child that drops all that it inherited while it has files of its own, fetches, and ends by itself.

    Prints what the child fetched, its status, and what the parent's server and connection are good for afterwards.
    """
    current = runtime.current()
    current.store.put("own", torch.zeros(2))
    backend = current.backend
    with rpc_server.start(owner=current) as server:
        backend.fetch([TensorShardInfo("own", server.address), TensorShardInfo("a", address)])
        if (pid := os.fork()) == 0:
            files = [os.open(os.devnull, os.O_WRONLY) for _ in range(50)]
            server.stop()
            backend.close()  # type: ignore[attr-defined]
            del current, backend, server
            gc.collect()
            assert all(os.write(file, b"x") for file in files)
            print(RTensor.localize([remote(address, "a", torch.ones(4))])[0].tolist(), flush=True)
            sys.exit(3)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        print(*backend.fetch([TensorShardInfo("own", server.address), TensorShardInfo("a", address)]), flush=True)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
