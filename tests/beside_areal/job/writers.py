"""AReaL's own code that writes into what it reads: `writers.py owner`. Prints as JSON what the next reader gets."""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import torch
from areal.api.cli_args import PPOActorConfig
from areal.utils.data import tensor_container_to
from areal.utils.offload import is_tms_enabled
from controller import call, controller, create
from engine import digest, one_answer

from areal.infra.rpc.rtensor import RTensor
from areal.infra.rpc.serialization import deserialize_value, serialize_value

# Recomputed log-probs and a penalty: both are written in place where there is one trajectory.
CONFIG = PPOActorConfig(
    use_decoupled_loss=False, recompute_logprob=True, overlong_reward_penalty=True, overlong_tokens=8,
    overlong_penalty_factor=1.0, max_new_tokens=10,
)  # fmt: skip


def fresh(handles: Any) -> Any:
    """Handles as another call of the same process gets them."""
    return deserialize_value(json.loads(json.dumps(serialize_value(handles))))


def advantages(trajectories: list[dict[str, torch.Tensor]]) -> Any:
    return importlib.import_module("areal.trainer.ppo.actor").PPOActor(CONFIG, None).compute_advantages(trajectories)


def written(before: list[dict[str, torch.Tensor]], after: list[dict[str, torch.Tensor]]) -> list[str]:
    """Names of the tensors whose bytes differ."""
    return sorted(name for name in before[0] if not torch.equal(before[0][name], after[0][name]))


def look(handles: Any) -> dict[str, Any]:
    original = one_answer()
    first = RTensor.localize(fresh(handles))
    moved = tensor_container_to(first, first[0]["rewards"].device)
    seen = {"is_moved_without_a_copy": all(moved[0][name] is first[0][name] for name in first[0])}
    expected = digest(advantages(one_answer()))
    seen["is_first_result_right"] = digest(advantages(first)) == expected
    seen["written"] = written(original, first)
    second = RTensor.localize(fresh(handles))
    seen["differs_for_the_next_reader"] = written(original, second)
    seen["is_next_result_right"] = digest(advantages(second)) == expected
    seen["is_offloading"] = is_tms_enabled()
    if "gpu_cache" in sys.modules:
        seen["device"] = importlib.import_module("gpu_cache.rpc.doctor").findings()[-1].text
    seen["has_cuda"] = torch.cuda.is_initialized()
    return seen


if __name__ == "__main__":
    create(sys.argv[1])
    handles = call(sys.argv[1], "make_answer")
    print(json.dumps(look(handles)), flush=True)
    controller([sys.argv[1]]).clear_batches(handles)
    print("DONE", flush=True)
