"""The demo's three roles as engines that AReaL's servers create and call. Needs an installed AReaL."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from areal.api import TrainEngine

from areal.infra.rpc import rtensor
from demo.learner import Learner, targets_of
from demo.policy import Policy, sample
from demo.task import random_prompts
from demo.trajectory import Trajectory, cut_rows, rewards, trajectories


class Engine(TrainEngine):
    """What AReaL's controllers ask of every engine, where one process is all of a role.

    Args:
        config: AReaL's, which no engine here reads.
    Attributes:
        initialized: AReaL asks such an engine for no process group.
    """

    initialized = False

    def __init__(self, config: Any) -> None:
        torch.set_num_threads(1)

    def create_process_group(self, parallel_strategy: Any = None) -> None:
        """Needs none."""

    def initialize(self, ft_spec: Any = None, *, seed: int = 0) -> None:
        """Build what the role works with."""

    def destroy(self) -> None:
        """Has nothing to give back."""

    def is_data_parallel_head(self) -> bool:
        return True

    def clear_batches(self, shard_ids: list[str] | None = None) -> None:
        """Evict a step's shards, as AReaL's engines do."""
        if shard_ids:
            rtensor.clear_fetch_buffer(shard_ids)

    def fetch_buffer_stats(self) -> dict[str, int]:
        """AReaL's figures of the cache."""
        return rtensor.fetch_buffer_stats()

    def held(self) -> dict[str, int]:
        """What this process owns and caches."""
        return {**rtensor.storage_stats(), **rtensor.fetch_buffer_stats()}

    def cache_figures(self) -> dict[str, float]:
        """Figures of the cache."""
        stats = rtensor.buffer_stats()
        return {name: stats[name] for name in ("requested", "hits", "fetch_bytes", "device_bytes")}


class Sampler(Engine):
    """Samples trajectories from the weights that it is given."""

    def initialize(self, ft_spec: Any = None, *, seed: int = 0) -> None:
        """Build a policy; its weights come with each order."""
        self._policy, self._seed = Policy(), seed

    def sample(
        self, weights: list[dict[str, torch.Tensor]], *, version: int, num_prompts: int, group_rows: int
    ) -> list[list[Trajectory]]:
        """Sample from the one set of weights; equal orders bring equal trajectories."""
        self._policy.load_state_dict(weights[0])
        seed = (self._seed * 1_000_003 + version) * 1_009 + int(os.environ.get("RANK", "0"))
        generator = torch.Generator().manual_seed(seed)
        prompts = random_prompts(num_prompts, generator).repeated(group_rows)
        return [trajectories(prompts, sample(self._policy, prompts, generator), version)]


class Reference(Engine):
    """Knows the policy before training."""

    def initialize(self, ft_spec: Any = None, *, seed: int = 0) -> None:
        """Build the policy that the actor begins with."""
        self._learner = Learner(torch.device("cpu"), seed)

    def compute_logp(self, batch: Sequence[Trajectory]) -> list[torch.Tensor]:
        """Log-probs of each trajectory's answer, `(1, tokens - 1)`, by the policy as it is."""
        return cut_rows(self._learner.actor_logprobs(batch), batch)


class Actor(Reference):
    """Trains the policy. Its batches have what the others, and its own first calls, have computed."""

    def weights(self) -> dict[str, torch.Tensor]:
        """The policy's state."""
        return dict(self._learner.policy.state_dict())

    def compute_advantages(self, batch: Sequence[Trajectory]) -> list[torch.Tensor]:
        """The advantage of each trajectory, `(1,)`."""
        return list(self._learner.advantages(batch).split(1))

    def mean_reward(self, batch: Sequence[Trajectory]) -> float:
        """The mean reward of the batch."""
        return float(rewards(batch).mean())

    def update(self, batch: Sequence[Any]) -> float:
        """Train one epoch; returns the mean loss."""
        return self._learner.update(batch, targets_of(batch))


for kind in (Engine, Sampler, Reference, Actor):
    kind.__abstractmethods__ = frozenset()  # those are of engines that train over several processes
