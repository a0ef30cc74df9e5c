"""The policy: a small decoder-only transformer in plain torch, its log-probabilities, and a batched sampler."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from demo.task import MAX_ANSWER, MAX_PROMPT, OPEN, PAD, SEPARATOR, STOP, VOCABULARY, Prompts

WIDTH, DEPTH, NUM_HEADS = 64, 2, 4
# Finite, so that a masked place yields no NaN when it is multiplied by zero.
NEVER = -1e9


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(rows, tokens, WIDTH)` to the same shape."""
        rows, tokens, _ = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(rows, tokens, 3, NUM_HEADS, WIDTH // NUM_HEADS)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, tokens, WIDTH))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class Policy(nn.Module):
    """A decoder-only transformer of about 100,000 parameters over the task's tokens.

    Places are counted from the separator, so that what the first answer token must look at does not depend on the
    prompt's length. Sequences are padded on the right; attention is causal, so padding needs no mask.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Embedding(MAX_PROMPT + MAX_ANSWER, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        for embedding in (self.tokens, self.places):
            nn.init.normal_(embedding.weight, std=0.5)
        # A zero head starts the policy at uniform: exploration is the widest there is.
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        barred = torch.zeros(VOCABULARY).index_fill(0, torch.tensor([PAD, OPEN, SEPARATOR]), NEVER)
        self.register_buffer("barred", barred, persistent=False)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the next token, `(rows, tokens, VOCABULARY)`, for `(rows, tokens)` int64."""
        separator = (token_ids == SEPARATOR).int().argmax(1, keepdim=True)
        place = torch.arange(token_ids.shape[1], device=token_ids.device) - separator + MAX_PROMPT - 1
        x = self.tokens(token_ids) + self.places(place.clamp(max=MAX_PROMPT + MAX_ANSWER - 1))
        for block in self.blocks:
            x = block(x)
        return F.log_softmax(self.head(self.norm(x)) + self.barred, -1)


def token_logprobs(policy: Policy, token_ids: torch.Tensor) -> torch.Tensor:
    """Log-probability of each token after the first, given those before it.

    Args:
        policy: On the device of `token_ids`.
        token_ids: `(rows, tokens)` int64.
    Returns:
        `(rows, tokens - 1)` float32. Tokens that no answer may contain have a very low, finite value.
    """
    return policy(token_ids[:, :-1]).gather(-1, token_ids[:, 1:, None]).squeeze(-1)


@dataclass(frozen=True, slots=True)
class Samples:
    """What a policy answered: prompts and answers in one, padded on the right.

    Attributes:
        token_ids: `(rows, MAX_PROMPT + MAX_ANSWER)` int64.
        logprobs: The same shape, float32; 0 outside the answers.
        lengths: `(rows,)` int64: tokens of prompt and answer together.
    """

    token_ids: torch.Tensor
    logprobs: torch.Tensor
    lengths: torch.Tensor


@torch.inference_mode()
def sample(policy: Policy, prompts: Prompts, generator: torch.Generator) -> Samples:
    """Let the policy answer each prompt, token by token at temperature 1, until STOP or `MAX_ANSWER` tokens.

    Recomputes the whole prefix for each token: at 15 tokens a cache of keys and values would cost more than it saves.
    """
    token_ids = F.pad(prompts.token_ids, (0, MAX_ANSWER), value=PAD)
    logprobs = torch.zeros(token_ids.shape)
    lengths = prompts.lengths.clone()
    open_rows = torch.arange(len(token_ids))
    for _ in range(MAX_ANSWER):
        ends = lengths[open_rows]
        prefix = token_ids[open_rows, : int(ends.max())]
        scores = policy(prefix)[torch.arange(len(open_rows)), ends - 1]
        chosen = torch.multinomial(scores.exp(), 1, generator=generator)
        token_ids[open_rows, ends] = chosen[:, 0]
        logprobs[open_rows, ends] = scores.gather(1, chosen)[:, 0]
        lengths[open_rows] += 1
        open_rows = open_rows[chosen[:, 0] != STOP]
        if not len(open_rows):
            break
    return Samples(token_ids, logprobs, lengths)
