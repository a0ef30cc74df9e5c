"""The task: write a string of digits backwards. Vocabulary, random prompts, and a reward that can be checked."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Tokens 0 to 9 are the digits themselves.
PAD, OPEN, SEPARATOR, STOP = 10, 11, 12, 13
VOCABULARY = 14

MIN_DIGITS, MAX_DIGITS = 2, 6
MAX_ANSWER = MAX_DIGITS + 1  # the digits and STOP
MAX_PROMPT = MAX_DIGITS + 2  # OPEN, the digits, SEPARATOR


@dataclass(frozen=True, slots=True)
class Prompts:
    """Questions and their right answers, padded on the right with `PAD`.

    Attributes:
        token_ids: `(rows, MAX_PROMPT)` int64: OPEN, the digits, SEPARATOR.
        lengths: `(rows,)` int64: tokens of each prompt without padding.
        answers: `(rows, MAX_ANSWER)` int64: the digits backwards, STOP.
    """

    token_ids: torch.Tensor
    lengths: torch.Tensor
    answers: torch.Tensor

    def repeated(self, times: int) -> Prompts:
        """Each prompt `times` times in a row."""
        return Prompts(
            self.token_ids.repeat_interleave(times, 0),
            self.lengths.repeat_interleave(times, 0),
            self.answers.repeat_interleave(times, 0),
        )


def random_prompts(num_prompts: int, generator: torch.Generator) -> Prompts:
    """Draw prompts of `MIN_DIGITS` to `MAX_DIGITS` digits, every length equally likely."""
    num_digits = torch.randint(MIN_DIGITS, MAX_DIGITS + 1, (num_prompts,), generator=generator)
    digits = torch.randint(0, 10, (num_prompts, MAX_DIGITS), generator=generator)
    token_ids = torch.full((num_prompts, MAX_PROMPT), PAD)
    answers = torch.full((num_prompts, MAX_ANSWER), PAD)
    token_ids[:, 0] = OPEN
    for row, length in enumerate(num_digits.tolist()):
        token_ids[row, 1 : length + 1] = digits[row, :length]
        token_ids[row, length + 1] = SEPARATOR
        answers[row, :length] = digits[row, :length].flip(0)
        answers[row, length] = STOP
    return Prompts(token_ids, num_digits + 2, answers)


def reward(response: list[int], answer: list[int]) -> float:
    """Share of places at which a response equals the right answer, STOP included: 1.0 only for the exact answer.

    The places are those of the longer of the two, so that neither stopping early nor rambling on pays. A policy that
    picks among the eleven answer tokens at random gets about 0.07.

    Args:
        response: Tokens that the policy produced after the separator.
        answer: The right tokens, STOP last, without padding.
    """
    matches = sum(got == wanted for got, wanted in zip(response, answer, strict=False))
    return matches / max(len(response), len(answer))
