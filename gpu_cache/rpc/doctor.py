"""Whether the switch works here: `python -m gpu_cache.rpc.doctor [host:port]`.

It imports what a process of AReaL imports, in this environment and with its variables, and says what it got. With an
address it asks that server as our client would. Exit 1: something does not work as the variables ask for.
"""

from __future__ import annotations

import argparse
import http.client
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import gpu_cache
from gpu_cache.config import CacheConfig
from gpu_cache.device.cuda import torch_cuda
from gpu_cache.device.placement import choose_device
from gpu_cache.rpc import adopt
from gpu_cache.rpc.adopt import Finding
from gpu_cache.rpc.client.connection import split_address
from gpu_cache.rpc.shard import INCARNATION_HEADER
from gpu_cache.rpc.tokens import TOKEN_VARIABLE, find_token
from gpu_cache.rpc.wire.frame import CONTENT_TYPE

_PATIENCE_S = 10.0


def findings(address: str | None = None) -> list[Finding]:
    """Look at this process, and at a server.

    Args:
        address: The server's `host:port`; None asks none.
    """
    found = [
        Finding("gpu_cache", f"{gpu_cache.__version__} in {Path(gpu_cache.__file__).parent}"),
        Finding("torch", torch.__version__),
        *_switch(),
        _device(),
    ]
    return found if address is None else [*found, *_server(address)]


def _switch() -> list[Finding]:
    found = adopt.findings()
    is_there = any(one.what == "switch" and one.is_good for one in found)
    return [*found, *map(_imported, adopt.SERVED)] if is_there else found


def _imported(name: str) -> Finding:
    """The package whose module a process gets under AReaL's name."""
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        return Finding(name, f"cannot be imported: {error}", is_good=False)
    return Finding(name, f"is {module.__name__} in {module.__file__}")


def _device() -> Finding:
    try:
        chosen = choose_device(CacheConfig.from_env().device)
    except (RuntimeError, ValueError) as error:
        return Finding("device", str(error), is_good=False)
    later = "" if chosen.is_final else f"; one that has, uses one of {torch_cuda.device_count()} GPUs"
    return Finding("device", f"{chosen.device.torch_device}: {chosen.reason}{later}")


def _server(address: str) -> list[Finding]:
    try:
        status, headers, body = _ask(address, "GET", "/health")
    except ValueError as error:  # the address, or the token
        return [Finding("server", f"{address} cannot be asked: {error}", is_good=False)]
    except (OSError, http.client.HTTPException) as error:
        return [Finding("server", f"{address} cannot be reached: {error!r}", is_good=False)]
    found = [Finding("server", f"{address} answers /health with {status}{_figures(body)}", is_good=status == 200)]
    try:
        status, headers, body = _ask(address, "POST", "/data/batch", json.dumps({"shard_ids": []}).encode())
    except (OSError, http.client.HTTPException) as error:
        return [*found, Finding("frames", f"/data/batch is not answered: {error!r}", is_good=False)]
    return [*found, _frames(status, headers, body)]


def _frames(status: int, headers: http.client.HTTPMessage, body: bytes) -> Finding:
    if status == 401:
        return Finding("frames", f"refused: the token in {TOKEN_VARIABLE} is not the server's", is_good=False)
    if status != 200:
        return Finding("frames", f"/data/batch is answered with {status}: {body[:200]!r}", is_good=False)
    if headers.get("Content-Type", "") != CONTENT_TYPE:
        return Finding("frames", "JSON: the server is AReaL's own, and its process has the switch off")
    return Finding("frames", f"binary, incarnation {headers.get(INCARNATION_HEADER, 'unknown')}")


def _figures(body: bytes) -> str:
    try:
        document = json.loads(body)
        return f", {document['num_tensors']:,} tensors of {document['total_bytes']:,} bytes"
    except (ValueError, KeyError, TypeError):
        return ""


def _ask(address: str, method: str, path: str, body: bytes | None = None) -> tuple[int, http.client.HTTPMessage, bytes]:
    token = find_token()
    headers = {"Accept": CONTENT_TYPE, "Content-Type": "application/json"}
    headers |= {"Authorization": f"Bearer {token}"} if token else {}
    connection = http.client.HTTPConnection(*split_address(address), timeout=_PATIENCE_S)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the findings."""
    parser = argparse.ArgumentParser(prog="python -m gpu_cache.rpc.doctor", description=__doc__)
    parser.add_argument("address", nargs="?", help="host:port of a server to ask")
    found = findings(parser.parse_args(arguments).address)
    width = max(len(finding.what) for finding in found)
    for finding in found:
        print(f"{'ok ' if finding.is_good else 'BAD'} {finding.what:<{width}}  {finding.text}")
    return 0 if all(finding.is_good for finding in found) else 1


if __name__ == "__main__":
    sys.exit(main())
