"""Which shards there are, and every byte of them: both follow from a seed, so nobody needs to send the truth along."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch

NUM_SHARDS = 320
NUM_OWNERS = 2

_LEAST_BYTES, _MOST_BYTES = 10, 3_000_000
_PATTERN_BYTES = 4 << 20
# Between the beginnings of two shards in the pattern: aligned for every dtype, and the last shard still fits.
_STRIDE_BYTES = 37 * 64
_DTYPES = (
    torch.uint8, torch.bool, torch.int16, torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.complex64,
    torch.float8_e4m3fn,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard as it must be.

    Attributes:
        shard_id: Known to consumers and owners without asking.
        owner: Number of the one who keeps it.
        dtype: Of its tensor.
        shape: Of its tensor.
        offset: Where its bytes begin in the pattern.
        nbytes: Its length.
    """

    shard_id: str
    owner: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Catalogue:
    """All shards of one seed, and their contents.

    Args:
        seed: Equal seeds make equal catalogues.
        device: Where contents are compared.
    Thread-safety: any thread; nothing changes.
    """

    def __init__(self, seed: int, device: str = "cpu") -> None:
        generator = torch.Generator().manual_seed(seed)
        pattern = torch.randint(0, 256, (_PATTERN_BYTES,), dtype=torch.uint8, generator=generator)
        self._bytes, self._bits = pattern.to(device), (pattern & 1).to(device)
        chance = random.Random(seed)
        self.shards = [_draw(number, chance) for number in range(NUM_SHARDS)]

    def owned_by(self, owner: int) -> dict[str, torch.Tensor]:
        """The tensors of one owner by id, in memory of their own."""
        return {
            shard.shard_id: self.bytes_of(shard).clone().view(shard.dtype).view(shard.shape)
            for shard in self.shards
            if shard.owner == owner
        }

    def bytes_of(self, shard: Shard, first: int = 0) -> torch.Tensor:
        """Its bytes, from the one numbered `first`."""
        pattern = self._bits if shard.dtype == torch.bool else self._bytes
        return pattern[shard.offset + first : shard.offset + shard.nbytes]

    def fault_in(self, shard: Shard, tensor: torch.Tensor, first: int = 0) -> str:
        """What is wrong with a tensor that has the bytes of a shard from the one numbered `first`; "" if nothing."""
        if tensor.dtype != shard.dtype or (not first and tuple(tensor.shape) != shard.shape):
            return f"{shard}: came as {tensor.dtype} {tuple(tensor.shape)}"
        found, expected = tensor.reshape(-1).view(torch.uint8), self.bytes_of(shard, first)
        if torch.equal(found, expected):
            return ""
        if found.numel() != expected.numel():
            return f"{shard}: {found.numel():,} bytes instead of {expected.numel():,}"
        wrong = torch.nonzero(found != expected).flatten()
        return f"{shard}: {wrong.numel():,} wrong bytes, from {first + int(wrong[0]):,} to {first + int(wrong[-1]):,}"


def _draw(number: int, chance: random.Random) -> Shard:
    """Lengths are spread evenly over the orders of magnitude."""
    dtype = chance.choice(_DTYPES)
    nbytes = math.exp(chance.uniform(math.log(_LEAST_BYTES), math.log(_MOST_BYTES)))
    count = math.ceil(nbytes / dtype.itemsize)
    columns = chance.choice([1, 2, 16, 100])
    shape = (count // columns, columns) if columns > 1 and count >= columns else (count,)
    nbytes = math.prod(shape) * dtype.itemsize
    return Shard(f"soak-{number}", number % NUM_OWNERS, dtype, shape, number * _STRIDE_BYTES, nbytes)
