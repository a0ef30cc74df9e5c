"""Blocks: zero-copy tensors over a part of an arena. Leases tell when the last alias of a block died.

A block's tensor sits on a slice of a slice of the arena's storage. Only the inner slice refers to the outer one. So
the outer one dies with the last alias of any kind: views, saved tensors, numpy arrays, DLPack capsules. A weak
reference on the public tensor or its storage does not see them all.
Source: our measurement of 24 ways of keeping an alias, torch 2.9.1 and 2.13; for the public storage pytorch#145253.

While another thread runs Python, a call that gives the GIL away may wait 5 ms to get it back. Most calls of torch give
it away, and so does the drop of any tensor. Blocks are built, aliased and emptied by the few calls that do not.
Source: our count of `PyEval_SaveThread`, torch 2.13: `detach`, `empty` and the drop of a tensor 1 each, `set_` 4,
`Tensor._make_subclass`, `Tensor.new(storage)`, `_reinterpret_tensor`, the setter of `data` and slices of storages 0.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from sys import getrefcount
from typing import Any, NamedTuple
from weakref import getweakrefcount

import torch

from gpu_cache.device.modes import plain_tensors
from gpu_cache.native import blocks

_COLLECTIONS = 1000
_LAYOUTS = 4096  # remembered
_WHOLE = slice(None)
# `UntypedStorage.__getitem__` ends in this call. Its looks at the device cost twice as much: 0.8 us instead of 0.25.
_slice_of: Callable[[torch.UntypedStorage, slice], torch.UntypedStorage] = torch._C.StorageBase.__getitem__  # type: ignore[misc]
_alias_of: Callable[[type[torch.Tensor], torch.Tensor], torch.Tensor] = torch.Tensor._make_subclass
num_owners: Callable[[torch.Tensor], int] = torch.Tensor._use_count  # type: ignore[attr-defined]  # in C++: views, graphs

# Makes a dense tensor of a shape over a whole storage, like an empty template in dtype and device. If it makes another
# tensor on that storage on the way, of any shape, it returns that too.
Builder = Callable[[torch.Tensor, torch.UntypedStorage, "Layout"], tuple[torch.Tensor, torch.Tensor | None]]


class Layout(NamedTuple):
    """Shape, strides and bytes of a dense tensor. `described` has them as torch rebuilds a tensor of a CUDA graph."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    nbytes: int
    described: dict[str, Any]


class Lease(weakref.ref[torch.UntypedStorage]):
    """Fires into a deque when a block's last alias dies, and says which bytes those were. Must be kept until then.

    The callback is `deque.append` and nothing else. It runs on any thread: inside garbage collection, inside our own
    critical sections, or with a GIL taken just for it. Any lock may be held there already.
    """

    __slots__ = ("key", "nbytes", "offset", "slab")

    key: Hashable
    slab: Any  # the Slab that the block was carved from
    offset: int
    nbytes: int  # the block's, alignment included


def _num_references(holder: list[object]) -> int:
    """The answer of `getrefcount` for an object that one container and one local variable refer to."""
    one = holder[0]
    return getrefcount(one)


UNSHARED = _num_references([object()])


class Husks:
    """Tensors without bytes, of one device and the host. The reaper drops them, as a drop gives the GIL away.

    Thread-safety: any thread, by single operations of a deque.
    """

    def __init__(self) -> None:
        self._kept: deque[torch.Tensor] = deque()
        self.keep = self._kept.append  # takes a tensor to be dropped later
        self._nothing: dict[bool, torch.Tensor] = {}  # an empty tensor on the host (True), and on the one GPU

    def __len__(self) -> int:
        return len(self._kept)

    def strip(self, tensors: list[torch.Tensor]) -> None:
        """Empty the list. A tensor that only the list holds loses its bytes now, and is dropped later."""
        if blocks is not None:
            self._kept.extend(blocks.strip(tensors))
            return
        with plain_tensors():
            self._strip(tensors)

    def drop(self, most: int) -> None:
        """Drop at most so many tensors, one by one."""
        with contextlib.suppress(IndexError):  # there are no more
            for _ in range(most):
                self._kept.popleft()

    def _strip(self, tensors: list[torch.Tensor]) -> None:
        while tensors:
            one = tensors[-1]
            # In this order: a look at a tensor of a reader's class would call that class.
            is_plain = getrefcount(one) == UNSHARED and type(one) is torch.Tensor
            is_mine = is_plain and num_owners(one) == 1 and not getweakrefcount(one)
            if is_mine and not one.requires_grad:  # a reader's change; torch would not let it have these bytes
                if (nothing := self._nothing.get(one.is_cpu)) is None:
                    nothing = self._nothing_like(one)
                one.data = nothing
                self._kept.append(one)
            tensors.pop()

    def _nothing_like(self, one: torch.Tensor) -> torch.Tensor:
        return self._nothing.setdefault(one.is_cpu, torch.empty(0, dtype=torch.uint8, device=one.device))


