"""Lends shards to readers, by the loan of each, and sees which of them readers have or wrote into.

Loans and hits are in C++ where that is built (`gpu_cache.native`), else in Python.

A shard's loan is one tensor object. A reader gets it if no other reader has it. It is made to look like the shard
again first: the reader before may have changed its look (`t_`, `resize_`, `data`). While a reader keeps the loan,
the next reader gets a spare that its reader let go of, or else an alias. That is the loan from then on, and the one
before is a spare. So no reader's drop is the last one, which would give the GIL away in the reader's thread. A loan
that autograd knows of stays with its reader.

An alias for each reader would cost twice the time. One object for all readers would cost less, but a reader's
`requires_grad_` would reach the others.
Source: our measurement, torch 2.13: a loan takes 0.45 us, an alias and its drop 1.1, beside a busy thread 56 to 210.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from sys import getrefcount
from typing import Any, TypeAlias
from weakref import getweakrefcount

import torch

from gpu_cache.index.entry import Entry, Promise
from gpu_cache.native import blocks
from gpu_cache.pool.block import Copy
from gpu_cache.pool.lease import UNSHARED, aliases_of, num_owners

MOST_SPARES = 7  # of a shard; if more readers have it at a time, the tensors lent longest ago stay with theirs

Table: TypeAlias = OrderedDict[Hashable, Entry]  # one level's entries, least recently used first


def _num_references_in(holder: list[object]) -> int:
    """The answer of `getrefcount` for an object that one container alone refers to."""
    return getrefcount(holder[0])


_IN_PLACE = _num_references_in([object()])


def lend_in_python(copies: Sequence[Copy], left: list[torch.Tensor | None]) -> list[torch.Tensor]:
    """A tensor of each copy, for one reader. Under the index lock.

    Args:
        copies: Of READY shards.
        left: Gets the loans that readers keep, for the caller to let die outside the lock.
    """
    lent = []
    for one in copies:
        loan = one.loan
        while (
            loan is None
            or getrefcount(loan) != UNSHARED
            or type(loan) is not torch.Tensor  # first: the looks below would call a reader's class
            or num_owners(loan) != 1
            or getweakrefcount(loan)
            or loan.requires_grad
            or loan.grad is not None
            or loan.__dict__
            or loan._backward_hooks is not None
            or loan._post_accumulate_grad_hooks is not None
        ):
            loan = None  # this reference would make it look held
            if (made := _replace_loan(one, left)) is not None:
                loan = made  # without a look: a debugger that holds it would make this endless
                break
            loan = one.loan
        loan.data = one.base
        lent.append(loan)
    return lent


def _replace_loan(one: Copy, left: list[torch.Tensor | None]) -> torch.Tensor | None:
    """Make another tensor a copy's loan: the next spare if its reader let it go, else an alias, which it returns.

    A spare may turn out to be no good, as when autograd knows of it. It is left to its reader then.
    """
    spares = one.spares = one.spares or []
    if one.loan is not None:
        (spares if getrefcount(one.loan) > _IN_PLACE else left).append(one.loan)
    if spares and getrefcount(spares[0]) == _IN_PLACE:
        one.loan = spares.pop(0)
        return None
    (one.loan,) = aliases_of([one.counted])
    if spares:
        oldest = spares.pop(0)  # held: the next look is at another one
        (spares if len(spares) < MOST_SPARES else left).append(oldest)
    return one.loan


def is_lent(one: Copy, is_held: Callable[[torch.Tensor, int], bool]) -> bool:
    """Whether a reader has a tensor of a copy: its loan, a spare, or another alias. Under the index lock.

    Args:
        one: Of a READY shard.
        is_held: Whether a base has more aliases than so many loans.
    """
    if (loan := one.loan) is None:
        return is_held(one.base, 0)
    found = getrefcount(loan) != UNSHARED or num_owners(loan) != 1
    for spare in one.spares or ():
        found = found or getrefcount(spare) != UNSHARED or num_owners(spare) != 1
    return found or is_held(one.base, 1 + len(one.spares or ()))


def changed_in(tables: Iterable[Table], keys: Iterable[Hashable], expected: Mapping[Hashable, Promise]) -> list[Entry]:
    """Find those of `keys` that a reader wrote into, of the owner that the caller means. Under the index lock.

    A function of its own: an error that `Mutations.found` raises must not keep a frame that refers to blocks.
    """
    changed = []
    for table in tables:
        for entry in map(table.get, keys):
            if entry is None or (one := entry.copy) is None:
                continue
            # As `is_changed`, whose call would double what this costs.
            counted = one.base if (loan := one.loan) is None else loan
            if counted._version != one.version and entry.is_owned_as(expected.get(entry.key)):
                changed.append(entry)
    return changed


def hits_in_python(
    table: Table,
    keys: Sequence[Hashable],
    expected: Mapping[Hashable, Promise],
    checks_versions: bool,
    left: list[torch.Tensor | None],
    completions: dict[Any, None],
) -> tuple[list[torch.Tensor], int] | None:
    """The tensors of `keys` and their bytes, if all are plain hits: see `ShardIndex.hits`. Under the index lock.

    Args:
        table: Of one level.
        keys: May repeat.
        expected: The caller's promises, by key.
        checks_versions: Whether a shard that a reader wrote into is no plain hit.
        left: As for `lend_in_python`.
        completions: Gets the completions that the tensors are safe to read after.
    """
    copies: list[Copy] = []
    nbytes, latest = 0, None
    find, touch = table.get, table.move_to_end
    for key, promise in zip(keys, map(expected.get, keys), strict=True):
        entry = find(key)
        if entry is None or (one := entry.copy) is None:
            return None
        # Equal ones are mostly one object: looking into two for each of thousands costs a quarter of the hit.
        if promise is not None and entry.promise is not promise and entry.promise != promise:
            return None
        loan = one.loan
        if checks_versions and (one.base if loan is None else loan)._version != one.version:
            return None
        copies.append(one)
        touch(key)
        nbytes += one.nbytes
        if (completion := one.completion) is not latest and completion is not None:
            completions[completion], latest = None, completion
    loan = None  # this reference would make the last loan look held
    return lend_in_python(copies, left), nbytes


lend: Callable[[Sequence[Copy], list[torch.Tensor | None]], list[torch.Tensor]] = lend_in_python
hits: Callable[..., tuple[list[torch.Tensor], int] | None] = hits_in_python

if blocks is not None:
    blocks.bind_entries(Entry, OrderedDict.move_to_end, MOST_SPARES)
    lend, hits = blocks.lend, blocks.hits
