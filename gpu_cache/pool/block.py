"""Slabs, ranges and copies: the records of a pool, and how a range becomes the tensors of shards."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Hashable, Sequence

import torch

from gpu_cache.config import ALIGNMENT
from gpu_cache.device.protocol import Arena, Event
from gpu_cache.native import blocks
from gpu_cache.pool.completion import Completion
from gpu_cache.pool.freelist import FreeList
from gpu_cache.pool.lease import Lease, carve
from gpu_cache.source import ShardSpec


@dataclasses.dataclass(slots=True, eq=False)
class Slab:
    """One arena cut into blocks. The pool's lock guards every field but `templates`."""

    arena: Arena
    free: FreeList
    is_overflow: bool = False  # beyond the pool's cap: it holds one run, and is released with it
    leases: dict[int, Lease] = dataclasses.field(default_factory=dict)  # by offset, kept until they fire
    templates: dict[torch.dtype, torch.Tensor] = dataclasses.field(
        default_factory=dict
    )  # empty tensors; the worst that a race does is to make one twice
    used_at: int = 0  # the number of its last take

    @property
    def nbytes(self) -> int:
        return self.free.capacity


@dataclasses.dataclass(slots=True, eq=False)
class Range:
    """Consecutive bytes of a slab. While PENDING they belong to the thread that receives into them."""

    slab: Slab
    offset: int
    nbytes: int
    leased_bytes: int = 0  # at its beginning; leases give these back, and no longer the thread that took the range

    @property
    def rest(self) -> Range:
        """The part that no lease covers, for the thread that took the range to give back."""
        return Range(self.slab, self.offset + self.leased_bytes, self.nbytes - self.leased_bytes)


@dataclasses.dataclass(slots=True, eq=False)
class Copy:
    """One shard's bytes in a pool, and the tensors over them.

    Until it is published only the thread that fills it has it. From then on the index lock guards `loan`, `spares`,
    `version` and `checksum`. The other fields stay as they are, and any thread may read them.
    """

    key: Hashable
    base: torch.Tensor  # on its block, and never handed out
    lease: Lease | None  # None: it has no bytes
    nbytes: int
    loan: torch.Tensor | None = None  # the tensor that one reader has, or the next one gets; see `index/lending.py`
    completion: Completion | None = None  # done when its bytes are there; None: they are
    version: int = 0  # `counted` had it when the block was last known to hold the source's bytes
    checksum: int | None = None  # with `debug_checksum`: its bytes', before any reader had it
    spares: list[torch.Tensor] | None = None  # loans of further readers, the one lent longest ago first

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that it has over its bytes."""
        found = [self.base] if self.loan is None else [self.base, self.loan]
        return found + self.spares if self.spares else found

    @property
    def counted(self) -> torch.Tensor:
        """A tensor that shares its version counter with every tensor that was handed out."""
        return self.base if self.loan is None else self.loan

    @property
    def is_changed(self) -> bool:
        """Whether a reader wrote into it, as far as torch counts writes."""
        return (self.base if self.loan is None else self.loan)._version != self.version


if blocks is not None:
    blocks.bind_copies(Copy)


@dataclasses.dataclass(slots=True, eq=False)
class Quarantine:
    """Ranges freed together; reusable when every event is done."""

    ranges: Sequence[Range | Lease]
    events: list[Event] | None = None  # None: not yet recorded


@dataclasses.dataclass(frozen=True, slots=True)
class TrimReport:
    """How much memory was given back. True if any was.

    Attributes:
        freed_bytes: Of slabs that went back to the device's allocator.
        held_bytes: Of slabs that stay because a shard in them is cached, on its way, or held by an alias.
        num_held: How many slabs those are.
    """

    freed_bytes: int = 0
    held_bytes: int = 0
    num_held: int = 0

    def __bool__(self) -> bool:
        return self.freed_bytes > 0


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to a whole number of alignment units."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def carve_shards(
    taken: Range, specs: Sequence[ShardSpec], offsets: Sequence[int], freed: deque[Lease], leases: dict[int, Lease]
) -> list[Copy]:
    """The tensors of the shards of a run, `offsets` bytes into its range. `leases` gets, by offset, what frees them.

    If it raises, the frames of the error keep the tensors made so far: their leases must not fire before the pool has
    them.
    """
    slab, first, copies = taken.slab, taken.offset, list[Copy]()
    storage, device = slab.arena.tensor.untyped_storage(), slab.arena.tensor.device
    templates = slab.templates
    for dtype in {spec.dtype for spec in specs} - templates.keys():
        templates[dtype] = _empty((0,), dtype, device)
    if blocks is not None:
        blocks.carve_all(storage, slab, first, specs, offsets, ALIGNMENT, templates, freed.append, leases, copies)
        return copies
    for spec, relative in zip(specs, offsets, strict=True):
        offset, nbytes = first + relative, spec.nbytes
        base, twin, lease = carve(storage, offset, nbytes, templates[spec.dtype], spec.shape, freed.append)
        lease.key, lease.slab, lease.offset, lease.nbytes = spec.key, slab, offset, aligned(nbytes)
        leases[offset] = lease
        copies.append(Copy(spec.key, base, lease, nbytes, twin, None, (base if twin is None else twin)._version))
    return copies


def empty_copies(specs: Sequence[ShardSpec], device: torch.device) -> list[Copy]:
    """Tensors of shards without bytes; they take no room. Call inside `plain_tensors()`."""
    return [Copy(s.key, _empty(s.shape, s.dtype, device), None, 0) for s in specs]


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor without bytes.

    Raises:
        ValueError: Of a quantized dtype: a tensor on a block would lack scale and zero point, and a look at them ends
            the process.
    """
    if str(dtype).startswith(("torch.qint", "torch.quint")):
        raise ValueError(f"shards of {dtype} cannot be cached: scale and zero point do not travel")
    return torch.empty(shape, dtype=dtype, device=device)
