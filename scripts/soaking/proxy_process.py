"""The fault proxies: a process of their own that relays TCP and now and then cuts, stalls or resets a connection.

Usage: proxy_process.py SEED TARGET_PORT... Prints the ports of the proxies as a JSON list; then, for each line that it
reads, the faults so far as a JSON object; ends with its input. It alters no byte: what arrives wrong was not its doing.
"""

from __future__ import annotations

import collections
import contextlib
import json
import random
import signal
import socket
import struct
import sys
import threading
import time

MEAN_BYTES = 20e6  # relayed to a client between two faults
_PIECE_BYTES = 256 << 10
_HEAD_BYTES = 300  # a cut so early in a piece often hits the head of an answer
_STALL_S = (0.02, 0.3)
_LONG_STALL_S = 2.5  # longer than a client's patience at its first try, which is a third of its five seconds
_IS_LONG = 0.1
_RESET_AT_ONCE = 0.02  # of connections
_CONNECT_S = 2.0
_HOST = "127.0.0.1"


class Relay:
    """Relays between clients of a port of its own and one target.

    Args:
        target: Port.
        seed: Of its faults.
        faults: Counts by kind; shared with others.
    """

    def __init__(self, target: int, seed: int, faults: collections.Counter[str]) -> None:
        self._target, self._seed, self._faults = target, seed, faults
        self._listener = socket.create_server((_HOST, 0), backlog=256)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        for number in range(sys.maxsize):
            client, _ = self._listener.accept()
            chance = random.Random(f"{self._seed}-{self._target}-{number}")
            threading.Thread(target=self._serve, args=(client, chance), daemon=True).start()

    def _serve(self, client: socket.socket, chance: random.Random) -> None:
        with client:
            if chance.random() < _RESET_AT_ONCE:
                self._faults["refused"] += 1
                return _reset(client)
            try:
                server = socket.create_connection((_HOST, self._target), _CONNECT_S)
            except OSError:
                return None
            with server:
                self._relay(client, server, chance)
            return None

    def _relay(self, client: socket.socket, server: socket.socket, chance: random.Random) -> None:
        for one in (client, server):
            one.settimeout(None)
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        upward = threading.Thread(target=_copy, args=(client, server), daemon=True)
        upward.start()
        is_reset = False
        with contextlib.suppress(OSError):
            is_reset = self._answer(server, client, chance)
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_RD if is_reset else socket.SHUT_RDWR)  # the former sends nothing
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
        upward.join()
        if is_reset:
            _reset(client)

    def _answer(self, server: socket.socket, client: socket.socket, chance: random.Random) -> bool:
        """Copy to the client until either ends or a fault ends it; whether by a reset."""
        left = chance.expovariate(1 / MEAN_BYTES)
        while piece := server.recv(_PIECE_BYTES):
            left -= len(piece)
            if left > 0:
                client.sendall(piece)
                continue
            kind = chance.choice(["cut", "stall", "reset"])
            self._faults[kind] += 1
            most = len(piece) if chance.random() < 0.5 else min(_HEAD_BYTES, len(piece))
            sent = chance.randrange(most)
            client.sendall(piece[:sent])
            if kind != "stall":
                return kind == "reset"
            time.sleep(_LONG_STALL_S if chance.random() < _IS_LONG else chance.uniform(*_STALL_S))
            client.sendall(piece[sent:])
            left = chance.expovariate(1 / MEAN_BYTES)
        return False


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(_PIECE_BYTES):
            sink.sendall(piece)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)  # wakes the other direction


def _reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def main() -> None:
    """Relay until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    seed, *targets = map(int, sys.argv[1:])
    faults: collections.Counter[str] = collections.Counter()
    relays = [Relay(target, seed, faults) for target in targets]
    print(json.dumps([relay.port for relay in relays]), flush=True)
    for _ in sys.stdin:
        print(json.dumps(dict(faults)), flush=True)


if __name__ == "__main__":
    main()
