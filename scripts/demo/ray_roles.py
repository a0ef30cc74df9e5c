"""The demo's roles as actors of Ray, and its loop over them: handles travel through Ray, tensors through its store."""

from __future__ import annotations

import asyncio
import time
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console

from demo.learner import Learner, targets_of
from demo.policy import Policy, sample
from demo.task import random_prompts
from demo.trajectory import Trajectory, cut_rows, rewards, trajectories
from gpu_cache.rpc import rtensor, runtime
from gpu_cache.rpc.rtensor import RTensor

NUM_EPOCHS = 2
GROUP_ROWS = 8
SETTLED_S = 10.0


class Role:
    """An actor: localizes what it is called with, and returns handles of what its method made.

    Args:
        role: Its name, in reports.
        rank: Its number in the role.
        seed: Of the policy, and of samples.
    """

    def __init__(self, role: str, rank: int, seed: int) -> None:
        torch.set_num_threads(1)
        runtime.current().name_process(role, rank)
        self._rank, self._seed = rank, seed
        self._policy = Policy() if role == "rollout" else None
        self._learner = None if role == "rollout" else Learner(torch.device("cpu"), seed)

    def call(self, method: str, *args: Any, **options: Any) -> Any:
        """Call one of the methods below."""
        return RTensor.remotize(getattr(self, method)(*RTensor.localize(args), **options), "")

    def clear(self, shard_ids: list[Any]) -> int:
        """Evict a step's shards."""
        return rtensor.clear_batches(shard_ids)

    def held(self) -> dict[str, int]:
        """What this process owns and caches."""
        return {**rtensor.storage_stats(), **rtensor.fetch_buffer_stats()}

    def cache_figures(self) -> dict[str, float]:
        """Figures of the cache."""
        stats = rtensor.buffer_stats()
        return {name: stats[name] for name in ("requested", "hits", "fetch_bytes", "device_bytes")}

    def sample(
        self, weights: dict[str, torch.Tensor], *, version: int, num_prompts: int, group_rows: int
    ) -> list[Trajectory]:
        """Sample trajectories; equal orders bring equal ones."""
        assert self._policy is not None
        self._policy.load_state_dict(weights)
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + version) * 1_009 + self._rank)
        prompts = random_prompts(num_prompts, generator).repeated(group_rows)
        return trajectories(prompts, sample(self._policy, prompts, generator), version)

    @property
    def learner(self) -> Learner:
        """Of a role that has one."""
        assert self._learner is not None
        return self._learner

    def weights(self) -> dict[str, torch.Tensor]:
        """The policy's state."""
        return dict(self.learner.policy.state_dict())

    def compute_logp(self, batch: Sequence[Trajectory]) -> list[torch.Tensor]:
        """Log-probs of each trajectory's answer, `(1, tokens - 1)`."""
        return cut_rows(self.learner.actor_logprobs(batch), batch)

    def compute_advantages(self, batch: Sequence[Trajectory]) -> list[torch.Tensor]:
        """The advantage of each trajectory, `(1,)`."""
        return list(self.learner.advantages(batch).split(1))

    def mean_reward(self, batch: Sequence[Trajectory]) -> float:
        """The mean reward of the batch."""
        return float(rewards(batch).mean())

    def update(self, batch: Sequence[Any]) -> float:
        """Train one epoch; returns the mean loss."""
        return self.learner.update(batch, targets_of(batch))


def run(ray: Any, options: Namespace, console: Console) -> dict[str, Any]:
    """Start the actors, and train for so many steps; returns the figures."""
    kind = ray.remote(Role).options(num_cpus=0)
    rollouts = [kind.remote("rollout", rank, options.seed) for rank in range(options.workers)]
    roles = {"rollout": rollouts, "ref": [kind.remote("ref", 0, options.seed)]}
    roles["actor"] = [kind.remote("actor", 0, options.seed)]
    ray.get([one.held.remote() for of_role in roles.values() for one in of_role])
    began, earned = time.perf_counter(), []
    for number in range(options.steps):
        earned.append(step(ray, roles, options.prompts, number))
        console.print(f"step {number + 1}/{options.steps} · reward {earned[-1]:.2f}", highlight=False)
    held = {name: ray.get(one.held.remote()) for name, of_role in roles.items() for one in of_role}
    held["driver"] = {**rtensor.storage_stats(), **rtensor.fetch_buffer_stats()}
    held["object store"] = {"total_bytes": left_bytes(ray)}
    return {
        "steps": options.steps,
        "rewards": earned,
        "seconds": time.perf_counter() - began,
        "actor": ray.get(roles["actor"][0].cache_figures.remote()),
        "held": held,
    }


def step(ray: Any, roles: dict[str, list[Any]], num_prompts: int, number: int) -> float:
    """One step; returns the mean reward. The driver has handles, and never a tensor."""
    rollouts, (ref,), (actor,) = roles["rollout"], roles["ref"], roles["actor"]
    weights = ray.get(actor.call.remote("weights"))
    size = {"version": number, "num_prompts": num_prompts // len(rollouts), "group_rows": GROUP_ROWS}
    shares = ray.get([one.call.remote("sample", weights, **size) for one in rollouts])
    batch = [trajectory for share in shares for trajectory in share]
    work = {"ref_logp": (ref, "compute_logp"), "prox_logp": (actor, "compute_logp")}
    for name, (one, method) in {**work, "advantages": (actor, "compute_advantages")}.items():
        for trajectory, result in zip(batch, ray.get(one.call.remote(method, batch)), strict=True):
            trajectory[name] = result
    reward = ray.get(actor.call.remote("mean_reward", batch))
    for _ in range(NUM_EPOCHS):
        ray.get(actor.call.remote("update", batch))
    consumers = [partial(told, ray, one) for of_role in roles.values() for one in of_role]
    report = asyncio.run(RTensor.clear_everywhere([batch, weights], consumers))
    assert report.is_complete, report.failures
    return float(reward)


def told(ray: Any, one: Any, shard_ids: list[Any]) -> int:
    """Tell an actor of a clear."""
    return int(ray.get(one.clear.remote(shard_ids)))


def left_bytes(ray: Any) -> int:
    """Bytes that the object store has to keep, once the latest clear has reached it."""
    deadline = time.monotonic() + SETTLED_S
    while True:
        name = "object_store_memory"
        left = int(ray.cluster_resources()[name] - ray.available_resources()[name])
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)