def carve(
    arena: torch.UntypedStorage,
    offset: int,
    nbytes: int,
    template: torch.Tensor,
    shape: tuple[int, ...],
    fired: Callable[[Lease], None],
) -> tuple[torch.Tensor, torch.Tensor | None, Lease]:
    """A tensor over `nbytes` (at least 1) of an arena, and the lease that `fired` gets when its last alias dies.

    The tensor has the dtype and the device of `template`, which is empty. Its storage is its own, has exactly `nbytes`,
    and cannot be resized. Call inside `plain_tensors()`. The call gives the GIL away only with a torch that lacks the
    quick ways to build a tensor.

    Args:
        arena: Of a slab.
        offset: In bytes.
        nbytes: Those of a dense tensor of `shape`.
        template: An empty tensor.
        shape: The tensor's.
        fired: The `append` of a deque.
    Returns:
        The tensor; another one over the same bytes, with a version counter of its own, if building made one; the lease.
    """
    if blocks is not None:
        made: tuple[torch.Tensor, torch.Tensor, Lease] = blocks.carve(arena, offset, nbytes, template, shape, fired)
        return made
    hidden = _slice_of(arena, slice(offset, offset + nbytes))
    inner = _slice_of(hidden, _WHOLE)
    layout = _layout_of(shape, template.dtype)
    if layout.nbytes != nbytes:
        raise ValueError(f"{nbytes:,} bytes are no {template.dtype} tensor of shape {shape}")
    tensor, twin = (_builders.get(template.is_cpu) or _choose_builder(template, inner))(template, inner, layout)
    if twin is not None:
        twin.data = tensor
    # Last: had building failed with the lease made, it would have fired for a range that is still the caller's.
    return tensor, twin, Lease(hidden, fired)


@functools.lru_cache(_LAYOUTS)
def _layout_of(shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
    shape = tuple(map(int, shape))  # True is found as 1 is, and torch refuses it
    if any(length < 0 for length in shape):
        raise ValueError(f"shape {shape} has a negative length")
    strides = tuple(math.prod(max(1, length) for length in shape[number:]) for number in range(1, len(shape) + 1))
    described = {"size": shape, "stride": strides, "storage_offset": 0, "dtype": dtype}
    return Layout(shape, strides, math.prod(shape) * dtype.itemsize, described)


_builders: dict[bool, Builder] = {}  # the quickest sound one, for the host (True) or a GPU; each is found once


def _choose_builder(template: torch.Tensor, storage: torch.UntypedStorage) -> Builder:
    ways = _ways_to_build(is_cuda=template.is_cuda)
    chosen = _builders[template.is_cpu] = next(one for one in ways if _is_sound(one, template, storage))
    return chosen


def _ways_to_build(*, is_cuda: bool) -> Iterator[Builder]:
    """The quickest first. The last one is always sound, and gives the GIL away."""
    if is_cuda and (rebuild := getattr(torch._C, "_construct_CUDA_Tensor_From_Storage_And_Metadata", None)):
        yield lambda template, storage, layout: (rebuild(layout.described, storage), None)
    guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    if reinterpret := getattr(guards, "_reinterpret_tensor", None):
        yield _reinterpreting(reinterpret)
    yield lambda template, storage, layout: (template.data.set_(storage, 0, layout.shape), None)  # type: ignore[call-overload]


def _reinterpreting(reinterpret: Callable[..., torch.Tensor]) -> Builder:
    def build(
        template: torch.Tensor, storage: torch.UntypedStorage, layout: Layout
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        flat: torch.Tensor = template.new(storage)
        return reinterpret(flat, layout.shape, layout.strides, 0), flat

    return build


def _is_sound(build: Builder, template: torch.Tensor, storage: torch.UntypedStorage) -> bool:
    """Whether tensors so built are as `carve` promises. Neither reads nor writes bytes, nor allocates any."""
    length = storage.nbytes() // template.dtype.itemsize
    layouts = [_layout_of(shape, template.dtype) for shape in ((length,), (1, length))]
    return all(_is_as_wanted(build, template, storage, layout) for layout in layouts)


def _is_as_wanted(build: Builder, template: torch.Tensor, storage: torch.UntypedStorage, layout: Layout) -> bool:
    try:
        one, other = build(template, storage, layout)[0], build(template, storage, layout)[0]
        before = one._version
        other.unsqueeze_(0)
        return (
            (one.shape, one.dtype, one.device, one.is_contiguous())
            == (layout.shape, template.dtype, template.device, True)
            and (one.untyped_storage()._cdata, one.storage_offset()) == (storage._cdata, 0)
            and torch._C._dispatch_keys(one).raw_repr() == torch._C._dispatch_keys(template).raw_repr()
            and (one._version, one.requires_grad, one._is_view(), one.is_inference()) == (before, False, False, False)
        )
    except (RuntimeError, TypeError, KeyError):
        return False


def aliases_of(bases: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """A new tensor on the bytes of each base, with autograd state of its own, and the base's version counter.

    No inference mode or dispatch mode of this thread changes that. It never gives the GIL away.
    """
    return [_alias_of(torch.Tensor, base) for base in bases]


class AliasCounter:
    """Tells whether a block's tensor has aliases, by the use count of its storage."""

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

    def is_held(self, base: torch.Tensor, num_loans: int = 0) -> bool:
        """Whether readers hold aliases of `base`; False where this torch cannot tell.

        Args:
            base: A block's tensor.
            num_loans: Aliases that the index itself has.
        """
        return self._count is not None and self._count(base.untyped_storage()._cdata) > self._baseline + num_loans


def lease_fault() -> str:
    """The fault of leases on this torch: they fire while an alias lives, or never. "": they are sound. Under 1 ms."""
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
        base, _, lease = carve(arena.untyped_storage(), 0, 64, arena, (64,), freed.append)
        return base, lease
