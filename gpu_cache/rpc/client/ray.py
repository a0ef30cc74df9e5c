"""The Ray backend: shards in Ray's object store. Ray is optional: a caller that picks this backend has imported it."""

from __future__ import annotations

import importlib
import time
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch

from gpu_cache.rpc.client.backend import CallSource, promises_of
from gpu_cache.rpc.shard import ShardClearError, ShardFetchError, ShardMissingError, ShardTimeoutError, TensorShardInfo
from gpu_cache.rpc.wire.serialization import check_stored

# The share of a call's time in which all objects are got at once; the rest is to find out which of them are there.
_SHARE_OF_ALL = 0.9
_SHORTEST_S = 1e-3  # the shortest time-out: some versions of Ray take zero to mean none


class RayRTensorBackend:
    """Shard ids are `ObjectRef`s, addresses are empty.

    Args:
        ray: The module; None imports it.
    Raises:
        ImportError: Ray is not installed.
    Thread-safety: any thread.
    """

    def __init__(self, ray: Any = None) -> None:
        self._ray = importlib.import_module("ray") if ray is None else ray

    def __repr__(self) -> str:
        return "RayRTensorBackend()"

    def source(
        self, shards: Mapping[Hashable, TensorShardInfo], expected: Mapping[Hashable, torch.Tensor]
    ) -> CallSource:
        """A source over the object store; a lost object fails alone."""
        return CallSource("ray", self._load, promises_of(shards, expected))

    def fetch(self, shards: list[TensorShardInfo]) -> list[torch.Tensor]:
        """The tensors of shards, in order.

        Raises:
            ray.exceptions.RayError: An object is lost.
        """
        tensors: list[torch.Tensor] = self._ray.get([info.shard_id for info in shards])
        return tensors

    def store(self, tensor: torch.Tensor) -> Any:
        """Put a tensor into the object store; returns its reference.

        Raises:
            TypeError: Others could not use it: it does not travel, or has no values.
        """
        check_stored(tensor)
        return self._ray.put(tensor)

    def take_back(self, shard_ids: Sequence[Any]) -> None:
        """Free what `store` has put."""
        self._free(shard_ids)

    async def delete(self, node_addr: str, shard_ids: list[Any]) -> dict[str, Any]:
        """Free objects wherever they are. Unknown ones are no error.

        Raises:
            ShardClearError: Ray refused some, and says which; the others are freed.
        """
        refused = [] if self._free(shard_ids) is None else [one for one in shard_ids if self._free([one]) is not None]
        if refused:
            message = f"Failed to clear {len(refused):,} of {len(shard_ids):,} shards in ray: {self._free(refused)}"
            raise ShardClearError(message, refused)
        return {"status": "ok", "cleared_count": len(shard_ids)}

    def _free(self, shard_ids: Sequence[Any]) -> str | None:
        """Free objects; why Ray would not, if so."""
        try:
            if shard_ids:
                self._ray.internal.free(list(shard_ids))
        except (TypeError, ValueError, self._ray.exceptions.RayError) as error:  # such as for what is no reference
            return repr(error)
        return None

    def _load(self, keys: Sequence[Hashable], timeout_s: float) -> list[torch.Tensor | Exception]:
        deadline = time.monotonic() + timeout_s * _SHARE_OF_ALL
        try:
            return list(self._ray.get(list(keys), timeout=timeout_s * _SHARE_OF_ALL))
        except self._ray.exceptions.RayError:
            return [self._load_one(key, deadline) for key in keys]

    def _load_one(self, key: Hashable, deadline: float) -> Any:
        try:
            return self._ray.get(key, timeout=max(_SHORTEST_S, deadline - time.monotonic()))
        except self._ray.exceptions.GetTimeoutError as error:
            return ShardTimeoutError(f"Failed to fetch shard {key!r} from ray: {error!r}")
        except self._ray.exceptions.RayError as error:
            is_lost = isinstance(error, self._ray.exceptions.ObjectLostError)
            kind = ShardMissingError if is_lost else ShardFetchError
            return kind(f"Failed to fetch shard {key!r} from ray: {error}")
