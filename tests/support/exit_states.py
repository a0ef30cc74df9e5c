"""Processes that end while a thread of the cache is at work: `python -m tests.support.exit_states COUNT STATE/END ...`.

Importing torch takes seconds, so one process imports it and forks a child for each ending. The child brings a fresh
cache into the state, and ends as a script would, through the whole of the interpreter's finalization. Its parent prints
the outcome: a JSON list of [state, end, status, stderr].
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import torch

from gpu_cache import CacheConfig, TensorCache
from gpu_cache.device.host import HostDevice
from gpu_cache.report import publish
from gpu_cache.rpc import runtime
from gpu_cache.rpc.rtensor import RTensor, TensorShardInfo
from gpu_cache.rpc.server import main as rpc_server
from tests.support.areal_fixtures import remote
from tests.support.fault_server import Exchange, FaultServer, frame, reply, silent
from tests.support.sources import DictSource

PARALLEL = 3  # children at once
_DEADLINE_S = 60.0  # the longest life of a child
_LARGE = torch.arange(1 << 20)  # 8 MiB
_SMALL: dict[Hashable, torch.Tensor] = {number: torch.full((64,), number) for number in range(6000)}
_kept: list[Any] = []  # alive until the interpreter ends


def torch_work(seconds: float) -> None:
    """Be inside torch, mostly without the interpreter's lock."""
    left, right = torch.ones(192, 192), torch.ones(192, 192)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        left @ right


def plain_cache(**settings: Any) -> TensorCache:
    made = TensorCache(CacheConfig(device="cpu", stats=False, **settings))
    _kept.append(made)
    return made


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def waiting() -> None:
    """A prefetch waits for an owner that does not answer."""
    server = FaultServer(silent)
    _kept.append((server, RTensor.prefetch([remote(server.address, "a", torch.ones(1000))])))
    assert server.has_been_asked.wait(30)


def receiving() -> None:
    """A prefetch receives from a slow owner."""
    answer = reply(frame({"a": _LARGE}))
    half = threading.Event()

    def drip(exchange: Exchange) -> None:
        for start in range(0, len(answer), 1 << 15):
            exchange.send(answer[start : start + (1 << 15)])
            exchange.wait(0.002)
            if start > len(answer) // 8:
                half.set()

    server = FaultServer(drip)
    _kept.append((server, RTensor.prefetch([remote(server.address, "a", _LARGE)])))
    assert half.wait(30)


def landing() -> None:
    """A prefetch of many shards lands run by run."""
    cache = plain_cache(run_bytes="64KiB", staging_slot_bytes="64KiB")
    cache.prefetch(list(_SMALL), DictSource(_SMALL))
    until(lambda: len(cache) > 100)


def callback() -> None:
    """A callback of a prefetch's future runs, on the thread that fetched."""
    cache, begun = plain_cache(), threading.Event()

    def work(future: object) -> None:
        begun.set()
        torch_work(0.3)

    gate = threading.Event()
    source = DictSource({"a": torch.ones(10)})
    load = source._load
    source._load = lambda key: (gate.wait(30), load(key))[1]  # type: ignore[method-assign]
    cache.prefetch(["a"], source).add_done_callback(work)
    gate.set()
    assert begun.wait(30)


def publisher() -> None:
    """The thread that publishes looks at the device."""
    os.environ["GPU_CACHE_STATS_DIR"] = tempfile.mkdtemp(prefix="exits-")
    publish.PERIOD_S = 0.001
    cache = TensorCache(CacheConfig(stats=True), device=HostDevice(stages=True))
    _kept.append(cache)
    begun = threading.Event()

    def gather() -> None:
        begun.set()
        torch_work(0.01)

    cache._lazy.open().gather = gather  # type: ignore[method-assign]
    cache.get_many(["a"], DictSource({"a": torch.ones(10)}))
    assert begun.wait(30)


