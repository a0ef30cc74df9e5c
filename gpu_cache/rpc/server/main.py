"""The server of this process's shards: `python -m gpu_cache.rpc.server`, or `start()` inside an owner."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from aiohttp import web

from gpu_cache.config import parse_size, seconds, whole
from gpu_cache.hosts import HostRule, is_loopback
from gpu_cache.process import OwnThread, forget_sockets, leave_to_parent
from gpu_cache.rpc import runtime
from gpu_cache.rpc.server import same_host
from gpu_cache.rpc.server.app import make_app
from gpu_cache.rpc.server.connections import Connection, Connections, find_dead_peers, raise_descriptor_limit
from gpu_cache.rpc.server.expiry import ShardExpiry, option, parse_seconds
from gpu_cache.rpc.server.requests import DEFAULT_MAX_BODY_BYTES, DEFAULT_MAX_RESPONSES, DataOwner
from gpu_cache.rpc.server.same_host import SameHostServer
from gpu_cache.rpc.tokens import TOKEN_VARIABLE, find_token, read_token_file

try:
    from uvloop import new_event_loop
except ImportError:  # not on this platform; asyncio's own loop serves too, at a lower rate
    from asyncio import new_event_loop  # type: ignore[assignment]

ALLOW_VARIABLE = "AREAL_RPC_ALLOW_UNAUTHENTICATED"

# Longest wait for answers under way when the server stops, and then for what serves them to end.
_GRACE_S = 2.5
_ENDING_S = 0.5
_BACKLOG = 4096
_SHORTEST_S = 1e-3  # the shortest time limit
_DESCRIPTORS = "/proc/self/fd"
DEFAULT_MAX_CONNECTIONS = 8192
DEFAULT_HEADER_TIMEOUT_S = 30.0
DEFAULT_BODY_TIMEOUT_S = 30.0
# A trainer keeps one connection to each node and may think for long between two steps.
DEFAULT_IDLE_TIMEOUT_S = 3600.0
# Flags of AReaL's launchers; their settings have no meaning here.
_IGNORED_FLAGS = (
    "--experiment-name",
    "--trial-name",
    "--role",
    "--worker-index",
    "--name-resolve-type",
    "--nfs-record-root",
    "--etcd3-addr",
    "--fileroot",
    "--werkzeug-log-level",
)

logger = logging.getLogger(__name__)


class ServedOwner(DataOwner, Protocol):
    """An owner that is told under which addresses it is served, so that it need not ask itself over the network."""

    def add_own_address(self, address: str) -> None: ...

    def remove_own_address(self, address: str) -> None: ...


class ServerHandle:
    """A server on a thread of its own. A context manager: leaving it stops the server, as does the process's end.

    Args:
        owner: The owner of the served shards.
        app: The application to serve.
        connections: Keeps those of the application.
        listener: A listening socket; the server closes it.
        address: Where others find it.
        memory: Serves the same shards to processes of this host; ends with this one.
    """

    def __init__(
        self,
        owner: ServedOwner,
        app: web.Application,
        connections: Connections,
        listener: socket.socket,
        address: str,
        memory: SameHostServer | None = None,
    ) -> None:
        self.address, self._memory = address, memory
        self._owner, self._connections = owner, connections
        self._runner = web.AppRunner(app, handle_signals=False, shutdown_timeout=_ENDING_S / 2)
        self._listener, self._port = listener, int(listener.getsockname()[1])
        self._loop = new_event_loop()
        self._stopping = asyncio.Event()
        self._is_inherited = self._is_stopped = False
        owner.add_own_address(address)
        self._thread = OwnThread(self._run, f"areal-rpc-server-{address}", self._ask_to_stop, is_server=True)
        try:
            self._thread.start()
        except RuntimeError:  # the system has no thread left
            owner.remove_own_address(address)
            self._loop.close()
            raise
        leave_to_parent(self)

    def stop(self) -> None:
        """Stop serving, once the answers under way are sent, or 2.5 s have passed. Idempotent; any thread."""
        if not self._is_stopped:  # else the address may be another server's by now
            self._owner.remove_own_address(self.address)
            self._is_stopped = True
        if not self._is_inherited:
            if self._memory is not None:
                self._memory.stop()
            self._ask_to_stop()
            self._thread.join()

    def disown(self) -> object:
        """Close listener and connections in a forked child, which else keeps them open when the owner is gone."""
        self._is_inherited = True
        connections = self._runner.server.connections if self._runner.server is not None else ()
        transports = [one.transport for one in connections if one.transport is not None]
        sockets = [self._listener, *(transport.get_extra_info("socket") for transport in transports)]
        unknown = set() if self._loop.is_closed() else _sockets_at(self._port)
        forget_sockets(unknown.union(one.fileno() for one in sockets if one is not None))
        return self

    def _ask_to_stop(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: stopped before
            self._loop.call_soon_threadsafe(self._stopping.set)

    def _run(self) -> None:
        with contextlib.closing(self._loop):
            self._loop.run_until_complete(self._serve())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())

    async def _serve(self) -> None:
        await self._runner.setup()
        listening = await self._loop.create_server(self._connection, sock=self._listener, backlog=_BACKLOG)
        watching = asyncio.create_task(self._connections.watch())
        await self._stopping.wait()
        watching.cancel()
        listening.close()
        await self._connections.settle(_GRACE_S)
        await self._runner.cleanup()
        await _end_tasks()

    def _connection(self) -> Connection:
        assert self._runner.server is not None
        return Connection(
            self._connections,
            self._runner.server,
            loop=self._loop,
            access_log=None,
            auto_decompress=False,  # a small body must not become a large one
        )

    def __enter__(self) -> ServerHandle:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"ServerHandle({self.address}, {'serving' if self._thread.is_alive() else 'stopped'})"


def start(
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    token: str | None = None,
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
    max_concurrent_responses: int = DEFAULT_MAX_RESPONSES,
    allow_unauthenticated: bool = False,
    allow_hosts: Iterable[str] = (),
    shard_ttl_s: float | str | None = None,
    header_timeout_s: float = DEFAULT_HEADER_TIMEOUT_S,
    body_timeout_s: float = DEFAULT_BODY_TIMEOUT_S,
    idle_timeout_s: float = DEFAULT_IDLE_TIMEOUT_S,
    max_connections: int = DEFAULT_MAX_CONNECTIONS,
    owner: ServedOwner | None = None,
) -> ServerHandle:
    """Serve shards from a thread of this process.

    Args:
        host: Address or name to bind. Behind a wildcard address the server cannot know what others call it; tell the
            runtime with `add_own_address`.
        port: 0 takes a free one.
        token: The token that clients must show; None takes it from `AREAL_RPC_TOKEN`. White space around it is dropped.
        max_body_bytes: The longest request body.
        max_concurrent_responses: Answers with tensors under way at once; clients beyond are told to come back.
        allow_unauthenticated: Serve other hosts without a token; `AREAL_RPC_ALLOW_UNAUTHENTICATED=1` says the same.
        allow_hosts: Names under which clients may ask a server that is bound to the loopback, beside the loopback's own
            and `host`; and the hosts whose web pages may ask any server. A page that points its name at this machine
            would else read and delete shards through a browser here.
        shard_ttl_s: Drop shards that are older, in seconds or as text ("10m", "2h"): a backstop for those that no
            client clears. Longer than anything is meant to live, weights too. None: they stay.
        header_timeout_s: The longest time for the header of a request, in seconds; `math.inf` for no limit, as below.
        body_timeout_s: The longest time for each 64 KiB of a request's body, or for the rest of it.
        idle_timeout_s: The longest time between two requests of one connection.
        max_connections: Connections at once. Beyond these, or where this process is about to run out of descriptors,
            the server closes the ones that it waited for longest. It raises this process's soft limit of descriptors.
        owner: The owner of the served shards; None means this process's runtime.

    Returns:
        The handle; the server already accepts connections.

    Raises:
        OSError: The address cannot be bound.
        ValueError: Other hosts could reach the server, there is no token, and `allow_unauthenticated` is off. Or the
            token is not one line of printable ASCII, or a limit, `shard_ttl_s` or `port` is out of range.
        TypeError: `allow_hosts` is no list of names.
        RuntimeError: The system has no thread left.
    """
    max_body_bytes = whole(max_body_bytes, "max_body_bytes", least=1)
    max_concurrent_responses = whole(max_concurrent_responses, "max_concurrent_responses", least=1)
    max_connections = whole(max_connections, "max_connections", least=1)
    header_timeout_s = seconds(header_timeout_s, "header_timeout_s", least=_SHORTEST_S)
    body_timeout_s = seconds(body_timeout_s, "body_timeout_s", least=_SHORTEST_S)
    idle_timeout_s = seconds(idle_timeout_s, "idle_timeout_s", least=_SHORTEST_S)
    token = find_token(token)
    family, location = _resolve(host, port)
    if not (token or allow_unauthenticated or os.environ.get(ALLOW_VARIABLE) == "1"):
        _check_local(host, location[0])
    served = runtime.current() if owner is None else owner
    expiry = None if shard_ttl_s is None else ShardExpiry(served.store, parse_seconds(shard_ttl_s), served.evict)
    if isinstance(allow_hosts, str):
        raise TypeError(f"allow_hosts={allow_hosts!r}: must be a list of names")
    rule = HostRule(location[0], allow_hosts, [host.strip("[]")])
    raise_descriptor_limit()
    incarnation = uuid.uuid4().hex
    connections = Connections(max_connections, header_timeout_s, idle_timeout_s)
    with contextlib.ExitStack() as unless_served:
        listener = unless_served.enter_context(socket.create_server(location, family=family, backlog=_BACKLOG))
        find_dead_peers(listener)
        memory = same_host.opened(served.store, incarnation)
        if memory is not None:
            unless_served.callback(memory.stop)
        app = make_app(
            served,
            token=token,
            rule=rule,
            connections=connections,
            body_timeout_s=body_timeout_s,
            max_body_bytes=max_body_bytes,
            max_responses=max_concurrent_responses,
            expiry=expiry,
            incarnation=incarnation,
            memory=memory,
        )
        handle = ServerHandle(served, app, connections, listener, _address(listener), memory)
        unless_served.pop_all()
    return handle


async def _end_tasks() -> None:
    """End what serves connections that are gone, as a wait for the rest of a body that was refused."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left, timeout=_ENDING_S)


