"""How any backend stores the tensors of one call: all of them, or none."""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, runtime_checkable

import torch

from gpu_cache.process import OwnThread, no_collections
from gpu_cache.rpc.client.backend import RTensorBackend
from gpu_cache.rpc.client.http import HttpRTensorBackend
from gpu_cache.rpc.shard import TensorShardInfo, collect_leaves, leaf_paths, like, map_leaves
from gpu_cache.rpc.trimming import trim_padding
from gpu_cache.rpc.wire.serialization import check_stored

_TAKE_BACK_S = 10.0  # a deletion after a failure is waited for so long
_OWN_STORE = HttpRTensorBackend.store  # a user may have replaced it, in a subclass or in one object
_DICT_OR_TENSOR: Any = (dict, torch.Tensor)

logger = logging.getLogger(__name__)


@runtime_checkable
class TakingBack(Protocol):
    """A backend that can forget at once what it has just stored."""

    def take_back(self, shard_ids: Sequence[Any]) -> None:
        """Forget it. Called by the owner, and not for what others may know of."""


@runtime_checkable
class StoringMany(Protocol):
    """A backend that keeps the tensors of a call together, and copies them itself."""

    def store_many(self, tensors: Sequence[torch.Tensor]) -> Sequence[TensorShardInfo]:
        """Keep tensors, all or none; returns where each is."""


def check_all_travel(obj: Any) -> bool:
    """Refuse tensors that do not travel; whether there are any tensors."""
    tensors = collect_leaves(obj, torch.Tensor)
    for tensor in tensors:
        try:
            check_stored(tensor)
        except TypeError as error:
            path = next(path for path, leaf in leaf_paths(obj, torch.Tensor, "obj") if leaf is tensor)
            raise TypeError(f"cannot remotize {path}: {error} (nothing was stored)") from None
    return bool(tensors)


def stored(
    obj: Any,
    node_addr: str,
    backend: RTensorBackend,
    handle_of: Callable[[TensorShardInfo, torch.dtype, torch.Size], object],
) -> Any:
    """The containers with handles in the place of tensors, which the backend has."""
    trimmed = map_leaves(obj, _DICT_OR_TENSOR, _trimmed)
    leaves = collect_leaves(trimmed, torch.Tensor)
    ids: list[Any] = []
    try:
        if isinstance(backend, StoringMany) and hasattr(type(backend), "store_many"):
            places = list(backend.store_many(leaves))
            ids += [place.shard_id for place in places]
        else:
            _store_each(backend, leaves, ids)
            with no_collections:  # thousands of objects would set one off
                places = [TensorShardInfo(shard_id, node_addr) for shard_id in ids]
        with no_collections:
            pairs = zip(places, leaves, strict=True)
            handles = iter([handle_of(place, leaf.dtype, leaf.shape) for place, leaf in pairs])
        return map_leaves(trimmed, torch.Tensor, lambda _: next(handles))
    except BaseException:
        no_collections.leave()  # whatever interrupted it
        _take_back(backend, node_addr, ids)
        raise


def _trimmed(leaf: Any) -> Any:
    """A tensor as it is; a dict of any class, to any depth, without trailing padding."""
    if not isinstance(leaf, dict):
        return leaf
    values = [map_leaves(value, _DICT_OR_TENSOR, _trimmed) for value in trim_padding(leaf).values()]
    return dict(zip(leaf, values, strict=True)) if type(leaf) is dict else like(leaf, values)


def _store_each(backend: RTensorBackend, tensors: Sequence[torch.Tensor], ids: list[Any]) -> None:
    """Store copies; `ids` gets those of the stored ones. Those of this project's HTTP backend lie side by side."""
    shards = backend.shards if isinstance(backend, HttpRTensorBackend) else None
    if shards is not None and getattr(backend.store, "__func__", None) is _OWN_STORE:
        with no_collections:
            drawn = os.urandom(16 * len(tensors))  # at once: each call gives the GIL away
            ids += [str(uuid.UUID(bytes=drawn[at : at + 16], version=4)) for at in range(0, len(drawn), 16)]
            shards.put_copies(ids, tensors)
        return
    # Each copy is let go as it is stored.
    copies = ([_owned_copy(tensor) for tensor in tensors] if shards is None else shards.copies(tensors))[::-1]
    while copies:
        ids.append(backend.store(copies.pop()))


def _owned_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A dense copy in host memory of torch's, which its owner may resize."""
    plain = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return plain.resolve_conj().resolve_neg()


def _take_back(backend: RTensorBackend, node_addr: str, shard_ids: list[Any]) -> None:
    """Remove what was stored for a call that failed. Never raises: that call's error is the one to see."""
    try:
        if not shard_ids:
            return
        if isinstance(backend, TakingBack) and hasattr(type(backend), "take_back"):
            backend.take_back(shard_ids)
        else:
            _delete_now(backend, node_addr, shard_ids)
    except Exception as error:
        text = "%d shards stay stored, as the call that had stored them failed and they could not be deleted: %s"
        logger.warning(text, len(shard_ids), repr(error))


def _delete_now(backend: RTensorBackend, node_addr: str, shard_ids: list[Any]) -> None:
    """Delete in a loop and a thread of its own: the caller may be inside another loop."""
    outcome: Future[Any] = Future()

    async def delete() -> None:
        outcome.set_result(await backend.delete(node_addr, shard_ids))

    def run() -> None:
        try:
            asyncio.run(delete())
        except BaseException as error:  # top of a thread
            outcome.set_exception(error)

    OwnThread(run, "areal-clear").start()
    outcome.result(_TAKE_BACK_S)
