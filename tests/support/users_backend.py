"""A backend as a user writes it, and handles of what it has."""

from __future__ import annotations

from typing import Any

import torch

from gpu_cache.rpc.rtensor import RTensor, TensorShardInfo
from tests.support.areal_fixtures import remote


class UsersBackend:
    """Three methods and nothing else; has the shards s0 to s7, and notes what it is asked."""

    def __init__(self) -> None:
        self.tensors: dict[Any, torch.Tensor] = {f"s{n}": torch.full((n + 1,), float(n)) for n in range(8)}
        self.fetched: list[list[TensorShardInfo]] = []
        self.deleted: list[tuple[str, list[Any]]] = []
        self.fault: Exception | None = None

    def fetch(self, shards: list[TensorShardInfo]) -> list[torch.Tensor]:
        self.fetched.append(shards)
        if self.fault is not None:
            raise self.fault
        return [self.tensors[info.shard_id] for info in shards]

    def store(self, tensor: torch.Tensor) -> Any:
        self.tensors[f"user-{len(self.tensors)}"] = tensor
        return f"user-{len(self.tensors) - 1}"

    async def delete(self, node_addr: str, shard_ids: list[Any]) -> Any:
        self.deleted.append((node_addr, shard_ids))
        if self.fault is not None:
            raise self.fault
        return {"deleted": len(shard_ids)}


def handle(number: int, node_addr: str = "node-a:1") -> RTensor:
    return remote(node_addr, f"s{number}", torch.empty(number + 1))
