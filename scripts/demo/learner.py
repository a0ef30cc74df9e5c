"""The learner: group-relative advantages and a clipped policy update that tolerates batches one version old."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from demo.policy import Policy, token_logprobs
from demo.trajectory import PaddedBatch, Trajectory, padded, padded_rows, rewards


@dataclass(frozen=True, slots=True)
class LearnerConfig:
    """Settings of the update; in 60 steps the defaults reached a mean reward of 0.94 or more with each of 8 seeds.

    Attributes:
        group_rows: Answers per prompt, next to each other in a batch.
        learning_rate: Of AdamW, constant.
        num_minibatches: Optimiser steps per epoch.
        clip_low: How far below 1 a token's ratio may earn anything.
        clip_high: How far above 1; wider, so that rare tokens can grow.
        kl_weight: Weight of the divergence from the reference, the policy before training, which is uniform: in
            effect a small entropy bonus.
        weight_cap: The most a token counts because it has become likelier since it was sampled.
        max_grad_norm: Gradients are scaled down to this norm.
    """

    group_rows: int = 8
    learning_rate: float = 2e-3
    num_minibatches: int = 8
    clip_low: float = 0.2
    clip_high: float = 0.3
    kl_weight: float = 0.005
    weight_cap: float = 2.0
    max_grad_norm: float = 1.0


@dataclass(frozen=True, slots=True)
class Targets:
    """What an update epoch needs beside the batch; one row per trajectory.

    Attributes:
        reference: `(rows, tokens - 1)` float32 log-probs of the reference policy.
        actor: The same of the policy at the start of the step.
        advantages: `(rows,)` float32.
    """

    reference: torch.Tensor
    actor: torch.Tensor
    advantages: torch.Tensor


def targets_of(batch: Sequence[Any]) -> Targets:
    """The targets that other roles have put into the trajectories."""
    advantages = torch.cat([one["advantages"] for one in batch])
    return Targets(padded_rows(batch, "ref_logp"), padded_rows(batch, "prox_logp"), advantages)


class Learner:
    """Owns the policy in training, its reference and its optimiser. One thread.

    Source: group-relative advantages after DeepSeekMath (GRPO); wider upper clip after DAPO; the split of the ratio
    into a clipped part (since the step began) and a capped weight (since sampling) after decoupled PPO, as in AReaL.
    """

    def __init__(self, device: torch.device, seed: int, config: LearnerConfig | None = None) -> None:
        self._config = config or LearnerConfig()
        self._device = device
        torch.manual_seed(seed)
        self.policy = Policy().to(device)
        self._reference = copy.deepcopy(self.policy).requires_grad_(False)
        self._shuffle = torch.Generator().manual_seed(seed)

    @functools.cached_property
    def _optimizer(self) -> torch.optim.Optimizer:
        """Made by the first update: torch takes seconds for that, and a reference needs none."""
        parameters = self.policy.parameters()
        return torch.optim.AdamW(parameters, self._config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)

    @property
    def num_parameters(self) -> int:
        """Of the policy."""
        return sum(parameter.numel() for parameter in self.policy.parameters())

    def reference_logprobs(self, batch: Sequence[Trajectory]) -> torch.Tensor:
        """Log-probs of each answer token under the policy before training, `(rows, tokens - 1)`."""
        return self._logprobs(self._reference, batch)

    def actor_logprobs(self, batch: Sequence[Trajectory]) -> torch.Tensor:
        """Log-probs of each answer token under the policy as it is now, `(rows, tokens - 1)`."""
        return self._logprobs(self.policy, batch)

    @torch.no_grad()
    def advantages(self, batch: Sequence[Trajectory]) -> torch.Tensor:
        """Rewards, centred and scaled within each prompt's group of answers, `(rows,)`."""
        grouped = rewards(batch).to(self._device).view(-1, self._config.group_rows)
        centred = grouped - grouped.mean(1, keepdim=True)
        return (centred / (grouped.std(1, keepdim=True) + 1e-4)).flatten()

    def update(self, batch: Sequence[Trajectory], targets: Targets) -> float:
        """Train one epoch over the batch in random minibatches.

        Returns:
            The mean loss of the minibatches.
        """
        whole = padded(batch, self._device)
        order = torch.randperm(len(batch), generator=self._shuffle).to(self._device)
        losses = [self._descend(whole, targets, rows) for rows in order.chunk(self._config.num_minibatches)]
        return float(torch.stack(losses).mean())

    @torch.no_grad()
    def _logprobs(self, policy: Policy, batch: Sequence[Trajectory]) -> torch.Tensor:
        whole = padded(batch, self._device)
        return token_logprobs(policy, whole.token_ids).where(whole.is_answer, 0.0)

    def _descend(self, whole: PaddedBatch, targets: Targets, rows: torch.Tensor) -> torch.Tensor:
        loss = self._loss(whole, targets, rows)
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.policy.parameters(), self._config.max_grad_norm)
        self._optimizer.step()
        return loss.detach()

    def _loss(self, whole: PaddedBatch, targets: Targets, rows: torch.Tensor) -> torch.Tensor:
        """Mean over the answer tokens of some rows."""
        config, is_answer = self._config, whole.is_answer[rows]
        now = token_logprobs(self.policy, whole.token_ids[rows]).where(is_answer, 0.0)
        actor, advantages = targets.actor[rows], targets.advantages[rows, None]
        ratio = (now - actor).exp()
        clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        weight = (actor - whole.logprobs[rows]).exp().clamp(max=config.weight_cap)
        gain = weight * torch.minimum(ratio * advantages, clipped * advantages)
        apart = targets.reference[rows] - now
        divergence = apart.exp() - 1 - apart
        return ((config.kl_weight * divergence - gain) * is_answer).sum() / is_answer.sum()
