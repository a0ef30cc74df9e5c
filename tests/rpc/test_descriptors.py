"""A process with few file descriptors: it waits for its own, gives idle ones up, and blames no owner."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.support.fault_server import Asked, FaultServer, frames_of, whole

# Of a process that may have a hundred, at 150 owners. Says what it got.
PROGRAM = """
import json, os, resource, sys
import torch
from gpu_cache.rpc import runtime
from gpu_cache.rpc.client.pool import Place
from gpu_cache.rpc.rtensor import RTensor, TensorShardInfo, get_backend
from gpu_cache import FetchError

PORT = sys.argv[1]
runtime.configure(device="cpu")
pool = get_backend()._connections
said = {}


def handles(*kinds, owners=range(1, 151), host="127.0.0.{}"):
    like = torch.empty(2, dtype=torch.int64, device="meta")
    return {
        (owner, kind): RTensor(TensorShardInfo(f"{owner}.{kind}", f"{host.format(owner)}:{PORT}"), like)
        for owner in owners
        for kind in kinds
    }


def num_right(wanted):
    got = RTensor.localize(wanted, on_error="none")
    return sum(tensor is not None and tuple(tensor.tolist()) == key for key, tensor in got.items())


def take_descriptors(but=0):
    taken = []
    try:
        while True:
            taken.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        for _ in range(but):
            os.close(taken.pop())
    return taken


def refusal(wanted):
    try:
        RTensor.localize(wanted)
    except FetchError as error:
        return [type(one).__name__ + ": " + str(one) for one in error.failures.values()]


num_right(handles(0, owners=[1]))  # what is opened once
resource.setrlimit(resource.RLIMIT_NOFILE, (100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
said["of 300"] = num_right(handles(1, 2))
said["idle"] = len(pool._idle)
taken = take_descriptors(but=3)
said["of 150, with three left"] = num_right(handles(3))
pool.make_room(Place())
taken += take_descriptors()
said["none left"] = refusal(handles(4, owners=[7]))
said["none left, by name"] = refusal(handles(4, owners=["localhost"], host="{}"))
for one in taken:
    os.close(one)
sources = runtime.current().cache.source_stats()
said["by source"] = {node: one["fetch_errors_by_reason"] for node, one in sources.items()}
said["of 150, in the end"] = num_right(handles(5))
json.dump(said, sys.stdout)
"""


def owner(asked: Asked) -> bytes:
    """Each shard says its owner and its kind."""
    return frames_of({name: torch.tensor([int(part) for part in name.split(".")]) for name in asked.shard_ids})(asked)


@pytest.fixture(scope="module")
def said() -> dict[str, Any]:
    with FaultServer(whole(owner), host="0.0.0.0") as server:
        command = [sys.executable, "-c", PROGRAM, str(server.port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def test_more_owners_than_descriptors_are_fetched_from_in_turns(said: dict[str, Any]) -> None:
    assert said["of 300"] == 300
    assert 0 < said["idle"] <= 25


def test_idle_connections_are_given_up_where_the_program_took_the_descriptors(said: dict[str, Any]) -> None:
    assert said["of 150, with three left"] == 150


def test_where_none_is_left_the_error_says_so_and_blames_no_node(said: dict[str, Any]) -> None:
    for (text,) in (said["none left"], said["none left, by name"]):
        assert text.startswith("ShardLocalError: Failed to fetch shards from http://")
        assert "this process may have 100 file descriptors, raise that (RLIMIT_NOFILE, ulimit -n)" in text
    blamed = {node: reasons for node, reasons in said["by source"].items() if reasons}
    assert blamed == {"local": {"local": 2}}


def test_when_there_are_descriptors_again_all_is_as_before(said: dict[str, Any]) -> None:
    assert said["of 150, in the end"] == 150
