"""The controller's side of the comparison, in a process of its own: calls engines as AReaL's schedulers do.

Started with the addresses of owner and consumer. Reads lines of JSON, `[measure or message, workload,
fraction]`, and answers each with the seconds of its steps, or the bytes of a message. Needs an installed AReaL.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import sys
import time
from typing import Any

import orjson

from areal.infra.rpc.rtensor import RTensor, flatten_shard_ids
from areal.infra.rpc.serialization import deserialize_value, serialize_value

_PATIENCE_S = 300.0


def post(address: str, route: str, document: dict[str, Any]) -> Any:
    connection = http.client.HTTPConnection(address, timeout=_PATIENCE_S)
    try:
        connection.request("POST", route, orjson.dumps(document), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
    finally:
        connection.close()
    assert answer.status == 200, text[:1000]
    return orjson.loads(text).get("result")


def call(address: str, method: str, *args: Any) -> Any:
    document = {"method": method, "engine_name": "engine", "args": serialize_value(list(args)), "kwargs": {}}
    return deserialize_value(post(address, "/call", document))


def timed(address: str, handles: Any) -> float:
    began = time.perf_counter()
    call(address, "touch", handles)
    return time.perf_counter() - began


def clear(consumer: str, handles: Any) -> None:
    """End the step as AReaL's controller does."""

    async def owners() -> None:
        await asyncio.gather(*(RTensor.clear_node(*owned) for owned in RTensor.collect_shards(handles).items()))

    asyncio.run(owners())
    call(consumer, "clear_batches", flatten_shard_ids(handles))


def measure(owner: str, consumer: str, name: str, fraction: float) -> dict[str, Any]:
    handles = call(owner, "make", name, fraction)
    seen = {"first_s": timed(consumer, handles), "second_s": timed(consumer, handles)}
    began = time.perf_counter()
    clear(consumer, handles)
    seen["clear_s"] = time.perf_counter() - began
    assert not any(sum(call(address, "held").values()) for address in (owner, consumer))
    return seen


def message_bytes(owner: str, consumer: str, name: str, fraction: float) -> dict[str, Any]:
    """A message with handles, before and after this process has read them."""
    handles = call(owner, "make", name, fraction)
    remote = len(orjson.dumps(serialize_value(handles)))
    RTensor.localize(handles)
    seen = {"message_bytes": remote, "localized_message_bytes": len(orjson.dumps(serialize_value(handles)))}
    clear(consumer, handles)
    return seen


if __name__ == "__main__":
    addresses = sys.argv[1:]
    for address in addresses:
        post(address, "/create_engine", {"engine_name": "engine", "engine": "bench.areal_engine.Engine"})
    print("ready", flush=True)
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        work = {"measure": measure, "message": message_bytes}[what]
        print(json.dumps(work(*addresses, *arguments)), flush=True)
