"""Tensors of every dtype that travels, their forms on the wire, and a comparison by bits."""

from __future__ import annotations

import json
import math
from typing import Any

import torch

from gpu_cache.rpc.wire.frame import Frame
from gpu_cache.rpc.wire.serialization import deserialize_value, serialize_value

WIRE_DTYPES = [
    torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32,
    torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn,
    torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.complex32,
    torch.complex64, torch.complex128,
]  # fmt: skip


def patterned(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    """A tensor whose bytes are all different from their neighbours; NaNs and infinities among them."""
    generator = torch.Generator().manual_seed(seed)
    limit = 2 if dtype is torch.bool else 256
    raw = torch.randint(0, limit, (math.prod(shape) * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).view(shape)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8).numpy().tobytes()


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and raw_bytes(one) == raw_bytes(other)


def through_json(value: object) -> Any:
    return deserialize_value(json.loads(json.dumps(serialize_value(value))))


def encoded(shape: list[Any], dtype: str = "torch.uint8", data: object = "AAAA") -> dict[str, Any]:
    """A tensor as JSON, right or wrong."""
    return {"type": "tensor", "data": data, "shape": shape, "dtype": dtype}


def framed(*items: tuple[str, torch.Tensor]) -> bytes:
    return b"".join(Frame(items))
