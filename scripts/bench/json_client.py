"""Upstream's way: shards in JSON over HTTP, 32 a request."""

from __future__ import annotations

import http.client
import itertools
import json
from collections.abc import Sequence

import torch

from gpu_cache.rpc import deserialize_value

_SHARDS_PER_REQUEST = 32
_TIMEOUT_S = 60.0


class JsonClient:
    """Fetches shards of one owner in the JSON form, one request after another over one connection.

    Args:
        address: Of the owner's server.
    """

    def __init__(self, address: str) -> None:
        self._connection = http.client.HTTPConnection(address, timeout=_TIMEOUT_S)

    def fetch(self, shard_ids: Sequence[str]) -> list[torch.Tensor]:
        """The tensors of shards, in order.

        Raises:
            ConnectionError: The answer was not 200, or broke off.
        """
        requests = range(0, len(shard_ids), _SHARDS_PER_REQUEST)
        parts = [self._batch(shard_ids[start : start + _SHARDS_PER_REQUEST]) for start in requests]
        return list(itertools.chain.from_iterable(parts))

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _batch(self, shard_ids: Sequence[str]) -> list[torch.Tensor]:
        status, text = self._post(json.dumps({"shard_ids": shard_ids}))
        if status != 200:
            raise ConnectionError(f"the owner answered {status}: {text[:200]!r}")
        tensors: list[torch.Tensor] = deserialize_value(json.loads(text))
        return tensors

    def _post(self, body: str) -> tuple[int, bytes]:
        try:
            self._connection.request("POST", "/data/batch", body, {"Content-Type": "application/json"})
            answer = self._connection.getresponse()
            return answer.status, answer.read()
        except http.client.HTTPException as error:
            raise ConnectionError(f"the owner's answer broke off: {error!r}") from error
