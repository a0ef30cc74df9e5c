"""One step after another with AReaL's own `TrainController`: `controller.py '[[owner, consumer], ...]' rows tokens`.

Prints, for each pair of servers, what it saw, as one line of JSON.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
import time
from types import SimpleNamespace
from typing import Any

import httpx
from areal.infra.controller import TrainController
from engine import Engine, batch, digest

from areal.infra.rpc.rtensor import RTensor, flatten_shard_ids
from areal.infra.rpc.serialization import deserialize_value, serialize_value

logging.basicConfig(level=logging.INFO, stream=sys.stderr)


def post(address: str, route: str, document: dict[str, Any]) -> Any:
    answer = httpx.post(f"http://{address}{route}", json=document, timeout=120, trust_env=False)
    assert answer.status_code == 200, answer.text
    return deserialize_value(answer.json()["result"])


def call(address: str, method: str, *args: Any) -> Any:
    """Call an engine's method as AReaL's schedulers do."""
    document = {"method": method, "engine_name": "engine", "args": serialize_value(list(args)), "kwargs": {}}
    return post(address, "/call", document)


class Scheduler:
    """Calls the engines of the two servers for the controller."""

    def __init__(self, addresses: list[str]) -> None:
        self._addresses = addresses

    async def async_call_engine(
        self, worker_id: str, method: str, engine_name: str, *args: Any, rpc_meta: Any = None, **kwargs: Any
    ) -> Any:
        return call(self._addresses[int(worker_id)], method, *args)


def controller(addresses: list[str], role: str = "default") -> TrainController:
    made = TrainController(Engine, SimpleNamespace(backend=f"fsdp:d{len(addresses)}"), Scheduler(addresses))
    made._worker_role = role
    made.workers = [SimpleNamespace(id=str(number)) for number in range(len(addresses))]
    made.workers_is_dp_head = [True] * len(addresses)
    return made


def timed(address: str, handles: Any) -> float:
    began = time.perf_counter()
    call(address, "touch", handles)
    return time.perf_counter() - began


def step(owner: str, consumer: str, size: tuple[int, int]) -> dict[str, Any]:
    expected = digest(batch(7, *size))
    handles = call(owner, "make", 7, *size)
    first_s, second_s = timed(consumer, handles), timed(consumer, handles)
    seen: dict[str, Any] = {
        "is_exact": [call(address, "digest", handles) == expected for address in (consumer, owner)],
        "message_bytes": len(json.dumps(serialize_value(handles))),
    }
    seen["is_exact"].append(digest(RTensor.localize(handles)) == expected)
    theirs = getattr(serialize_value, "__wrapped__", serialize_value)  # AReaL's own, of which ours is a shortcut
    seen["has_areals_form"] = all(serialize_value(one) == theirs(one) for batch in handles for one in batch.values())
    seen["localized_message_bytes"] = len(json.dumps(serialize_value(handles)))
    seen["unpickled"] = [
        call(owner, "unpickled", call(consumer, "pickled")),
        call(consumer, "unpickled", call(owner, "pickled")),
        Engine.unpickled(None, call(owner, "pickled")),
    ]
    held = len(flatten_shard_ids(handles))
    controller([owner, consumer]).clear_batches(handles)
    seen |= {
        "num_shards": held,
        "owner": call(owner, "facts"),
        "consumer": call(consumer, "facts"),
        "controller": Engine.facts(None),
        "health": httpx.get(f"http://{owner}/health", trust_env=False).json(),
        "first_s": first_s,
        "second_s": second_s,
    }
    if "gpu_cache" in sys.modules:
        seen["doctor"] = importlib.import_module("gpu_cache.rpc.doctor").findings(owner)
    return seen


def create(address: str) -> None:
    httpx.post(f"http://{address}/create_engine", json={"engine_name": "engine", "engine": "engine.Engine"})


if __name__ == "__main__":
    pairs, size = json.loads(sys.argv[1]), (int(sys.argv[2]), int(sys.argv[3]))
    for address in {address for pair in pairs for address in pair}:
        create(address)
    for pair in pairs:
        print(json.dumps(step(*pair, size)), flush=True)
    print("DONE", flush=True)
