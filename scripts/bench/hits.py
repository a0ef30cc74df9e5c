"""Hits of a flat list of handles: this project's, a dict's, and those of AReaL's own code where it is installed."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path as FilePath
from types import ModuleType
from typing import Any

import torch

from bench.exactness import check_tensors
from bench.paths import GET_MANY_HITS, LOCALIZE_HITS, OWN_HITS, REFERENCE, Path
from bench.trainer import Trainer
from bench.workloads import Workload
from gpu_cache.rpc import RTensor
from gpu_cache.source import NO_SOURCE

# A call is short: so many are timed together. Each has handles of its own, and drops those of the call before with its
# tensors, as the reads of a step do.
_NUM_CALLS = 5
_MODULE = "areal.infra.rpc.rtensor"
_REPOSITORY = FilePath(__file__).resolve().parents[2]


class UnavailableError(RuntimeError):
    """A row cannot run here; the message says why."""


def hit_paths(workload: Workload, trainer: Trainer) -> list[Path]:
    """All ways of handing out a batch that is there, in the order of the handles.

    Handles share the tensors on `meta` that they begin with, so that no call drops the last reference to one.
    """
    expected = [tensor for trajectory in workload.trajectories() for tensor in trajectory.values()]
    first = [handle for trajectory in trainer.new_handles() for handle in trajectory.values()]
    keys = [handle.shard.shard_id for handle in first]

    def path(name: str, run: Callable[[Any], Any], prepare: Callable[[], Any]) -> Path:
        sizes = workload.nbytes * _NUM_CALLS, workload.num_shards * _NUM_CALLS
        return Path(name, partial(_last, run), partial(check_tensors, expected), *sizes, prepare, is_transfer=False)

    def remote() -> list[list[RTensor]]:
        return [[RTensor(one.shard, one.data) for one in first] for _ in range(_NUM_CALLS)]

    def cached() -> list[list[RTensor]]:
        trainer.cached_handles()
        return remote()

    def cached_keys() -> list[list[Any]]:
        trainer.cached_handles()
        return [keys] * _NUM_CALLS

    return [
        path(REFERENCE, _dict_localize(dict(zip(keys, expected, strict=True))), remote),
        _own_path(path, first, dict(zip(keys, expected, strict=True))),
        path(LOCALIZE_HITS, RTensor.localize, cached),
        path(GET_MANY_HITS, lambda wanted: trainer.cache.get_many(wanted, NO_SOURCE), cached_keys),
    ]


def _last(call: Callable[[Any], Any], arguments: list[Any]) -> Any:
    """The result of the last of several calls. Each call's argument and result are dropped before the next."""
    found = None
    while arguments:
        found = None
        found = call(arguments.pop())
    return found


def own_code(folders: Sequence[str]) -> ModuleType:
    """The module of handles of the AReaL that is installed in one of the folders, beside this project's of that name.

    Raises:
        UnavailableError: None is installed, or it cannot be imported.
    """
    relative = FilePath(*_MODULE.split(".")).with_suffix(".py")
    found = [folder for folder in folders if folder and (FilePath(folder) / relative).is_file()]
    others = [folder for folder in found if FilePath(folder).resolve() != _REPOSITORY]
    if not others:
        raise UnavailableError("AReaL is not installed here")
    ours = _pop_package()
    sys.path.insert(0, others[0])
    try:
        found_module = importlib.import_module(_MODULE)
    except Exception as error:
        raise UnavailableError(f"AReaL in {others[0]} cannot be imported: {error!r}") from error
    finally:
        sys.path.remove(others[0])
        _pop_package()
        sys.modules.update(ours)
    if getattr(found_module, "RTensor", None) is RTensor:
        raise UnavailableError(f"{others[0]} is another checkout of this project")
    return found_module


def _pop_package() -> dict[str, ModuleType]:
    """Take the package's modules out of the interpreter's table."""
    names = [name for name in sys.modules if name.partition(".")[0] == "areal"]
    return {name: sys.modules.pop(name) for name in names}


def _dict_localize(kept: Mapping[Any, torch.Tensor]) -> Callable[[list[RTensor]], list[torch.Tensor]]:
    """The least that a `localize` does: find the remote handles, look them up under a lock, hand out what is kept.

    AReaL's own takes 1.3 to 3 times as long, with its two recursive walks.
    """
    lock = threading.Lock()

    def localize(handles: list[RTensor]) -> list[torch.Tensor]:
        remote = [one for one in handles if isinstance(one, RTensor) and one.data.is_meta]
        with lock:
            for handle in remote:
                handle.data = kept[handle.shard.shard_id]
        return [handle.data for handle in handles]

    return localize


def _own_path(make: Callable[..., Path], handles: Sequence[RTensor], kept: Mapping[Any, torch.Tensor]) -> Path:
    """AReaL's own `localize`, with everything in its buffer."""
    try:
        own = own_code(sys.path)
        own._fetch_buffer.update(kept)
    except (UnavailableError, AttributeError) as error:
        return Path.unavailable(OWN_HITS, str(error))
    infos = [own.TensorShardInfo(one.shard.shard_id, one.shard.node_addr) for one in handles]

    def remote() -> list[list[Any]]:
        return [
            [own.RTensor(info, one.data) for info, one in zip(infos, handles, strict=True)] for _ in range(_NUM_CALLS)
        ]

    return make(OWN_HITS, own.RTensor.localize, remote)
