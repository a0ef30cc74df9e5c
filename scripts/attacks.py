"""Attack a server as a hostile peer would, and measure what another client notices: a table of rows for the docs.

    python scripts/attacks.py --list
    python scripts/attacks.py slow-headers stopped-readers

Server and attacker are processes of their own. A row says how long `/health` and a fetch take without and under the
attack, in milliseconds (median and worst), how many calls failed, the server's memory at its highest in MB, and how
many seconds after SIGTERM the server has ended.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import resource
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu_cache.rpc.client.http import HttpRTensorBackend
from gpu_cache.rpc.shard import ShardFetchError, TensorShardInfo
from gpu_cache.rpc.wire.frame import CONTENT_TYPE, Frame

NUM_SLOW = 3000
NUM_UNREAD = 400
NUM_PLACES = 32
_MEASURED_S = 12.0
_WARM_S = 3.0
_SETTLING_S = 3.0  # three thousand connections are not accepted at once
_HEAD = "Host: localhost\r\nAccept: {accept}\r\nContent-Length: {length}\r\n\r\n"


@contextlib.contextmanager
def connections(address: str, count: int, sent: bytes) -> Iterator[list[socket.socket]]:
    """Open connections and send some bytes over each."""
    host, port = address.split(":")
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(count)]
        for sock in opened:
            sock.sendall(sent)
        yield opened


def request(method: str, path: str, body: bytes, accept: str = CONTENT_TYPE) -> bytes:
    """A request as it is sent."""
    return f"{method} {path} HTTP/1.1\r\n{_HEAD.format(accept=accept, length=len(body))}".encode() + body


def asking(*shard_ids: str, accept: str = CONTENT_TYPE) -> bytes:
    """A request for shards."""
    return request("POST", "/data/batch", json.dumps({"shard_ids": shard_ids}).encode(), accept)


def slow_headers(address: str) -> Iterator[None]:
    """3,000 connections send 90 bytes of a header, and then one byte a second."""
    yield from drip(address, request("GET", "/health", b"")[:90])


def no_bodies(address: str) -> Iterator[None]:
    """3,000 connections ask for shards and keep the body to themselves."""
    yield from hold(address, request("POST", "/data/batch", b"x" * 99)[:-99], NUM_SLOW)


def drip_bodies(address: str) -> Iterator[None]:
    """3,000 connections put shards, one byte a second."""
    yield from drip(address, request("PUT", "/data/slow", b"x" * 9999)[:-9999])


def drip(address: str, sent: bytes) -> Iterator[None]:
    """One byte a second over each connection; those that the server closes come again no more."""
    with connections(address, NUM_SLOW, sent) as held:
        while True:
            for sock in held:
                with contextlib.suppress(OSError):
                    sock.send(b"x", socket.MSG_DONTWAIT)
            yield


def unread(address: str) -> Iterator[None]:
    """400 connections ask for 6 MiB of small shards each, and read nothing."""
    yield from hold(address, asking(*(f"small{number}" for number in range(64))), NUM_UNREAD)


def unread_json(address: str) -> Iterator[None]:
    """400 connections ask for 6 MiB in the JSON form, and read nothing."""
    yield from hold(address, asking("medium", accept="*/*"), NUM_UNREAD)


def stopped_readers(address: str) -> Iterator[None]:
    """As many connections as there are places ask for 256 MiB, and read nothing."""
    yield from hold(address, asking("large"), NUM_PLACES)


def hold(address: str, sent: bytes, count: int) -> Iterator[None]:
    """Clients that send once, and neither read nor end."""
    with connections(address, count, sent):
        while True:
            yield


def brackets(address: str) -> Iterator[None]:
    """One connection puts 30 MB of `[[],[],...]` again and again."""
    yield from repeatedly(address, request("PUT", "/data/x", b"[" + b"[]," * 10_000_000 + b"[]]"))


def many_ids(address: str) -> Iterator[None]:
    """One connection asks for three million shards again and again."""
    yield from repeatedly(address, asking(*["x"] * 3_000_000))


def repeats(address: str) -> Iterator[None]:
    """One connection asks for one shard of 6 MiB 20,000 times, in the JSON form, and reads nothing."""
    yield from hold(address, asking(*["medium"] * 20_000, accept="*/*"), 1)


def repeatedly(address: str, sent: bytes) -> Iterator[None]:
    """One request after another, each over a connection of its own."""
    while True:
        with contextlib.suppress(OSError), connections(address, 1, sent) as (sock,):
            sock.recv(1 << 16)
        yield


ATTACKS: dict[str, Callable[[str], Iterator[None]]] = {
    name.__name__.replace("_", "-"): name
    for name in (
        slow_headers,
        no_bodies,
        drip_bodies,
        unread,
        unread_json,
        stopped_readers,
        brackets,
        many_ids,
        repeats,
    )
}


@contextlib.contextmanager
def served(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process that has the shards that the attacks ask for."""
    command = [sys.executable, "-m", "gpu_cache.rpc.server", "--log-level", "ERROR", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1]
        put(address, "large", torch.zeros(256 << 20, dtype=torch.uint8))
        put(address, "medium", torch.zeros(6 << 20, dtype=torch.uint8))
        for number in range(64):
            put(address, f"small{number}", torch.zeros(96 << 10, dtype=torch.uint8))
        try:
            yield process, address
        finally:
            process.kill()  # if it has not ended


