"""The socket whose calls end."""

from __future__ import annotations

import math
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from gpu_cache.rpc.client.connection import DeadlineSocket
from tests.support.areal_fixtures import LONG_S, full_listener
from tests.support.threads import run_threads


@pytest.fixture
def pair() -> Iterator[tuple[DeadlineSocket, socket.socket]]:
    """A patient client and its server's end."""
    with socket.create_server(("127.0.0.1", 0)) as listener, DeadlineSocket(socket.AF_INET) as client:
        client.deadline, client.patience_s = time.monotonic() + LONG_S, LONG_S
        client.connect(listener.getsockname())
        server, _ = listener.accept()
        with server:
            yield client, server


CALLS: dict[str, Callable[[DeadlineSocket], object]] = {
    "recv_into": lambda sock: sock.recv_into(bytearray(10), 0, socket.MSG_WAITALL),
    "recvmsg_into": lambda sock: sock.recvmsg_into([bytearray(10), bytearray(10)], 0, socket.MSG_WAITALL),
    "sendall": lambda sock: sock.sendall(bytes(64 << 20)),
    "readline": lambda sock: sock.makefile("rb").readline(),
}
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


def test_bytes_pass_in_both_directions(pair: tuple[DeadlineSocket, socket.socket]) -> None:
    client, server = pair
    sent = bytes(range(256)) * 4096

    def echo() -> None:
        with server.makefile("rb") as incoming:
            server.sendall(incoming.read(len(sent)))

    thread = threading.Thread(target=echo)
    thread.start()
    client.sendall(sent)
    received = bytearray(len(sent))
    left = memoryview(received)
    while left:  # the kernel may end a call early, also one that waits for all
        head, tail = left[: len(left) // 2], left[len(left) // 2 :]
        left = left[client.recvmsg_into([head, tail], 0, socket.MSG_WAITALL)[0] :]
    assert received == sent
    thread.join()


@pytest.mark.parametrize("limit_s", [1e10, 1e300, math.inf])
def test_a_limit_beyond_all_times_is_none(pair: tuple[DeadlineSocket, socket.socket], limit_s: float) -> None:
    client, server = pair
    client.deadline = client.patience_s = limit_s
    server.sendall(b"abc")
    client.wait()
    assert client.recv_into(bytearray(3)) == 3


@each_call
def test_a_silence_ends_a_call(
    pair: tuple[DeadlineSocket, socket.socket], call: Callable[[DeadlineSocket], object]
) -> None:
    client, _ = pair
    client.patience_s = 0.02
    with pytest.raises(TimeoutError, match=r"nothing happened within 0\.02 s"):
        call(client)


@each_call
def test_nothing_begins_after_the_deadline(
    pair: tuple[DeadlineSocket, socket.socket], call: Callable[[DeadlineSocket], object]
) -> None:
    client, _ = pair
    client.deadline = time.monotonic()
    with pytest.raises(TimeoutError, match="no time is left"):
        call(client)


@each_call
def test_cutting_ends_a_call_under_way(
    pair: tuple[DeadlineSocket, socket.socket], call: Callable[[DeadlineSocket], object]
) -> None:
    client, _ = pair
    results: list[object] = []

    def blocked() -> None:
        try:
            results.append(call(client))
        except OSError as error:
            results.append(error)

    run_threads([blocked, client.cut], timeout_s=20)
    # Received nothing, or failed: before it began, or when it was cut.
    assert results in ([0], [(0, [], 0, None)], [b""]) or isinstance(results[0], OSError)
    with pytest.raises(ConnectionAbortedError):
        call(client)


def test_a_connection_that_no_server_takes_ends_by_its_patience() -> None:
    with full_listener() as address, DeadlineSocket(socket.AF_INET) as sock:
        sock.deadline, sock.patience_s = time.monotonic() + LONG_S, 0.05
        with pytest.raises(TimeoutError):
            sock.connect(address)


def test_signals_leave_a_connection_its_time_limit() -> None:
    previous = signal.signal(signal.SIGALRM, lambda *_: None)
    with full_listener() as address, DeadlineSocket(socket.AF_INET) as sock:
        sock.deadline, sock.patience_s = time.monotonic() + LONG_S, 0.1
        signal.setitimer(signal.ITIMER_REAL, 0.03, 0.03)
        try:
            with pytest.raises(TimeoutError, match=r"nothing happened within 0\.1 s"):
                sock.connect(address)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, previous)


def test_cutting_ends_a_connection_that_no_server_takes() -> None:
    with full_listener() as address, DeadlineSocket(socket.AF_INET) as sock:
        sock.deadline, sock.patience_s = time.monotonic() + LONG_S, LONG_S

        def connect() -> None:
            with pytest.raises((ConnectionError, TimeoutError)):
                sock.connect(address)

        run_threads([connect, sock.cut], timeout_s=20)


def test_cutting_a_closed_socket_is_nothing() -> None:
    sock = DeadlineSocket(socket.AF_INET)
    sock.close()
    sock.cut()
    sock.cut()
    sock.close()
    assert sock.fileno() == -1


def test_a_time_out_is_set_again_only_where_another_time_is_left(
    pair: tuple[DeadlineSocket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, server = pair
    known, real = list[float](), DeadlineSocket._set_timeout
    monkeypatch.setattr(DeadlineSocket, "_set_timeout", lambda sock, s: (known.append(s), real(sock, s)))
    server.sendall(b"abcdef")
    for patience_s in (LONG_S, LONG_S, LONG_S / 2, LONG_S / 2, LONG_S, LONG_S):
        client.patience_s = patience_s
        assert client.recv_into(bytearray(1)) == 1
    assert known == pytest.approx([LONG_S / 2, LONG_S], rel=0.1)