def _sockets_at(port: int) -> set[int]:
    """Descriptors of this process's TCP sockets at a local port: also those that the loop accepted and has not told of.

    Empty where the system does not list descriptors.
    """
    found = set()
    for name in os.listdir(_DESCRIPTORS) if os.path.isdir(_DESCRIPTORS) else ():
        with contextlib.suppress(OSError):  # no socket, or no descriptor any more
            one = socket.socket(fileno=int(name))
            try:
                if one.family in (socket.AF_INET, socket.AF_INET6) and one.type == socket.SOCK_STREAM:
                    found.update([one.fileno()] if one.getsockname()[1] == port else [])
            finally:
                one.detach()  # it is not ours to close
    return found


def _check_local(host: str, address: str) -> None:
    """Raise `ValueError` for an address that other hosts reach, where clients show no token."""
    if not is_loopback(address):
        raise ValueError(
            f"refusing to serve other hosts on {host} without a token. Bind 127.0.0.1; or set a token, with "
            f"token=, --token-file or {TOKEN_VARIABLE}; or, on a network where every host may read and delete shards, "
            f"say so with allow_unauthenticated=True, --allow-unauthenticated or {ALLOW_VARIABLE}=1"
        )


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int]]:
    """The one address to bind; IPv4 where a name has both."""
    if type(port) is not int or not 0 <= port <= 0xFFFF:  # the resolver takes the rest of a division
        raise ValueError(f"port={port!r}: must be 0, for a free one, or 1 to 65535")
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise OSError(error.errno, f"host={host!r}: {error.strerror}") from error
    family, _, _, _, location = min(found, key=lambda info: info[0] != socket.AF_INET)
    return family, (str(location[0]), int(location[1]))


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT."""
    parser = _parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(level=options.log_level)
    _log_ignored(vars(options))
    try:
        token = None if options.token_file is None else read_token_file(options.token_file)
        shard_ttl_s = None if options.shard_ttl is None else parse_seconds(options.shard_ttl)
        ending = readable_on(signal.SIGTERM, signal.SIGINT)
        server = start(
            options.host,
            options.port,
            token=token,
            max_body_bytes=options.max_body_bytes,
            max_concurrent_responses=options.max_concurrent_responses,
            allow_unauthenticated=options.allow_unauthenticated,
            allow_hosts=options.allow_host,
            shard_ttl_s=shard_ttl_s,
            header_timeout_s=_limit(options.header_timeout),
            body_timeout_s=_limit(options.body_timeout),
            idle_timeout_s=_limit(options.idle_timeout),
            max_connections=options.max_connections,
        )
    except (OSError, ValueError, RuntimeError) as error:
        parser.error(str(error))
    with server:
        print(f"listening on {server.address}", flush=True)
        ending.recv(1)
    return 0


def _limit(text: str) -> float:
    """Seconds, as of `parse_seconds`, or "inf"."""
    return math.inf if text.strip() == "inf" else parse_seconds(text)


def readable_on(*signals: signal.Signals) -> socket.socket:
    """A socket to block on until a signal comes. Unlike `sigwait`, it sees those that reach a thread of a library."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.detach())
    for signum in signals:
        signal.signal(signum, lambda *_: None)
    return reader


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gpu_cache.rpc.server", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address or name to bind (default: %(default)s)")
    parser.add_argument("--port", type=int, default=0, help="port; 0, the default, takes a free one")
    _add_access(parser)
    _add_limits(parser)
    parser.add_argument("--log-level", default="INFO", choices=["DEBUG", "INFO", "WARNING", "ERROR"])
    for flag in _IGNORED_FLAGS:
        parser.add_argument(flag, help=argparse.SUPPRESS)
    return parser


