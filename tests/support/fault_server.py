"""A server on loopback that does, request by request, what a test wrote down."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gpu_cache.rpc.wire.frame import CONTENT_TYPE, Frame, OwnedShard
from gpu_cache.rpc.wire.serialization import tensor_to_json


@dataclass(frozen=True)
class Asked:
    """One request as it came."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def shard_ids(self) -> list[Any]:
        return json.loads(self.body)["shard_ids"]


# The bytes of a whole answer, status line to last byte of the body.
Answer = Callable[[Asked], bytes]


class Exchange:
    """One request and the socket to answer it on."""

    def __init__(self, sock: socket.socket, asked: Asked, is_over: threading.Event) -> None:
        self.sock, self.asked = sock, asked
        self._is_over = is_over

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def reset(self) -> None:
        """End the connection by a reset: what the client has not read yet may be lost with it."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.hang_up()

    def hang_up(self) -> None:
        raise EOFError

    def wait(self, seconds: float | None = None) -> None:
        """Let time pass, until the test is over at the latest."""
        if self._is_over.wait(seconds):
            raise EOFError


Step = Callable[[Exchange], None]


class FaultServer:
    """Takes one step of the script for each request, in the order in which they come; the last one repeats.

    Attributes:
        asked: Requests so far.
        num_connections: Connections so far.
        has_been_asked: Set with each request, before it is answered.
    """

    def __init__(self, *script: Step, host: str = "127.0.0.1", port: int = 0) -> None:
        self.script: Sequence[Step] = script
        self.asked: list[Asked] = []
        self.num_connections = 0
        self.has_been_asked = threading.Event()
        self._is_over = threading.Event()
        self._lock = threading.Lock()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family)
        self.port = self._listener.getsockname()[1]
        self.address = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def wanted(self) -> list[list[Any]]:
        """The shard ids of each request."""
        return [asked.shard_ids for asked in self.asked]

    def hang_up(self) -> None:
        """Close the connections, not the server."""
        with self._lock:
            sockets, self._sockets = self._sockets, []
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._is_over.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join(30)
        self._listener.close()
        self.hang_up()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()

    def __enter__(self) -> FaultServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self.num_connections += 1
                self._sockets.append(sock)
            self._threads.append(threading.Thread(target=self._serve, args=(sock,), daemon=True))
            self._threads[-1].start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, sock.makefile("rb") as stream, contextlib.suppress(OSError, EOFError):
            while (asked := _read_request(stream)) is not None:
                with self._lock:
                    step = self.script[min(len(self.asked), len(self.script) - 1)]
                    self.asked.append(asked)
                self.has_been_asked.set()
                step(Exchange(sock, asked, self._is_over))


def _read_request(stream: Any) -> Asked | None:
    first = stream.readline()
    if not first.strip():
        return None
    headers = {}
    while line := stream.readline().strip():
        name, _, value = line.decode().partition(":")
        headers[name.lower()] = value.strip()
    method, path, _ = first.decode().split(" ", 2)
    length = int(headers.get("content-length", 0))
    body = stream.read(length)
    return Asked(method, path, headers, body) if len(body) == length else None  # the client is gone


def reply(
    body: bytes = b"",
    status: str = "200 OK",
    content_type: str = CONTENT_TYPE,
    length: int | None = None,
    **headers: str,
) -> bytes:
    """An answer; `length` is what it announces, if that is not the truth. `Retry_After="3"` is a header."""
    lines = [
        f"HTTP/1.1 {status}",
        f"Content-Type: {content_type}",
        f"Content-Length: {len(body) if length is None else length}",
        *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def frame(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """All of these tensors as their owner sends them."""
    return b"".join(map(bytes, Frame(numbered(tensors).items())))


def numbered(tensors: Mapping[str, torch.Tensor], first: int = 1) -> dict[str, OwnedShard]:
    """The tensors as a store numbers them that got them in this order."""
    shards = {shard_id: OwnedShard(tensor) for shard_id, tensor in tensors.items()}
    for number, shard in enumerate(shards.values(), first):
        shard.number(number)
    return shards


def raw_frame(header: Any, payload: bytes = b"") -> bytes:
    """A frame with any header; text is taken as it is."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + payload


def frames_of(tensors: Mapping[str, torch.Tensor], first: int = 1) -> Answer:
    """The answers of a healthy owner of these tensors, numbered from `first` on; it names no incarnation."""

    def answer(asked: Asked) -> bytes:
        if missing := [shard_id for shard_id in asked.shard_ids if shard_id not in tensors]:
            return refusal(400, json.dumps({"status": "error", "missing_shard_ids": missing}))
        shards = numbered(tensors, first)
        return reply(b"".join(map(bytes, Frame((shard_id, shards[shard_id]) for shard_id in asked.shard_ids))))

    return answer


def by(incarnation: str, answer: Answer) -> Answer:
    """The same answer, from a server that names itself."""

    def named(asked: Asked) -> bytes:
        status, _, rest = answer(asked).partition(b"\r\n")
        return status + f"\r\nX-Shard-Incarnation: {incarnation}\r\n".encode() + rest

    return named


def json_of(tensors: Mapping[str, torch.Tensor]) -> Answer:
    """The answers of a server of upstream's, for every `Accept`."""

    def answer(asked: Asked) -> bytes:
        described = [tensor_to_json(tensors[shard_id]) for shard_id in asked.shard_ids]
        return reply(json.dumps(described).encode(), content_type="application/octet-stream")

    return answer


def refusal(status: int, text: str = "no", **headers: str) -> bytes:
    return reply(text.encode(), f"{status} Status", "application/json", **headers)


def whole(answer: Answer | bytes) -> Step:
    """Send it all."""
    return lambda exchange: exchange.send(_bytes_of(answer, exchange))


def cut(answer: Answer | bytes, num_body_bytes: int, *, by_reset: bool = False) -> Step:
    """Send the headers and so many bytes of the body, then end the connection."""

    def step(exchange: Exchange) -> None:
        head, _, body = _bytes_of(answer, exchange).partition(b"\r\n\r\n")
        exchange.send(head + b"\r\n\r\n" + body[:num_body_bytes])
        if by_reset:
            exchange.reset()
        exchange.hang_up()

    return step


def dripping(answer: Answer | bytes, num_at_once: int, every_s: float = 0.01) -> Step:
    """Send the first bytes at once, and then one after another."""

    def step(exchange: Exchange) -> None:
        data = _bytes_of(answer, exchange)
        exchange.send(data[:num_at_once])
        for position in range(num_at_once, len(data)):
            exchange.wait(every_s)
            exchange.send(data[position : position + 1])

    return step


class Flood:
    """A step that sends a beginning, and then bytes for as long as the client takes them.

    Attributes:
        num_sent: Bytes behind the beginning, by all that were asked for.
    """

    def __init__(self, beginning: bytes, piece: bytes = bytes(1 << 18), most: int = 256 << 20) -> None:
        self.num_sent = 0
        self._beginning, self._piece, self._most = beginning, piece, most

    def __call__(self, exchange: Exchange) -> None:
        exchange.send(self._beginning)
        while self.num_sent < self._most:
            exchange.send(self._piece)
            self.num_sent += len(self._piece)


def silent(exchange: Exchange) -> None:
    """Send nothing, and keep the connection."""
    exchange.wait()


def hanging_up(exchange: Exchange) -> None:
    exchange.hang_up()


def _bytes_of(answer: Answer | bytes, exchange: Exchange) -> bytes:
    return answer if isinstance(answer, bytes) else answer(exchange.asked)