def reaper() -> None:
    """The reaper gives back what a cache that is gone had, and what its callers still held."""
    cache = TensorCache(CacheConfig(device="cpu", stats=False))
    tensors = cache.get_many(list(_SMALL)[:3000], DictSource(_SMALL))
    _kept.append(tensors[::100])
    del cache, tensors


def backend() -> None:
    """A user's backend is inside torch, and does not come back."""
    begun = threading.Event()

    class Endless:
        def fetch(self, shards: list[TensorShardInfo]) -> list[torch.Tensor]:
            begun.set()
            torch_work(1000.0)
            return []

        def store(self, tensor: torch.Tensor) -> Any: ...

        async def delete(self, node_addr: str, shard_ids: list[Any]) -> Any: ...

    runtime.current().set_backend(Endless())
    _kept.append(RTensor.prefetch([remote("node-a:1", "a", torch.ones(1000))]))
    assert begun.wait(30)


def server() -> None:
    """The server of this process's shards sends them, again and again."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.close(writing)
        _download(os.read(reading, 100).decode())
        os._exit(0)
    os.close(reading)
    owner = runtime.current()
    owner.store.put("a", _LARGE)
    handle = rpc_server.start(owner=owner)
    _kept.append(handle)
    os.write(writing, handle.address.encode())
    time.sleep(0.05)


def _download(address: str) -> None:
    """Fetch in a loop until the server is gone."""
    backend = runtime.current().backend
    with contextlib.suppress(Exception):
        while True:
            backend.fetch([TensorShardInfo("a", address)])


STATES = {work.__name__: work for work in (waiting, receiving, landing, callback, publisher, reaper, backend, server)}


def by_exception() -> None:
    raise RuntimeError("the script's own")


def by_handler() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
    os.kill(os.getpid(), signal.SIGTERM)


# How a script ends, the status that Python gives then, and the last word of what it writes.
ENDS: dict[str, tuple[Callable[[], object], int, str]] = {
    "normal": (lambda: None, 0, ""),
    "sys.exit": (lambda: sys.exit(3), 3, ""),
    "exception": (by_exception, 1, "RuntimeError: the script's own"),
    "SIGINT": (lambda: os.kill(os.getpid(), signal.SIGINT), -signal.SIGINT, "KeyboardInterrupt"),
    "SIGTERM": (by_handler, 5, ""),
}


def is_as_python_would(end: str, status: int, stderr: str) -> bool:
    """Whether the status is the end's, and nothing but its traceback was written."""
    _, wanted, last = ENDS[end]
    return status == wanted and stderr.count("Traceback") == bool(last) and stderr.strip().rpartition("\n")[2] == last


def run_child(state: str, end: str, stderr: Path) -> None:
    """Become a script that ends in this state."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT, 0o600), 2)
    STATES[state]()
    time.sleep(random.SystemRandom().random() * 0.03)
    ENDS[end][0]()


def waited_for(pids: dict[int, tuple[str, str, Path, float]]) -> tuple[str, str, int, str]:
    """How the next child ended; one that hangs is killed."""
    while True:
        for pid, (state, end, stderr, began) in list(pids.items()):
            if time.monotonic() > began + _DEADLINE_S:
                os.kill(pid, signal.SIGKILL)
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del pids[pid]
                return state, end, os.waitstatus_to_exitcode(status), stderr.read_text()
        time.sleep(0.005)


def main(count: str, *endings: str) -> None:
    jobs = [ending.split("/") for _ in range(int(count)) for ending in endings]
    pids: dict[int, tuple[str, str, Path, float]] = {}
    results = []
    folder = Path(tempfile.mkdtemp())
    gc.freeze()  # else each child's last collections copy every page that torch's modules are on
    for number, (state, end) in enumerate(jobs):
        while len(pids) >= PARALLEL:
            results.append(waited_for(pids))
        stderr = folder / str(number)
        if (pid := os.fork()) == 0:
            run_child(state, end, stderr)
            return  # to the end of the script
        pids[pid] = state, end, stderr, time.monotonic()
    while pids:
        results.append(waited_for(pids))
    shutil.rmtree(folder)
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