def _add_access(parser: argparse.ArgumentParser) -> None:
    """Flags that say who may ask."""
    parser.add_argument("--token-file", type=Path, help=f"file with the clients' token (default: ${TOKEN_VARIABLE})")
    parser.add_argument(
        "--allow-unauthenticated",
        action="store_true",
        help=f"serve other hosts without token (or {ALLOW_VARIABLE}=1)",
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a further name under which clients may ask a server bound to the loopback; may be repeated",
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    """Flags that bound requests, connections and the age of shards."""
    parser.add_argument(
        "--max-body-bytes",
        type=option(parse_size),
        default=DEFAULT_MAX_BODY_BYTES,
        help='longest request body, such as "1GiB", the default',
    )
    parser.add_argument(
        "--max-concurrent-responses",
        type=int,
        default=DEFAULT_MAX_RESPONSES,
        help="answers with tensors at once; clients beyond are told to come back (default: %(default)s)",
    )
    parser.add_argument(
        "--max-connections",
        type=int,
        default=DEFAULT_MAX_CONNECTIONS,
        help="connections at once; beyond, those that are silent make room (default: %(default)s)",
    )
    parser.add_argument(
        "--shard-ttl",
        metavar="TIME",
        help='drop shards that are older: seconds, or such as "10m" or "2h" (default: they stay until cleared)',
    )
    for flag, default, what in (
        ("--header-timeout", DEFAULT_HEADER_TIMEOUT_S, "the header of a request"),
        ("--body-timeout", DEFAULT_BODY_TIMEOUT_S, "each 64 KiB of a request's body"),
        ("--idle-timeout", DEFAULT_IDLE_TIMEOUT_S, "the next request on a connection"),
    ):
        parser.add_argument(
            flag,
            metavar="TIME",
            default=f"{default:g}",
            help=f'longest wait for {what}; "inf" for none (default: %(default)s)',
        )


def _log_ignored(options: Mapping[str, object]) -> None:
    for flag in _IGNORED_FLAGS:
        value = options[flag.removeprefix("--").replace("-", "_")]
        if value is not None:
            logger.debug("ignoring %s %s: accepted for upstream's launchers only", flag, value)
