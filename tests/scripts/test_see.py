"""A trainer in a process of its own, and `gpu-cache-smi` beside it, both as they are run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.scripts

ROOT = Path(__file__).parents[2]
TRAINER = """
import os, sys, time, torch
from gpu_cache import CacheConfig, TensorCache, TensorReader

class Node:
    def open(self, keys, timeout_s):
        return [TensorReader("gpu-a-021:35221", keys, lambda: [torch.ones(64 << 10) for _ in keys])]

cache = TensorCache(CacheConfig(pool_bytes="1MiB", slab_bytes="1MiB", device="cpu"))

def fetch(*keys):
    cache.get_many(keys, Node())

def fork():
    child = os.fork()
    if child == 0:
        time.sleep(100)
    return child

for line in sys.stdin:
    print(eval(line), flush=True)
"""
LONG_AGO_S = 60.0


class Trainer:
    """The process, which does what it is told, and the tool's view of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environ = {name: value for name, value in os.environ.items() if name not in ("GPU_CACHE_STATS", "RANK")}
        self.environ = environ | {
            "GPU_CACHE_STATS_DIR": str(folder), "GPU_CACHE_ROLE": "actor", "LOCAL_RANK": "3", "PYTHONPATH": str(ROOT)
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore::DeprecationWarning", "-c", TRAINER], cwd=ROOT, env=self.environ,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def do(self, command: str) -> str:
        """Evaluate an expression there."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def tool(self, *arguments: str) -> tuple[int, str]:
        """The exit code, and everything written."""
        done = subprocess.run(
            [sys.executable, "-m", "gpu_cache.smi", *arguments], cwd=ROOT, env=self.environ, capture_output=True,
            text=True, timeout=60,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    @property
    def seen(self) -> Any:
        """As `--json` has it; the one process there is."""
        (found,) = json.loads(self.tool("--json")[1].partition("\ngpu-cache-smi:")[0])["processes"]
        return found

    def becomes(self, state: str) -> Any:
        deadline = time.monotonic() + 30
        while (found := self.seen)["state"] != state:
            assert time.monotonic() < deadline, found
            time.sleep(0.1)
        return found

    def end(self) -> None:
        self.process.kill()
        self.process.wait(30)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    made = Trainer(tmp_path / "stats")
    yield made
    made.end()


def test_a_trainer_as_the_tool_sees_it(trainer: Trainer) -> None:
    assert trainer.do("len(cache)") == "0"
    assert not trainer.folder.exists(), "nothing before the first use"

    trainer.do("[fetch(str(number)) for number in range(20)]")
    full = trainer.becomes("ok")
    assert (full["pid"], full["role"], full["rank"]) == (trainer.process.pid, "actor", 3)
    assert trainer.do("cache.buffer_stats()['evictions']") == "16"
    assert trainer.tool("--check")[0] == 0, "a full pool is no alarm"

    trainer.do("[cache.clear(), fetch('leaks-1', 'leaks-2', 'a'), cache.clear(['a'])]")
    trainer.do("[fetch('b'), cache.clear(['b'])]")
    leaking = trainer.becomes("leak")
    assert (leaking["outlived_entries"], leaking["outlived_bytes"]) == (2, 2 * (256 << 10))
    assert trainer.tool("--check")[0] == 3
    code, shown = trainer.tool("--leaks", str(trainer.process.pid))
    assert code == 0
    assert "leaks-1" in shown
    assert "leaks-2" in shown
    assert "gpu-a-021:35221" in shown

    trainer.signal(signal.SIGSTOP)
    (report,) = (path for path in trainer.folder.glob("*.json") if ".leaks" not in path.name)
    then = time.time() - LONG_AGO_S
    os.utime(report, (then, then))
    assert trainer.seen["state"] == "hung"
    trainer.signal(signal.SIGCONT)
    trainer.becomes("leak")
    trainer.do("cache.clear()")
    trainer.becomes("ok")

    child = int(trainer.do("fork()"))
    trainer.signal(signal.SIGKILL)
    trainer.process.wait(30)
    try:
        os.kill(child, 0)
        assert trainer.seen["state"] == "dead", "the child keeps no lock"
    finally:
        os.kill(child, signal.SIGKILL)
    assert trainer.tool("--gc")[0] == 0
    assert list(trainer.folder.iterdir()) == []


TWELVE = """
import sys, time, torch
from gpu_cache import CacheConfig, TensorCache

def use():
    made = [TensorCache(CacheConfig(device="cpu")) for _ in range(12)]
    for cache in made:
        cache.put("a", torch.ones(18))
    return made[::2]  # the others are dropped here

kept = use()
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize("status", [0, 1])
def test_twelve_caches_of_a_process_that_ends_leave_nothing(tmp_path: Path, status: int) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("GPU_CACHE_")}
    environ |= {"GPU_CACHE_STATS_DIR": str(tmp_path / "stats"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", TWELVE, str(status)]
    done = subprocess.run(command, cwd=ROOT, env=environ, timeout=60, check=False)
    assert done.returncode == status
    assert list((tmp_path / "stats").iterdir()) == []
    check = [sys.executable, "-m", "gpu_cache.smi", "--check"]
    seen = subprocess.run(check, cwd=ROOT, env=environ, timeout=60, check=False, capture_output=True, text=True)
    assert (seen.returncode, seen.stdout) == (0, "")


def test_a_trainer_that_ends_leaves_nothing(trainer: Trainer) -> None:
    trainer.do("fetch('a')")
    assert len(list(trainer.folder.iterdir())) == 2
    for path in trainer.folder.iterdir():
        path.unlink()
    trainer.folder.rmdir()
    deadline = time.monotonic() + 20
    while not trainer.folder.exists():
        assert time.monotonic() < deadline, "it makes the directory again"
        time.sleep(0.02)
    assert trainer.process.stdin is not None
    trainer.process.stdin.close()
    assert trainer.process.wait(30) == 0
    assert list(trainer.folder.iterdir()) == []
