"""The soak's side of the fault proxies."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from soaking import proxy_process

_STOP_S = 5.0


class Proxies:
    """The process of the fault proxies, one in front of each server. A context manager: leaving it ends the process.

    Args:
        seed: Of the faults.
        ports: Of the servers.
    Attributes:
        addresses: Of the proxies, in the order of the servers.
    """

    def __init__(self, seed: int, ports: Sequence[int]) -> None:
        command = [sys.executable, proxy_process.__file__, *map(str, [seed, *ports])]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.addresses = [f"127.0.0.1:{port}" for port in self._read()]

    def faults(self) -> dict[str, int]:
        """How many so far, by kind."""
        assert self._process.stdin is not None
        self._process.stdin.write("?\n")
        self._process.stdin.flush()
        return dict(self._read())

    def __enter__(self) -> Proxies:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())
