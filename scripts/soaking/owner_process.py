"""An owner: a process with the real shard server, which does what it is told over a pipe."""

from __future__ import annotations

import contextlib
import time
from multiprocessing.connection import Connection

import torch

from gpu_cache.rpc import runtime
from gpu_cache.rpc.server import main as rpc_server
from soaking.catalogue import Catalogue

RESTORE = "restore"

_BIND_TRIES = 50
_BIND_PAUSE_S = 0.1


def main(connection: Connection, seed: int, number: int, port: int, is_full: bool) -> None:
    """Serve until killed, or until the soak is gone, which closes the pipe.

    Sends the port first, then True for each order.
    """
    torch.set_num_threads(1)
    runtime.configure(device="cpu")
    owned = Catalogue(seed).owned_by(number)
    store = runtime.current().store
    if is_full:
        store.update(owned)
    with _serving(port) as server, contextlib.suppress(EOFError, ConnectionError):
        connection.send(int(server.address.rpartition(":")[2]))
        while connection.recv() == RESTORE:
            store.update(owned)
            connection.send(True)


def _serving(port: int) -> rpc_server.ServerHandle:
    """A server on that port; another process may have had it a moment ago."""
    for _ in range(_BIND_TRIES):
        try:
            return rpc_server.start(port=port)
        except OSError:
            time.sleep(_BIND_PAUSE_S)
    return rpc_server.start(port=port)
