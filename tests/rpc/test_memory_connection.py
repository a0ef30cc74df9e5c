"""The client's side of one host: an owner that breaks the protocol costs no descriptor."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from gpu_cache.rpc.client.memory import MemoryConnection
from gpu_cache.rpc.shard import WireError
from gpu_cache.rpc.wire.records import HELLO, RECORDS, SEGMENT, SEGMENTS, Header

LONG_S = 30.0


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    """A file that this test's owner sends, and nothing else has open."""
    found = os.open(tmp_path / "segment", os.O_CREAT | os.O_RDWR)
    yield found
    os.close(found)


def num_open(descriptor: int) -> int:
    """How many descriptors this process has of the same file."""
    wanted, found = os.fstat(descriptor), 0
    for name in os.listdir("/proc/self/fd"):
        try:
            one = os.stat(f"/proc/self/fd/{name}")
        except OSError:
            continue  # that of the listing
        found += (one.st_dev, one.st_ino) == (wanted.st_dev, wanted.st_ino)
    return found


def error_of(path: Path, messages: Sequence[tuple[bytes, Sequence[int]]]) -> str:
    """The client's reason against an owner that greets it and sends these messages with their descriptors."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with listener.accept()[0] as sock:
                for text, descriptors in [(Header(HELLO, 0, 0, 0).encoded(), ()), *messages]:
                    socket.send_fds(sock, [text], descriptors)

        thread = threading.Thread(target=serve)
        thread.start()
        connection = MemoryConnection(str(path), time.monotonic() + LONG_S)
        connection.sock.deadline = time.monotonic() + LONG_S
        with pytest.raises(WireError) as caught:
            connection.told(1)
        connection.close()
        thread.join()
    return str(caught.value)


def brought(number: int, descriptor: int) -> tuple[bytes, Sequence[int]]:
    body = SEGMENT.pack(number, 4096)
    return Header(SEGMENTS, 1, 0, len(body)).encoded() + body, [descriptor]


def test_a_message_without_segments_loses_none_of_those_before(tmp_path: Path, descriptor: int) -> None:
    none = Header(SEGMENTS, 0, 0, 0).encoded(), ()
    refused = Header(RECORDS, 2, 0, 0).encoded(), ()
    assert "about 2 shards" in error_of(tmp_path / "owner", [brought(1, descriptor), none, refused])
    assert num_open(descriptor) == 1


def test_a_list_of_segments_that_is_cut_amid_one_is_refused(tmp_path: Path, descriptor: int) -> None:
    body = SEGMENT.pack(1, 4096) + b"\0"
    cut = Header(SEGMENTS, 1, 0, len(body)).encoded() + body, [descriptor]
    assert "1 descriptors for 1 segments in 17 bytes" in error_of(tmp_path / "owner", [cut])
    assert num_open(descriptor) == 1
