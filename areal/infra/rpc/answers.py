"""Bodies of answers that carry tensors, in upstream's JSON form and in the binary one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from areal.infra.rpc.owned import OwnedShard
from areal.infra.rpc.serialization import tensor_to_json
from areal.infra.rpc.wire import CONTENT_TYPE, Frame

_JSON_CONTENT_TYPE = "application/octet-stream"


@dataclass(frozen=True, slots=True)
class Answer:
    """A body ready to be sent."""

    content_type: str
    parts: Iterable[bytes | memoryview]
    nbytes: int
    # Bytes of tensors that the body carries, in whatever form.
    payload_nbytes: int


def _json_text(tensor: torch.Tensor) -> bytes:
    """One call a tensor, so that other threads get the interpreter between the shards of a batch."""
    return json.dumps(tensor_to_json(tensor)).encode()


def json_answer(tensor: torch.Tensor) -> Answer:
    """One tensor as JSON."""
    text = _json_text(tensor)
    return Answer(_JSON_CONTENT_TYPE, [text], len(text), tensor.nbytes)


def array_answer(found: Sequence[tuple[str, OwnedShard]]) -> Answer:
    """Tensors as a JSON array, in order and with repeats."""
    text_of_id = {shard_id: _json_text(shard.tensor) for shard_id, shard in dict(found).items()}
    parts: list[bytes] = []
    for shard_id, _ in found:
        parts += [b"," if parts else b"[", text_of_id[shard_id]]
    parts.append(b"]" if parts else b"[]")
    payload_nbytes = sum(shard.nbytes for _, shard in found)
    return Answer(_JSON_CONTENT_TYPE, parts, sum(map(len, parts)), payload_nbytes)


def frame_answer(found: Sequence[tuple[str, OwnedShard]]) -> Answer:
    """Distinct tensors as one binary frame; raises `WireError` if they are more than fits one."""
    frame = Frame(found)
    return Answer(CONTENT_TYPE, frame, frame.nbytes, frame.payload_nbytes)
