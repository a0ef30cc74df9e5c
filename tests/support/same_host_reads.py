"""How tests read shards of an owner's memory: by handles, or by a reader of their own."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch

from gpu_cache.rpc import runtime
from gpu_cache.rpc.client.http import HttpRTensorBackend, SameHostReader
from gpu_cache.rpc.rtensor import RTensor, TensorShardInfo
from tests.support.areal_fixtures import remote


def localized(address: str, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = RTensor.localize([remote(address, key, one) for key, one in tensors.items()])
    return found


def transport(address: str) -> str:
    """How the latest answer of an owner came."""
    found: str = runtime.current().cache._index.report()["sources"][address]["transport"]
    return found


def reader(backend: HttpRTensorBackend, address: str, *keys: Hashable) -> SameHostReader:
    (made,) = backend.source({key: TensorShardInfo(key, address) for key in keys}, {}).open(keys, 30.0)
    assert isinstance(made, SameHostReader)
    return made


def read(source: SameHostReader, nbytes: int) -> bytes:
    """The next bytes, where they are lent."""
    return b"".join(
        bytes(one.memory.tensor[one.begin : one.begin + one.nbytes].numpy()) for one in source.read_run([(0, nbytes)])
    )
