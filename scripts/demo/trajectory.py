"""Trajectories: dictionaries of six tensors of differing lengths, as workers make them and trainers pad them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch.nn.utils.rnn import pad_sequence

from demo.policy import Samples
from demo.task import PAD, Prompts, reward

# The version of a token that no policy wrote.
NO_VERSION = -1


class Trajectory(TypedDict):
    """One prompt and one answer."""

    input_ids: torch.Tensor  # (1, tokens) int64
    attention_mask: torch.Tensor  # (1, tokens) bool
    loss_mask: torch.Tensor  # (1, tokens) int32: 1 on the answer
    logprobs: torch.Tensor  # (1, tokens) float32, of the policy that sampled; 0 on the prompt
    rewards: torch.Tensor  # (1,) float32
    versions: torch.Tensor  # (1, tokens) int32: version of the weights that wrote the token


def trajectories(prompts: Prompts, samples: Samples, version: int) -> list[Trajectory]:
    """Cut samples into trajectories, each of its own length and in memory of its own."""
    answers = [[token for token in row if token != PAD] for row in prompts.answers.tolist()]
    starts, ends = prompts.lengths.tolist(), samples.lengths.tolist()
    return [_trajectory(samples, row, start, ends[row], answers[row], version) for row, start in enumerate(starts)]


def _trajectory(samples: Samples, row: int, start: int, end: int, answer: list[int], version: int) -> Trajectory:
    loss_mask = torch.zeros(1, end, dtype=torch.int32)
    loss_mask[:, start:] = 1
    token_ids = samples.token_ids[row : row + 1, :end].clone()
    return Trajectory(
        input_ids=token_ids,
        attention_mask=torch.ones(1, end, dtype=torch.bool),
        loss_mask=loss_mask,
        logprobs=samples.logprobs[row : row + 1, :end].clone(),
        rewards=torch.tensor([reward(token_ids[0, start:].tolist(), answer)]),
        versions=torch.where(loss_mask.bool(), version, NO_VERSION).int(),
    )


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """Trajectories side by side, padded on the right; places of `is_answer` and `logprobs` start at token 1.

    Attributes:
        token_ids: `(rows, tokens)` int64.
        is_answer: `(rows, tokens - 1)` bool.
        logprobs: `(rows, tokens - 1)` float32: those of the policy that sampled.
    """

    token_ids: torch.Tensor
    is_answer: torch.Tensor
    logprobs: torch.Tensor


def padded(batch: Sequence[Trajectory], device: torch.device) -> PaddedBatch:
    """Copy trajectories into one rectangle on `device`."""
    token_ids = pad_sequence([t["input_ids"][0] for t in batch], batch_first=True, padding_value=PAD)
    loss_mask = pad_sequence([t["loss_mask"][0] for t in batch], batch_first=True)
    logprobs = pad_sequence([t["logprobs"][0] for t in batch], batch_first=True)
    return PaddedBatch(token_ids.to(device), loss_mask[:, 1:].bool().to(device), logprobs[:, 1:].to(device))


def cut_rows(logprobs: torch.Tensor, batch: Sequence[Trajectory]) -> list[torch.Tensor]:
    """The rows of a rectangle, each as long as its trajectory's log-probs; the inverse of `padded_rows`."""
    return [logprobs[row : row + 1, : one["input_ids"].shape[1] - 1].clone() for row, one in enumerate(batch)]


def padded_rows(batch: Sequence[Any], name: str) -> torch.Tensor:
    """What other roles computed for each trajectory, `(rows, tokens - 1)`."""
    return pad_sequence([one[name][0] for one in batch], batch_first=True)


def rewards(batch: Sequence[Trajectory]) -> torch.Tensor:
    """`(rows,)` float32, on the device of the trajectories."""
    return torch.cat([t["rewards"] for t in batch])