def put(address: str, shard_id: str, tensor: torch.Tensor) -> None:
    """Keep a tensor at a server."""
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request(
        "PUT", f"/data/{shard_id}", b"".join(Frame([(shard_id, tensor)])), {"Content-Type": CONTENT_TYPE}
    )
    assert connection.getresponse().status == 200
    connection.close()


@contextlib.contextmanager
def attacked(name: str, address: str) -> Iterator[None]:
    """An attack by a process of its own, from the moment at which its load is there."""
    command = [sys.executable, __file__, "--attack", name, address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "attacking\n"
        try:
            yield
        finally:
            process.kill()


def attack(name: str, address: str) -> None:
    """Attack until this process is killed."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    steps = ATTACKS[name](address)
    next(steps)
    print("attacking", flush=True)
    for _ in steps:
        time.sleep(1.0 if name not in ("brackets", "many-ids") else 0.05)


def health(address: str) -> None:
    """Ask for `/health`."""
    connection = http.client.HTTPConnection(address, timeout=60)
    try:
        connection.request("GET", "/health")
        assert connection.getresponse().read()
    finally:
        connection.close()


def fetch(address: str) -> None:
    """Fetch a shard, as a trainer does: a connection that is kept, a minute's patience."""
    backend = HttpRTensorBackend()
    try:
        backend.fetch([TensorShardInfo("small0", address)])
    finally:
        backend.close()


def sampled(look: Callable[[str], None], address: str, seconds: float, into: dict[str, Any]) -> None:
    """Milliseconds of each call for some seconds, and how many failed."""
    times, num_failed = [], 0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        began = time.monotonic()
        try:
            look(address)
            times.append(1000 * (time.monotonic() - began))
        except (ShardFetchError, OSError, http.client.HTTPException):
            num_failed += 1
        time.sleep(0.05)
    into[look.__name__] = (times or [float("inf")], num_failed)


def measured(process: subprocess.Popen[str], address: str, seconds: float) -> dict[str, Any]:
    """Samples of both calls, beside each other, and the server's memory at its highest."""
    found: dict[str, Any] = {}
    threads = [threading.Thread(target=sampled, args=(look, address, seconds, found)) for look in (health, fetch)]
    for thread in threads:
        thread.start()
    found["rss"] = 0
    while any(thread.is_alive() for thread in threads):
        found["rss"] = max(found["rss"], rss_mb(process.pid))
        time.sleep(0.05)
    return found


def rss_mb(pid: int) -> int:
    """Resident memory, in MB."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) // 1000


def shown(found: dict[str, Any], name: str) -> str:
    """Median and worst, and what failed."""
    times, num_failed = found[name]
    failed = f", {num_failed} of {num_failed + len(times)} failed" if num_failed else ""
    return f"{statistics.median(times):.1f} / {max(times):.0f}{failed}"


def row(name: str) -> str:
    """One row of the table."""
    with served() as (process, address):
        before = measured(process, address, _WARM_S)
        with attacked(name, address):
            time.sleep(_SETTLING_S)
            under = measured(process, address, _MEASURED_S)
            process.terminate()
            began = time.monotonic()
            process.wait(60)
            end_s = time.monotonic() - began
    cells = [name, *(f"{shown(before, call)} | {shown(under, call)}" for call in ("health", "fetch"))]
    return f"| {' | '.join(cells)} | {before['rss']:,} | {under['rss']:,} | {end_s:.1f} |"


def main() -> int:
    """Print the table of some attacks, or of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="which attacks; all if none is named")
    parser.add_argument("--list", action="store_true", help="say what there is")
    parser.add_argument("--attack", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.attack:
        attack(*options.attack)
    elif options.list:
        print("\n".join(f"{name:16} {function.__doc__}" for name, function in ATTACKS.items()))
    else:
        print("| attack | health | under attack | fetch | under attack | MB | under attack | SIGTERM |")
        print("|---|---|---|---|---|---|---|---|")
        for name in options.names or ATTACKS:
            print(row(name), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
