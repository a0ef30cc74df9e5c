"""Frames that break the format, as answers to a request for the shards "a" and "b"."""

from __future__ import annotations

import torch

from tests.support.fault_server import frame, raw_frame
from tests.support.wire_tensors import patterned

A, B = patterned(torch.float32, 3, 2, seed=1), patterned(torch.int16, 5, seed=2)
PAIR = {"a": A, "b": B}


def entry(begin: int, end: int, dtype: object = "F32", shape: object = None) -> dict[str, object]:
    length = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": length, "data_offsets": [begin, end]}


IDS = {"__metadata__": {"ids": '["a", "b"]'}}
BAD_FRAMES: dict[str, bytes] = {
    "no frame": b"short",
    "huge header": (1 << 40).to_bytes(8, "little") + bytes(100),
    "header beyond the body": raw_frame(IDS)[:-5],
    "not JSON": raw_frame("{nonsense"),
    "not an object": raw_frame([1]),
    "deep": raw_frame("[" * 4000),
    "no ids": raw_frame({"0": entry(0, 8), "1": entry(8, 16)}, bytes(16)),
    "gap": raw_frame(IDS | {"0": entry(0, 8), "1": entry(12, 20)}, bytes(20)),
    "overlap": raw_frame(IDS | {"0": entry(0, 8), "1": entry(4, 12)}, bytes(12)),
    "beyond the end": raw_frame(IDS | {"0": entry(0, 8), "1": entry(8, 16)}, bytes(12)),
    "bytes left over": raw_frame(IDS | {"0": entry(0, 8), "1": entry(8, 16)}, bytes(20)),
    "backwards": raw_frame(IDS | {"0": entry(0, 8), "1": entry(8, 0)}, bytes(8)),
    "offsets of a larger shard": raw_frame(IDS | {"0": entry(0, 8), "1": entry(8, 16, shape=[1])}, bytes(16)),
    "unknown dtype": raw_frame(IDS | {"0": entry(0, 8), "1": entry(8, 16, "F128")}, bytes(16)),
    "dtype of another type": raw_frame(IDS | {"0": entry(0, 8), "1": entry(8, 16, 7)}, bytes(16)),
    "negative shape": raw_frame(IDS | {"0": entry(0, 8), "1": entry(8, 16, shape=[-2])}, bytes(16)),
    "overflowing shape": raw_frame(IDS | {"0": entry(0, 8), "1": entry(8, 16, shape=[1 << 62, 4])}, bytes(16)),
    "fractional shape": raw_frame(IDS | {"0": entry(0, 8), "1": entry(8, 16, shape=[2.0])}, bytes(16)),
    "key twice": raw_frame('{"__metadata__":{"ids":"[]"},"0":1,"0":2}'),
    "shard twice": raw_frame({"__metadata__": {"ids": '["a", "a"]'}, "0": entry(0, 8), "1": entry(8, 16)}, bytes(16)),
    "one too few": frame({"a": A}),
    "one too many": frame({"a": A, "b": B, "c": A}),
    "another shard": frame({"a": A, "c": B}),
}
