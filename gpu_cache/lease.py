"""Blocks: zero-copy tensors over a part of an arena, and leases, which tell when the last alias of a block died.

A block's tensor sits on a slice of a slice of the arena's storage. The outer slice is hidden: only the inner one
refers to it, so it dies with the last alias of any kind (views, saved tensors, numpy arrays, DLPack capsules), which
a weak reference on the public tensor or its storage does not see.
Source: our measurement of 24 ways of keeping an alias, torch 2.9.1 and 2.13; for the public storage pytorch#145253.
"""

from __future__ import annotations

import contextlib
import gc
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch.utils._python_dispatch import _disable_current_modes

_COLLECTIONS = 1000
# What `UntypedStorage.__getitem__` ends in, after looks at the device that cost twice as much: 0.25 instead of 0.8 us.
_slice_of: Callable[[torch.UntypedStorage, slice], torch.UntypedStorage] = torch._C.StorageBase.__getitem__  # type: ignore[misc]


class Lease(weakref.ref[torch.UntypedStorage]):
    """Fires into a deque when a block's last alias dies; says which bytes those were. Must be kept until then.

    The callback is `deque.append` and nothing else: it runs on any thread, inside garbage collection, inside our own
    critical sections and on threads that took the GIL just for it, where any lock may be held already.
    """

    __slots__ = ("key", "nbytes", "offset", "slab")

    key: Hashable
    slab: Any  # the Slab that the block was carved from
    offset: int
    nbytes: int  # of the block, alignment included


def carve(
    arena: torch.UntypedStorage,
    offset: int,
    nbytes: int,
    template: torch.Tensor,
    shape: tuple[int, ...],
    freed: deque[Lease],
) -> tuple[torch.Tensor, Lease]:
    """A tensor over `nbytes` (at least 1) of an arena, and the lease that goes to `freed` when it is unused.

    Call inside `plain_tensors()`. The tensor is like `template` in dtype and device; it has a storage of its own, of
    exactly `nbytes`, that cannot be resized.
    """
    hidden = _slice_of(arena, slice(offset, offset + nbytes))
    # `new`, as a tensor of a known dtype and device costs half of `torch.empty`.
    tensor = template.new().set_(_slice_of(hidden, slice(0, nbytes)), 0, shape)  # type: ignore[call-overload]
    # Last: had building failed with the lease made, it would have fired for a range that is still the caller's.
    return tensor, Lease(hidden, freed.append)


_Method = TypeVar("_Method", bound=Callable[..., object])


def eager(method: _Method) -> _Method:
    """Keep `torch.compile` out of a method: it would trace threads and locks."""
    return cast(_Method, torch.compiler.disable(method))  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def plain_tensors() -> Iterator[None]:
    """Build tensors as if no inference mode and no dispatch mode were active in this thread.

    A tensor born in inference mode could not be saved for backward by a later training step, and a fake-tensor mode
    would refuse to carve.
    """
    with torch.inference_mode(False), _disable_current_modes():
        yield


def aliases_of(bases: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """A new tensor on the bytes of each, with autograd state of its own."""
    if torch._C._len_torch_dispatch_stack():
        with plain_tensors():
            return [base.detach() for base in bases]
    return [base.detach() for base in bases]


class AliasCounter:
    """Tells whether a block's tensor has aliases, by the use count of its storage above that of an unaliased one."""

    def __init__(self) -> None:
        self._count = getattr(torch._C, "_storage_Use_Count", None)
        self._baseline = 0
        if self._count is not None:
            base, _ = _trial_block(deque())
            self._baseline = self._count(base.untyped_storage()._cdata)
            (alias,) = aliases_of([base])
            if self._count(base.untyped_storage()._cdata) != self._baseline + 1:
                self._count = None
            del alias

    def is_held(self, base: torch.Tensor) -> bool:
        """Whether anybody but the index holds `base`; False where this torch cannot tell."""
        return self._count is not None and self._count(base.untyped_storage()._cdata) > self._baseline


def lease_fault() -> str:
    """What is wrong with leases on this torch: fired while an alias lived, or never; "" if sound. Under 1 ms."""
    with plain_tensors():
        return _lease_fault()


def _lease_fault() -> str:
    freed: deque[Lease] = deque()
    base, lease = _trial_block(freed)
    view = base[1:]
    cycle: list[Any] = [base.untyped_storage(), base]
    cycle.append(cycle)
    del base, cycle
    gc.collect(0)
    fired_early = bool(freed)
    del view
    for _ in range(_COLLECTIONS):  # one does nothing while another thread is at it
        if freed:
            break
        gc.collect()
        time.sleep(0.001)
    if not fired_early and freed and freed[0] is lease:
        return ""
    return (
        f"torch {torch.__version__} reports the death of a storage {'early' if fired_early else 'not at all'}: cached "
        "bytes could be overwritten while they are read; use a torch that this version was tested with"
    )


def _trial_block(freed: deque[Lease]) -> tuple[torch.Tensor, Lease]:
    with plain_tensors():
        arena = torch.empty(64, dtype=torch.uint8, device="cpu")
        return carve(arena.untyped_storage(), 0, 64, arena, (64,), freed)
