"""Owner, node cache and consumer as processes that are killed, stopped and forked: no wrong byte, and nothing stays."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpu_cache import FetchError
from gpu_cache.rpc import runtime
from gpu_cache.rpc.client.http import HttpRTensorBackend
from gpu_cache.rpc.rtensor import clear_fetch_buffer, set_backend
from tests.support.free_port import free_port
from tests.support.interleave_stage import eventually
from tests.support.same_host_process import KEYS, ROOT, Nursery, fetched, num_descriptors, nursery
from tests.support.two_hosts import NUM_CONSUMERS

pytestmark = pytest.mark.scripts


@pytest.fixture(scope="module")
def processes() -> Iterator[Nursery]:
    with nursery() as made:
        yield made


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "node-cache")


@pytest.fixture
def backend(path: str) -> Iterator[HttpRTensorBackend]:
    """This process's: a consumer that survives."""
    runtime.configure(device="cpu")
    backend = HttpRTensorBackend(same_host=True, node_cache=path)
    set_backend(backend)
    yield backend
    backend.close()


class Cast:
    """An owner at one address, a node cache at one path, and a consumer beside this process."""

    def __init__(self, processes: Nursery, path: str) -> None:
        self._processes, self._path = processes, path
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.pids = {who: self.start(who) for who in ("remote_owner", "node_cache", "node_consumer")}

    def start(self, who: str) -> int:
        words = {"remote_owner": [str(self.port)], "node_cache": [self._path]}
        return int(self._processes.start(who, *words.get(who, [self.address, self._path]))["pid"])

    def kill(self, who: str) -> None:
        self._processes.send(self.pids[who], signal.SIGKILL)

    def figures(self) -> Any:
        """Of the node cache, which tells them."""
        os.kill(self.pids["node_cache"], signal.SIGUSR1)
        return self._processes.told()

    def close(self) -> None:
        for who in self.pids:
            self.kill(who)


def transport() -> str:
    (source,) = runtime.current().cache.source_stats().values()
    return source["transport"]


def kill_at_random(processes: Nursery, path: str, rounds: int, seed: int) -> None:
    """Fetch while one of them is killed at any moment, and again when it is back."""
    chance = random.Random(seed)
    cast = Cast(processes, path)
    before: dict[str, tuple[int, int]] = {}
    for number in range(rounds):
        who = list(cast.pids)[number % 3]
        timer = threading.Timer(chance.uniform(0.0, 0.2), cast.kill, (who,))
        timer.start()
        while timer.is_alive():
            with contextlib.suppress(FetchError):
                fetched(cast.address, timeout_s=10.0)
        timer.join()
        cast.pids[who] = cast.start(who)
        fetched(cast.address)
        clear_fetch_buffer(KEYS)
        counts = num_descriptors(), cast.figures()["descriptors"]
        before.setdefault(who, counts)
        assert all(now <= then + 8 for now, then in zip(counts, before[who], strict=True)), (number, counts, before)
    cast.kill("node_consumer")
    cast.kill("remote_owner")
    clear_fetch_buffer(KEYS)
    eventually(lambda: cast.figures()["cached"] == 0)
    eventually(lambda: cast.figures()["shared_bytes"] <= 128 << 20)  # two slabs
    cast.kill("node_cache")


def test_who_is_killed_at_any_moment_costs_no_wrong_byte_and_leaves_nothing(
    processes: Nursery, backend: HttpRTensorBackend, path: str
) -> None:
    kill_at_random(processes, path, rounds=3, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_fifty_that_are_killed_at_any_moment(
    processes: Nursery, backend: HttpRTensorBackend, path: str, seed: int
) -> None:
    kill_at_random(processes, path, rounds=50, seed=seed)


def test_one_that_is_stopped_is_not_waited_for_without_end(
    processes: Nursery, backend: HttpRTensorBackend, path: str
) -> None:
    cast = Cast(processes, path)
    fetched(cast.address)
    assert transport() == "node cache"
    os.kill(cast.pids["node_cache"], signal.SIGSTOP)
    fetched(cast.address, timeout_s=3.0)
    assert transport() == "http"
    os.kill(cast.pids["node_cache"], signal.SIGCONT)
    fetched(cast.address)
    cast.close()


def test_a_forked_child_of_a_consumer_has_connections_of_its_own(processes: Nursery, path: str) -> None:
    cast = Cast(processes, path)
    assert processes.start("forking_node_consumer", cast.address, path)["problems"] == []
    cast.close()


def test_a_killed_one_is_gone_at_once_though_its_child_lives(
    processes: Nursery, backend: HttpRTensorBackend, path: str
) -> None:
    cast = Cast(processes, path)
    fetched(cast.address)
    os.kill(cast.pids["node_cache"], signal.SIGUSR2)
    child = processes.told()["child"]
    cast.kill("node_cache")
    try:
        fetched(cast.address)
        assert transport() == "http"
        cast.pids["node_cache"] = cast.start("node_cache")
        fetched(cast.address)
        assert transport() == "node cache"
    finally:
        os.kill(child, signal.SIGKILL)
        cast.close()


def _lacks_namespaces() -> str:
    """Why there are no network namespaces here; "" if there are."""
    if shutil.which("unshare") is None or shutil.which("ip") is None or shutil.which("nsenter") is None:
        return "needs unshare, nsenter and ip"
    command = ["unshare", "-rn", "ip", "link", "add", "cable1", "type", "veth", "peer", "name", "cable2"]
    tried = subprocess.run(command, capture_output=True, text=True)
    return tried.stderr.strip() if tried.returncode else ""


def test_two_hosts_over_ipv4_and_ipv6_one_of_which_is_cut_off_amid_a_fetch(tmp_path: Path) -> None:
    if why := _lacks_namespaces():
        pytest.skip(f"no network namespaces here: {why}")
    command = ["unshare", "-rn", sys.executable, "-W", "ignore", "-m", "tests.support.two_hosts", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    nbytes = sum(int(key.split(":")[1]) for key in KEYS)
    by_way = {"ways": ["node cache"] * NUM_CONSUMERS, "errors": []}
    for how in ("v4", "v6"):
        assert found[f"2 from 1, {how}"] == found[f"1 from 2, {how}"] == found["again, v6"] == by_way
    assert found["fetched by 1"] == found["fetched by 2"] == 2 * nbytes, "once over each protocol, for all consumers"
    assert found["cut off"]["errors"]
    assert found["again, v4"]["errors"] == []
