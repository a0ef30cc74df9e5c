"""`debug_checksum`: every byte of every shard, looked at each time that it is handed out."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Iterable

import torch

from gpu_cache.device.modes import plain_tensors
from gpu_cache.index.index import ShardIndex
from gpu_cache.transfer.engine import Engine
from gpu_cache.transfer.tensor_reader import host_bytes


def check_bytes(index: ShardIndex, engine: Engine, keys: Iterable[Hashable], *, only_new: bool = False) -> None:
    """Take the checksums of cached shards that have none yet, and doubt those whose checksum is another by now.

    Waits for their copies and copies them to the host, so it is slow; it sees what this thread's stream has written by
    then. What was doubted is found by the next look-up. Does nothing during CUDA graph capture.

    Args:
        index: Where they are.
        engine: What waits for copies.
        keys: Of the shards; others than cached ones are passed over.
        only_new: Whether to pass over those that have a checksum.
    """
    if engine.device.is_capturing():
        return
    found = [pair for pair in index.aliases(keys) if pair[0].checksum is None or not only_new]
    engine.settle({one.completion: None for one, _ in found if one.completion is not None}, "host")
    with plain_tensors():
        index.compare_checksums([(one, _checksum(alias)) for one, alias in found])


def _checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(host_bytes(tensor.cpu()).numpy().data)
