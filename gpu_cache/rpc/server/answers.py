"""Bodies of answers that carry tensors, in upstream's JSON form and in the binary one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from gpu_cache.rpc.wire.frame import CONTENT_TYPE, Frame, OwnedShard
from gpu_cache.rpc.wire.serialization import TensorText

_JSON_CONTENT_TYPE = "application/octet-stream"
# Parts of JSON are joined to this length or more: each is made by another thread than the one that sends it.
_JOINED_BYTES = 1 << 20
# A frame of this length or less is one part: a copy costs less than one more system call, which wakes the client.
_SMALL_BYTES = 32 << 10
# So many bytes of tensors are sent by one call, from where they are.
# Source: our measurement; the page faults of a joined copy of 1 MiB took 4 us a shard of 9 KB.
_GROUP_BYTES = 1 << 20
# The longest JSON array, in which a client can ask for one shard any number of times.
MAX_ARRAY_BYTES = 4 << 30


class TooLongError(ValueError):
    """An answer that is longer than any may be."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A body ready to be sent."""

    content_type: str
    # Parts that are best sent by one call; the first of these groups has one.
    groups: Iterable[Sequence[bytes | memoryview]]
    nbytes: int
    # Bytes of tensors that the body carries, in whatever form.
    payload_nbytes: int = 0
    status: int = 200
    # Whether making the next group is work, which must not keep the other connections waiting.
    is_made_in_parts: bool = False


def json_answer(tensor: torch.Tensor) -> Answer:
    """One tensor as JSON. Raises `TypeError` if it does not travel."""
    text = TensorText(tensor)
    return Answer(_JSON_CONTENT_TYPE, _joined(text), text.nbytes, tensor.nbytes, is_made_in_parts=True)


def array_answer(found: Sequence[tuple[str, torch.Tensor]]) -> Answer:
    """Tensors as a JSON array, in order and with repeats.

    Raises:
        TypeError: One does not travel.
        TooLongError: Several tensors, of more bytes than an answer may have.
    """
    text_of_id = {shard_id: TensorText(tensor) for shard_id, tensor in dict(found).items()}
    texts = [text_of_id[shard_id] for shard_id, _ in found]
    nbytes = 2 + sum(text.nbytes for text in texts) + max(len(texts) - 1, 0)
    if len(texts) > 1 and nbytes > MAX_ARRAY_BYTES:
        raise TooLongError(
            f"{len(texts):,} shards are {nbytes:,} bytes of JSON, the limit is {MAX_ARRAY_BYTES:,}; ask for fewer at a "
            f"time, or for {CONTENT_TYPE}"
        )
    payload_nbytes = sum(tensor.nbytes for _, tensor in found)
    return Answer(_JSON_CONTENT_TYPE, _joined(_array(texts)), nbytes, payload_nbytes, is_made_in_parts=True)


def frame_answer(found: Sequence[tuple[str, OwnedShard]]) -> Answer:
    """Distinct tensors as one binary frame; raises `WireError` if they are more than fits one."""
    frame = Frame(found)
    groups = [[b"".join(frame)]] if frame.nbytes <= _SMALL_BYTES else _grouped(frame)
    return Answer(CONTENT_TYPE, groups, frame.nbytes, frame.payload_nbytes)


def refusal(status: int, message: str, **more: object) -> Answer:
    """A refusal that may be long."""
    body = json.dumps({"status": "error", "message": message, **more}).encode()
    return Answer("application/json; charset=utf-8", [[body]], len(body), status=status)


def _array(texts: Iterable[TensorText]) -> Iterator[bytes]:
    separator = b"["
    for text in texts:
        yield separator
        yield from text
        separator = b","
    yield b"]" if separator == b"," else b"[]"


def _grouped(frame: Frame) -> Iterator[list[bytes | memoryview]]:
    """The header alone, then tensors together."""
    group: list[bytes | memoryview] = []
    room = -1
    for part in frame:
        if group and len(part) > room:
            yield group
            group, room = [], _GROUP_BYTES
        group.append(part)
        room -= len(part)
    yield group


def _joined(parts: Iterable[bytes]) -> Iterator[list[bytes]]:
    pending: list[bytes] = []
    num_pending = 0
    for part in parts:
        pending.append(part)
        num_pending += len(part)
        if num_pending >= _JOINED_BYTES:
            yield [b"".join(pending)]
            pending, num_pending = [], 0
    if pending:
        yield [b"".join(pending)]
