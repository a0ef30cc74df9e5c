"""Owners and consumers in processes of their own, forked from one that has imported everything, and killed by tests.

`python -m tests.support.same_host_process` reads lines such as "owner" or "consumer ADDRESS". It forks a child for
each, which prints a JSON line when it is ready, and then works until it is killed. A shard's id tells its bytes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gpu_cache import FetchError
from gpu_cache.rpc import runtime
from gpu_cache.rpc.node_cache import Running
from gpu_cache.rpc.rtensor import RTensor, TensorShardInfo, clear_fetch_buffer
from gpu_cache.rpc.server import main as rpc_server
from gpu_cache.rpc.store import ShardStore
from tests.support.wire_tensors import patterned, same_bits

ROOT = Path(__file__).parents[2]
SIZES = [1, 700, 9 << 10, 100_001, 1 << 20, 3 << 20]
KEYS = [f"{seed}:{nbytes}" for seed, nbytes in enumerate(SIZES * 8)]  # more than the first request asks for


def original(key: str) -> torch.Tensor:
    seed, nbytes = map(int, key.split(":"))
    return patterned(torch.uint8, nbytes, seed=seed)


def fill(store: ShardStore) -> None:
    """Store every shard; they lie side by side."""
    for key, copy in zip(KEYS, store.copies([original(key) for key in KEYS]), strict=True):
        store.put(key, copy)


def handles(address: str) -> list[RTensor]:
    metas = [torch.empty(int(key.split(":")[1]), dtype=torch.uint8, device="meta") for key in KEYS]
    return [RTensor(TensorShardInfo(key, address), meta) for key, meta in zip(KEYS, metas, strict=True)]


def fetched(address: str, timeout_s: float = 30.0) -> None:
    """Localize every shard, look at every bit, and drop them."""
    found = RTensor.localize(handles(address), timeout_s=timeout_s)
    wrong = [key for key, tensor in zip(KEYS, found, strict=True) if not same_bits(tensor, original(key))]
    clear_fetch_buffer()
    assert not wrong, f"wrong bytes: {wrong}"


def churn(store: ShardStore) -> None:
    """Use the ranges of cleared shards for other bytes, for ever."""
    junk = torch.full((1 << 20,), 0xEE, dtype=torch.uint8)
    for number in itertools.count():
        names = [f"junk-{number}-{one}" for one in range(4)]
        for name, copy in zip(names, store.copies([junk] * 4), strict=True):
            store.put(name, copy)
        store.remove(names)
        if number % 3 == 0:
            fill(store)  # which gives the ranges before to others


def owner() -> None:
    current = runtime.current()
    fill(current.store)
    server = rpc_server.start(owner=current)
    tell(address=server.address)
    churn(current.store)


def forking_owner() -> None:
    """Forks a child that sleeps, when it gets SIGUSR1."""
    signal.signal(signal.SIGUSR1, lambda *_: None)
    current = runtime.current()
    fill(current.store)
    server = rpc_server.start(owner=current)
    tell(address=server.address)
    signal.pause()
    if (child := os.fork()) == 0:
        time.sleep(600)
        os._exit(0)
    tell(child=child)
    signal.pause()


def forking_consumer(address: str) -> None:
    """Forks a child that fetches as well; tells what is not as it should be."""
    fetched(address)
    fetched(address)
    before = num_descriptors()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if (child := os.fork()) == 0:
        is_mapped = "memfd:gpu-cache" in Path("/proc/self/maps").read_text()
        fetched(address)
        fetched(address)
        os._exit(1 if is_mapped else 0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    fetched(address)
    problems = [
        *(["the child has its parent's mappings, or could not fetch"] if status else []),
        *(["descriptors were left"] if num_descriptors() != before else []),
    ]
    tell(problems=problems)


def remote_owner(port: str) -> None:
    """An owner as of another host, which stores its shards again and again."""
    os.environ["GPU_CACHE_SHM"] = "0"
    current = runtime.current()
    fill(current.store)
    server = rpc_server.start(owner=current, port=int(port))
    tell(address=server.address)
    churn(current.store)


def node_cache(path: str) -> None:
    """Tells its figures when it gets SIGUSR1, and forks a child that sleeps when it gets SIGUSR2."""
    asked = {signal.SIGUSR1, signal.SIGUSR2}
    signal.pthread_sigmask(signal.SIG_BLOCK, asked)
    running = Running(Path(path), 256 << 20)
    tell()
    while True:
        if signal.sigwait(asked) == signal.SIGUSR1:
            tell(descriptors=num_descriptors(), cached=len(running.cache.cache), **running.cache.segments.stats())
        elif (child := os.fork()) == 0:
            time.sleep(600)
            os._exit(0)
        else:
            tell(child=child)


def node_consumer(address: str, path: str) -> None:
    os.environ["GPU_CACHE_NODE_CACHE"] = path
    consumer(address)


def forking_node_consumer(address: str, path: str) -> None:
    os.environ["GPU_CACHE_NODE_CACHE"] = path
    forking_consumer(address)


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def consumer(address: str) -> None:
    fetched(address)
    tell()
    while True:
        try:
            with contextlib.suppress(FetchError):  # it was cleared
                fetched(address)
        except AssertionError:
            tell(wrong=True)


def tell(**known: object) -> None:
    print(json.dumps({"pid": os.getpid(), **known}), flush=True)


def main() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    tell()
    for line in sys.stdin:
        if os.fork() == 0:
            sys.stdin.close()
            name, *arguments = line.split()
            globals()[name](*arguments)
            os._exit(0)


class Nursery:
    """The process that forks them."""

    def __init__(self) -> None:
        command = [sys.executable, "-W", "ignore::DeprecationWarning", "-m", "tests.support.same_host_process"]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ}
        )
        self._pids: set[int] = set()
        self.told()

    def told(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process that forks is gone"
        return json.loads(line)

    def start(self, *words: str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(words) + "\n")
        self._process.stdin.flush()
        told = self.told()
        assert "wrong" not in told, "a consumer got wrong bytes"
        self._pids.add(told["pid"])
        return told

    def send(self, pid: int, signum: signal.Signals) -> None:
        os.kill(pid, signum)
        if signum is signal.SIGKILL:
            self._pids.discard(pid)

    def close(self) -> None:
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.kill()
        self._process.communicate(timeout=30)


@contextlib.contextmanager
def nursery() -> Iterator[Nursery]:
    with contextlib.closing(Nursery()) as made:
        yield made


if __name__ == "__main__":
    main()
