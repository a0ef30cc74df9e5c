"""An engine for AReaL's own rpc_server: makes tensors, looks at tensors, ends a step as AReaL's engines do."""

from __future__ import annotations

import hashlib
import pickle
import sys
from typing import Any

import torch
from areal.api import TrainEngine

from areal.infra.rpc import rtensor


def batch(seed: int, num_rows: int, num_tokens: int) -> list[dict[str, torch.Tensor]]:
    """Trajectories of some dtypes, of full length, the same in every process."""
    random = torch.Generator().manual_seed(seed)
    return [
        {
            "attention_mask": torch.ones(1, num_tokens, dtype=torch.bool),
            "input_ids": torch.randint(0, 50_000, (1, num_tokens), generator=random),
            "logprobs": torch.randn(1, num_tokens, generator=random),
            "values": torch.randn(1, num_tokens, generator=random).to(torch.bfloat16),
            "rewards": torch.randn(1, generator=random),
        }
        for _ in range(num_rows)
    ]


def one_answer(num_tokens: int = 16) -> list[dict[str, torch.Tensor]]:
    """One trajectory, with what AReaL's actor wants of one."""
    random = torch.Generator().manual_seed(3)
    logprobs = {name: -torch.rand(1, num_tokens, generator=random) for name in ("logprobs", "prox_logp", "ref_logp")}
    mask = torch.ones(1, num_tokens, dtype=torch.bool)
    is_answer = (torch.arange(num_tokens) >= num_tokens // 4)[None].int()
    return [
        {"attention_mask": mask, "input_ids": mask.long(), "loss_mask": is_answer, "rewards": torch.ones(1), **logprobs}
    ]


def digest(trajectories: list[dict[str, torch.Tensor]]) -> str:
    """Of all bits, dtypes and shapes, in order."""
    found = hashlib.sha256()
    for trajectory in trajectories:
        for name, tensor in sorted(trajectory.items()):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class Engine(TrainEngine):
    """What the job calls; not initialised, so that AReaL asks for no process group."""

    initialized = False

    def make(self, seed: int, num_rows: int, num_tokens: int) -> list[dict[str, torch.Tensor]]:
        return batch(seed, num_rows, num_tokens)

    def make_answer(self) -> list[dict[str, torch.Tensor]]:
        return one_answer()

    def score(self, trajectories: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        return [trajectory["logprobs"] * 2 for trajectory in trajectories]

    def advantages(self, trajectories: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
        return [{"advantages": trajectory["prox_logp"] - trajectory["ref_logp"]} for trajectory in trajectories]

    def digest(self, trajectories: list[dict[str, torch.Tensor]]) -> str:
        return digest(trajectories)

    def touch(self, trajectories: list[dict[str, torch.Tensor]]) -> int:
        return len(trajectories)

    def clear_batches(self, shard_ids: list[str] | None = None) -> None:
        if shard_ids:
            rtensor.clear_fetch_buffer(shard_ids)

    def fetch_buffer_stats(self) -> dict[str, int]:
        return rtensor.fetch_buffer_stats()

    def pickled(self) -> str:
        handle = rtensor.RTensor(rtensor.TensorShardInfo("a", "h:1"), torch.empty(2, 3, device="meta"))
        return pickle.dumps(handle).hex()

    def unpickled(self, text: str) -> str:
        handle = pickle.loads(bytes.fromhex(text))
        assert type(handle) is rtensor.RTensor
        assert type(handle.shard) is rtensor.TensorShardInfo
        return f"{handle.shard.shard_id} {handle.shard.node_addr} {list(handle.data.shape)} {handle.data.device}"

    def facts(self) -> dict[str, Any]:
        return {
            "rtensor": rtensor.__name__,
            "is_ours_imported": "gpu_cache" in sys.modules,
            **rtensor.storage_stats(),
            **rtensor.fetch_buffer_stats(),
        }


Engine.__abstractmethods__ = frozenset()
