"""A shard server in a process of its own, that can be killed and started again at the same address."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from gpu_cache.rpc.wire.frame import CONTENT_TYPE, Frame
from tests.support.free_port import free_port


class ServerProcess:
    """`address` stays the same over restarts."""

    def __init__(self, *options: str) -> None:
        self._options, self.address = options, f"127.0.0.1:{free_port()}"
        self.start()

    def start(self) -> None:
        """At the port that it had before."""
        command = [sys.executable, "-m", "gpu_cache.rpc.server", "--port", self.address.split(":")[1]]
        self._process = subprocess.Popen([*command, *self._options], stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().removeprefix("listening on ").strip()
        assert self.address

    def kill(self) -> None:
        """Without a word to any client."""
        self._process.send_signal(signal.SIGKILL)
        self._process.communicate(timeout=30)

    def put(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for shard_id, tensor in tensors.items():
            body = b"".join(map(bytes, Frame([(shard_id, tensor)])))
            assert self._ask("PUT", f"/data/{shard_id}", body)["status"] == "ok"

    def health(self) -> Any:
        return self._ask("GET", "/health")

    def _ask(self, method: str, path: str, body: bytes | None = None) -> Any:
        connection = http.client.HTTPConnection(self.address, timeout=30)
        try:
            connection.request(method, path, body, {"Content-Type": CONTENT_TYPE})
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()


@contextmanager
def server_process(*options: str) -> Iterator[ServerProcess]:
    server = ServerProcess(*options)
    try:
        yield server
    finally:
        server.kill()
