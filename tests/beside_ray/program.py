"""A process that starts Ray twice, with RAY_ENABLE_ZERO_COPY_TORCH_TENSORS, and has children. Prints "good" in the end.

Each function is a test; a failed one ends the process.
"""

from __future__ import annotations

import multiprocessing
from typing import Any

import pytest
import torch

from gpu_cache import FetchError
from gpu_cache.rpc.rtensor import (
    HttpRTensorBackend,
    RTensor,
    TensorShardInfo,
    clear_fetch_buffer,
    get_backend,
    set_backend,
)
from tests.beside_ray.conftest import started
from tests.support.ray_actors import Worker, every_tensor, remote
from tests.support.wire_tensors import raw_bytes, same_bits


def zero_copy(ray: Any) -> None:
    """Ray hands tensors on without a copy, and takes none on meta."""
    worker = ray.remote(Worker).remote()
    handles = RTensor.remotize(every_tensor(), "")
    assert ray.get(worker.read.remote(handles)) == [raw_bytes(tensor) for tensor in every_tensor()]
    theirs = ray.get(worker.store_every.remote())
    found = RTensor.localize(theirs)
    assert all(same_bits(one, other) for one, other in zip(found, every_tensor(), strict=True))
    assert all(one.data.is_meta for one in ray.get(ray.put(theirs)))


def restarts(ray: Any) -> None:
    """After a shutdown Ray is not started again by a call of ours, and a later Ray knows nothing of the first."""
    first = RTensor.remotize([torch.zeros(5)], "")
    cached = RTensor.localize(remote(first))[0]
    backend = get_backend()
    ray.shutdown()
    assert isinstance(get_backend(), HttpRTensorBackend)
    assert not ray.is_initialized()
    assert "Ray is not initialised here: call ray.init" in failure(fresh(first))
    for call in (lambda: backend.store(torch.ones(1)), lambda: backend.fetch([first[0].shard])):
        with pytest.raises((RuntimeError, FetchError), match="is never started from here"):
            call()
    RTensor.remotize([torch.zeros(1)], "localhost:1")
    assert not ray.is_initialized()
    started()
    set_backend(None)
    second = RTensor.remotize([torch.ones(5)], "")
    assert RTensor.localize(remote(second))[0].tolist() == [1] * 5
    assert cached.tolist() == [0] * 5
    assert first[0].shard.shard_id != second[0].shard.shard_id
    assert "Ray was shut down here since its handle came" in failure(fresh(first))
    ray.shutdown()


def spawns() -> None:
    """A child without Ray says what it lacks."""
    handles = RTensor.remotize([torch.zeros(5)], "")
    context = multiprocessing.get_context("spawn")
    with pytest.raises(TypeError, match="cannot be pickled"):
        context.Process(target=print, args=(handles,)).start()
    assert "Ray is not initialised here: call ray.init" in said_by_child(context, handles[0].shard.shard_id)


def forks() -> None:
    """A forked child does not use its parent's Ray."""
    handles = RTensor.remotize([torch.zeros(5)], "")
    context = multiprocessing.get_context("fork")
    assert "Ray is not initialised here: call ray.init" in said_by_child(context, handles[0].shard.shard_id)
    assert RTensor.localize(remote(handles))[0].tolist() == [0] * 5


def said_by_child(context: Any, shard_id: str) -> str:
    ours, theirs = context.Pipe()
    child = context.Process(target=tell, args=(theirs, shard_id))
    child.start()
    said = str(ours.recv()) if ours.poll(60) else "nothing"
    child.join(60)
    assert child.exitcode == 0
    return said


def tell(pipe: Any, shard_id: str) -> None:
    pipe.send(failure([RTensor(TensorShardInfo(shard_id, ""), torch.empty(5, device="meta"))]))


def fresh(handles: list[RTensor]) -> list[RTensor]:
    """Handles of shards that are not cached."""
    clear_fetch_buffer()
    return remote(handles)


def failure(handles: list[RTensor]) -> str:
    try:
        RTensor.localize(handles, timeout_s=10)
    except FetchError as error:
        return str(error)
    raise AssertionError("they were read")


if __name__ == "__main__":
    module = started()
    zero_copy(module)
    spawns()
    forks()
    restarts(module)
    print("good")
