"""The Ray backend: shards in Ray's object store. Ray is optional: a caller that picks this backend has imported it."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch

from gpu_cache import Promise, ShardReader
from gpu_cache.rpc.client.http import drained
from gpu_cache.rpc.client.ray_objects import RayObject, RayReader, Writer, clear
from gpu_cache.rpc.shard import TensorShardInfo
from gpu_cache.rpc.wire.serialization import check_stored

_FETCH_S = 60.0  # the longest time of `fetch`, as over HTTP


class RayRTensorBackend:
    """Keeps shards in Ray's object store: those of one `remotize` side by side, in one object for each 128 MiB.

    A shard's id is text, "ray:REFERENCE.RANDOM/NUMBER". Ray's reference stands beside it: a handle holds it, in every
    process that got the handle through Ray's own serializer, and what is cached under the id does not. So an object
    stays in the store while a handle of one of its shards lives in any process and was not cleared there. Memory is
    freed an object at a time, when the last of its shards was cleared, or lost its last handle. An id that `store`
    returned keeps its object until it is deleted in this process.

    Handles travel as arguments and results of actors and tasks, and in what is `put`. In JSON, a standard pickle, or
    AReaL's codec they are refused at once. Ray itself could send a reference so, by its `cloudpickle`, but then keeps
    the object until the sender ends: no clear would ever free it, as since 2.59 nothing else does.

    A clear drops the references of its process. Consumers drop theirs by `clear_batches`, or with the handles. Where
    Ray still has `ray.internal.free`, up to 2.58, the clear of a whole object also frees it for all.

    Args:
        ray: The module; None imports it.
    Raises:
        ImportError: Ray is not installed.
    Thread-safety: any thread.
    """

    def __init__(self, ray: Any = None) -> None:
        self._ray = importlib.import_module("ray") if ray is None else ray
        self._writer = Writer(self._ray)
        self._kept: dict[str, RayObject] = {}  # of ids that `store` returned

    def __repr__(self) -> str:
        return "RayRTensorBackend()"

    def source(self, shards: Mapping[Hashable, TensorShardInfo], expected: Mapping[Hashable, Promise]) -> RaySource:
        """A source over the object store; a lost object fails alone."""
        return RaySource(self._ray, shards, expected)

    def fetch(self, shards: list[TensorShardInfo]) -> list[torch.Tensor]:
        """The tensors of shards, in order, past every cache.

        Raises:
            ShardFetchError: One did not arrive.
        """
        wanted = {info.shard_id: info for info in shards}
        found = drained(RayReader(self._ray, wanted, {}, _FETCH_S))
        return [found[info.shard_id] for info in shards]

    def store(self, tensor: torch.Tensor) -> str:
        """Put a tensor into the object store; returns its id. This process keeps it until the id is deleted here.

        Raises:
            TypeError: Others could not use it: it does not travel, or has no values.
            RuntimeError: Ray is not initialised in this process.
        """
        (info,) = self.store_many([tensor])
        self._kept[info.shard_id] = info._object
        return str(info.shard_id)

    def store_many(self, tensors: Sequence[torch.Tensor]) -> list[TensorShardInfo]:
        """Put tensors into the object store, side by side; all of them, or none. Their places keep them there.

        Raises:
            TypeError: Others could not use one.
            RuntimeError: Ray is not initialised in this process.
        """
        for tensor in tensors:
            check_stored(tensor)
        return self._writer.put(tensors)

    def take_back(self, shard_ids: Sequence[Any]) -> None:
        """Let go of shards in this process; a whole object is freed for all, where Ray can do so."""
        self._clear(shard_ids)

    async def delete(self, node_addr: str, shard_ids: list[Any]) -> dict[str, Any]:
        """Let go of shards in this process, as `take_back`. Unknown ones are no error, and nothing else is.

        Returns:
            How many of them this process knew.
        """
        return {"status": "ok", "cleared_count": self._clear(shard_ids)}

    def trim(self) -> bool:
        """Give memory that was kept for the next `store_many` back; whether there was any."""
        return self._writer.trim()

    def _clear(self, shard_ids: Sequence[Any]) -> int:
        num_known, whole = clear(shard_ids)
        for shard_id in shard_ids:
            if isinstance(shard_id, str):
                self._kept.pop(shard_id, None)
        whole += [one for one in shard_ids if isinstance(one, getattr(self._ray, "ObjectRef", ()))]
        free = getattr(getattr(self._ray, "internal", None), "free", None)
        if whole and free is not None and self._ray.is_initialized():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # Ray's, of what it has not removed yet
                free(whole)
        return num_known


class RaySource:
    """A `ShardSource` over Ray's object store.

    Args:
        ray: The module.
        shards: Where each is.
        promises: Of the handles, where known.
    """

    def __init__(
        self, ray: Any, shards: Mapping[Hashable, TensorShardInfo], promises: Mapping[Hashable, Promise]
    ) -> None:
        self._ray, self._shards, self._promises = ray, shards, promises

    def open(self, keys: Sequence[Hashable], timeout_s: float) -> Iterable[ShardReader]:
        """One reader, of all objects: Ray brings those of other nodes side by side."""
        return [RayReader(self._ray, {key: self._shards[key] for key in keys}, self._promises, timeout_s)]
