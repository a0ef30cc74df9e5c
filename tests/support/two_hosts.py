"""Two hosts as network namespaces with a cable between them. On each an owner, a node cache and consumers.

`unshare -rn python -m tests.support.two_hosts FOLDER` makes both and prints what happened, a JSON line.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gpu_cache import FetchError
from gpu_cache.rpc import runtime
from gpu_cache.rpc.client.http import HttpRTensorBackend
from gpu_cache.rpc.node_cache import Running
from gpu_cache.rpc.rtensor import clear_fetch_buffer, set_backend
from gpu_cache.rpc.server import main as rpc_server
from gpu_cache.rpc.server.main import ServerHandle
from tests.support.interleave_stage import eventually
from tests.support.same_host_process import KEYS, fetched, fill

ROOT = Path(__file__).parents[2]
NUM_CONSUMERS = 3
ADDRESSES = {number: (f"10.77.0.{number}", f"fd00:77::{number}") for number in (1, 2)}


class Here:
    """What runs on one host. Prints an answer for each line that it reads."""

    def __init__(self, number: int, folder: str) -> None:
        torch.set_num_threads(1)
        runtime.configure(device="cpu")
        store = runtime.current().store
        fill(store)
        self._real, self._is_slow = store.get_many, False
        store.get_many = self._slowly  # type: ignore[method-assign]
        os.environ["GPU_CACHE_SHM"] = "0"  # both hosts are one system
        self._servers: list[ServerHandle] = []
        for host in ADDRESSES[number]:
            self._servers.append(rpc_server.start(host, allow_unauthenticated=True))
        del os.environ["GPU_CACHE_SHM"]
        path = Path(folder, f"node-cache-{number}")
        self._running = Running(path, 256 << 20)
        self._consumers = [HttpRTensorBackend(same_host=True, node_cache=str(path)) for _ in range(NUM_CONSUMERS)]

    def addresses(self) -> list[str]:
        return [server.address for server in self._servers]

    def read(self, address: str, timeout_s: str) -> Mapping[str, Any]:
        """Every consumer reads all shards of an owner, one after another."""
        errors, ways = [], []
        for backend in self._consumers:
            set_backend(backend)
            try:
                fetched(address, timeout_s=float(timeout_s))
                ways.append(runtime.current().cache.source_stats()[address]["transport"])
            except FetchError as error:
                errors += sorted({type(one).__name__ for one in error.failures.values()})
            clear_fetch_buffer()
        return {"ways": ways, "errors": errors}

    def forget(self) -> None:
        """Empty the node cache."""
        self._running.cache.forget(KEYS)

    def slow(self, number: str) -> None:
        """Say when a consumer asks, and let it wait a moment; or not any more."""
        self._is_slow = number == "1"

    def sent(self) -> int:
        """Bytes of tensors that consumers on this host fetched over the network."""
        return sum(one["fetch_bytes"] for one in self._running.cache.cache.source_stats().values())

    def _slowly(self, wanted: Any) -> Any:
        if self._is_slow:
            print(json.dumps("asked"), flush=True)
            time.sleep(0.5)
        return self._real(wanted)


def host(number: str, folder: str) -> None:
    sys.stdin.readline()  # when its cable is there
    here = Here(int(number), folder)
    say(here.addresses())
    for line in sys.stdin:
        name, *arguments = line.split()
        say(getattr(here, name)(*arguments))
    os._exit(0)


def say(what: object) -> None:
    print(json.dumps(what), flush=True)


class Host:
    """A host as the test sees it."""

    def __init__(self, number: int, folder: str, *before: str) -> None:
        self.number = number
        command = [
            *before,
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "tests.support.two_hosts",
            "host",
            str(number),
            folder,
        ]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def told(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def is_apart(self) -> bool:
        """Whether it has a network namespace of its own."""
        return os.readlink(f"/proc/{self.process.pid}/ns/net") != os.readlink("/proc/self/ns/net")

    def tell(self, *words: object) -> None:
        assert self.process.stdin is not None
        print(*words, file=self.process.stdin, flush=True)

    def ask(self, *words: object) -> Any:
        self.tell(*words)
        return self.told()


def ip(*words: str, of: Host | None = None) -> None:
    """Configure the network of a host; of this one for None."""
    inside = [] if of is None else ["nsenter", "-t", str(of.process.pid), "-n"]
    subprocess.run([*inside, "ip", *words], check=True)


def connect(first: Host, second: Host) -> None:
    ip("link", "add", "cable1", "type", "veth", "peer", "name", "cable2")
    ip("link", "set", "cable2", "netns", str(second.process.pid))
    for one, of in ((first, None), (second, second)):
        ip("link", "set", "lo", "up", of=of)
        plug_in(one.number, of)


def plug_in(number: int, of: Host | None) -> None:
    device, (v4, v6) = f"cable{number}", ADDRESSES[number]
    ip("address", "replace", f"{v4}/24", "dev", device, of=of)
    ip("link", "set", device, "up", of=of)
    ip("address", "replace", f"{v6}/64", "dev", device, "nodad", of=of)


def both(folder: str) -> None:
    first, second = Host(1, folder), Host(2, folder, "unshare", "-n")
    with contextlib.ExitStack() as stack:
        for one in (first, second):
            stack.callback(one.process.communicate)
            stack.callback(one.process.kill)
        eventually(second.is_apart)
        connect(first, second)
        found: dict[str, Any] = {}
        (v4_of_1, v6_of_1), (v4_of_2, v6_of_2) = first.ask("go"), second.ask("go")
        found["2 from 1, v4"] = second.ask("read", v4_of_1, 60)
        found["2 from 1, v6"] = second.ask("read", v6_of_1, 60)
        found["1 from 2, v4"] = first.ask("read", v4_of_2, 60)
        found["1 from 2, v6"] = first.ask("read", v6_of_2, 60)
        found["fetched by 2"], found["fetched by 1"] = second.ask("sent"), first.ask("sent")
        found["cut off"] = cut_off(first, second, v4_of_2)
        plug_in(1, None)
        found["again, v4"] = first.ask("read", v4_of_2, 60)
        found["again, v6"] = first.ask("read", v6_of_2, 60)
        say(found)


def cut_off(first: Host, second: Host, address: str) -> Any:
    """The first reads from the second, whose cable is pulled when it has been asked."""
    assert second.ask("slow", 1) is None
    asked = threading.Thread(target=lambda: (second.told(), ip("link", "set", "cable1", "down")))
    asked.start()
    first.ask("forget")
    answer = first.ask("read", address, 3)
    asked.join()
    second.tell("slow", 0)
    while second.told() is not None:  # what it has told of being asked
        pass
    return answer


if __name__ == "__main__":
    host(*sys.argv[2:]) if sys.argv[1] == "host" else both(sys.argv[1])
