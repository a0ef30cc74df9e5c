"""Objects of Ray's store: several shards in each, as arrays of bytes, and the reader that lends them."""

from __future__ import annotations

import itertools
import os
import secrets
import sys
import threading
import time
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from gpu_cache import Promise, ShardSpec
from gpu_cache.device.hostmem import host_tensor
from gpu_cache.device.modes import plain_tensors
from gpu_cache.pool.block import aligned
from gpu_cache.rpc.shard import (
    ONLY_RAYS_SERIALIZER,
    RAY_PREFIX,
    ShardAnswerError,
    ShardFetchError,
    ShardMissingError,
    ShardTimeoutError,
    ShardUnreachableError,
    TensorShardInfo,
    answer_error,
    is_of_ray,
    ray_objects,
)
from gpu_cache.rpc.wire.serialization import DTYPES, bytes_for_now, host_bytes, is_dense
from gpu_cache.source import LentMemory, Stretch, fill_from_lent, joined_places

# Shards of one call share objects of about this length: 3,072 of 9 KiB cost 0.11 ms each to store, and 1.7 ms alone.
GROUP_BYTES = 128 << 20
# A shard of this length on the host is an array of its own in the object: Ray copies it there from where it is. Shorter
# ones, and those of a device, are laid side by side in one array first: each array costs time of its own.
ALONE_BYTES = 256 << 10
# The share of a call's time in which objects are waited for; the rest is to copy those that are there.
_SHARE_OF_WAITING = 0.9
_LOOK_S = 0.2  # between two looks at whether the reader is cancelled
_MAX_REASON = 400  # characters of an error of Ray's, which are pages
_FORMAT = "gpu_cache 1"
NO_RAY = "Ray is not initialised in this process, and is never started from here: call ray.init"

# Guards `left` and `cleared` of each object, the reference of each, and what is entered in `ray_objects`.
_lock = threading.Lock()


class Sent(NamedTuple):
    """An object as it travels.

    Attributes:
        name: Its name.
        ref: Its `ObjectRef`; None: it was cleared before.
        num_shards: Shards in it.
    """

    name: str
    ref: Any
    num_shards: int


class RayObject:
    """An object of Ray's store, as this process knows it. It stays in the store for as long as a process refers to it.

    Args:
        name: The same in all processes; shard ids begin with it.
        ref: Its `ObjectRef`.
        num_shards: Shards in it.
    Attributes:
        left: Numbers of shards whose handles this process has or had, and that were not cleared here.
        cleared: Numbers of shards that were cleared here.
        session: Ray's, as `session` names it.
    Thread-safety: any thread, by the functions of this module.
    """

    __slots__ = ("__weakref__", "cleared", "left", "name", "num_shards", "ref", "session")

    def __init__(self, name: str, ref: Any, num_shards: int) -> None:
        self.name, self.ref, self.num_shards = name, ref, num_shards
        self.left: set[int] = set()
        self.cleared: set[int] = set()
        self.session = session()

    def __repr__(self) -> str:
        return f"RayObject({self.name}, {len(self.left):,} of {self.num_shards:,} shards held)"

    def reference_for(self, number: int) -> Any:
        """Its reference; None if the shard was cleared here."""
        return None if number in self.cleared else self.ref

    def __deepcopy__(self, memo: dict[int, Any]) -> RayObject:
        return self

    def reduced(self, info: TensorShardInfo) -> Any:
        """How a handle's place is pickled: with the object once for all of its shards."""
        return info_of, (self, int(info.shard_id.rpartition("/")[2]), info.node_addr)

    def __reduce__(self) -> Any:
        if not _is_rays_serializer():
            raise TypeError(f"the handle of a shard of {self.name} cannot be pickled: {ONLY_RAYS_SERIALIZER}")
        return Sent, (self.name, self.ref, self.num_shards)


def info_of(found: RayObject | Sent, number: int, node_addr: str = "") -> TensorShardInfo:
    """The place of one shard, which holds its object from now on.

    Args:
        found: The object. A `Sent` one has arrived with its handle, and brings a cleared shard back; a `RayObject` of
            this process does not.
        number: The shard's in it.
        node_addr: As the handle has it.
    """
    name, has_arrived = found.name, isinstance(found, Sent)
    info = TensorShardInfo.__new__(TensorShardInfo)
    info.shard_id, info.node_addr = f"{name}/{number}", node_addr
    made = found if isinstance(found, RayObject) else ray_objects.get(name) or RayObject(*found)
    with _lock:
        known = ray_objects.setdefault(name, made)
        if has_arrived and known.ref is None:
            known.ref = found.ref
        if has_arrived or number not in known.cleared:
            known.left.add(number)
            known.cleared.discard(number)
    info._object = known
    return info


def clear(shard_ids: Iterable[Any]) -> tuple[int, list[Any]]:
    """Let go of shards, and of each object of which this process has no other.

    Returns:
        How many were known here, and the references of objects of which every shard was cleared here.
    """
    num_known = 0
    unused: list[Any] = []
    whole: list[Any] = []
    for shard_id in shard_ids:
        name, _, text = shard_id.partition("/") if isinstance(shard_id, str) else ("", "", "")
        number = int(text) if text.isdecimal() else -1
        if (found := ray_objects.get(name)) is None:  # the last reference to an object, too, goes outside the lock
            continue
        with _lock:
            if number not in found.left:
                continue
            num_known += 1
            found.left.discard(number)
            found.cleared.add(number)
            if not found.left:
                unused.append(found.ref)  # the last reference may go where no lock is held
                if len(found.cleared) == found.num_shards:
                    whole.append(found.ref)
                found.ref = None
    return num_known, whole


def session() -> str:
    """The session of Ray that this process is in; "" for none. Another one has none of the objects.

    By the node's id, which Ray draws at its start: older releases, such as 2.52, have no name for a session.
    """
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return ""
    context = ray.get_runtime_context()
    return f"node {context.get_node_id()} job {context.get_job_id()} process {os.getpid()}"


def _is_rays_serializer() -> bool:
    """Whether what is being pickled is for Ray, which then counts the references in it.

    Ray's `cloudpickle` alone, and the standard pickle of a reference, do not: the first keeps the object until the
    process ends, the second makes a reference that no process answers for.
    """
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return False
    return bool(ray._private.worker.global_worker.get_serialization_context().is_in_band_serialization())


class Packed:
    """Shards of a call that go into one object.

    Attributes:
        tensors: Of each.
        places: The number of its array in the object, and where it begins there.
        alone: Shards with an array of their own. Their arrays come behind the first, in which the others share.
        shared_bytes: Length of the first array. Shards begin at steps of 512 bytes as in a slab: a run is one copy.
        nbytes: Bytes of all arrays.
    """

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self.places: list[tuple[int, int]] = []
        self.alone: list[torch.Tensor] = []
        self.shared_bytes = self.nbytes = 0

    def add(self, tensor: torch.Tensor) -> None:
        """Put one behind the others."""
        length = aligned(tensor.nbytes)
        self.tensors.append(tensor)
        self.nbytes += length
        if tensor.is_cpu and tensor.nbytes >= ALONE_BYTES:
            self.alone.append(tensor)
            self.places.append((len(self.alone), 0))
        else:
            self.places.append((0, self.shared_bytes))
            self.shared_bytes += length


def packed(tensors: Iterable[torch.Tensor]) -> Iterator[Packed]:
    """Group tensors, in order, into objects."""
    group = Packed()
    for tensor in tensors:
        if group.tensors and group.nbytes + tensor.nbytes > GROUP_BYTES:
            yield group
            group = Packed()
        group.add(tensor)
    if group.tensors:
        yield group


class Writer:
    """Puts shards into Ray's store. Keeps the memory in which it lays them side by side.

    Args:
        ray: The module.
    Thread-safety: any thread.
    """

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._spare: list[torch.Tensor] = []  # at most one; taken and given back in one step each

    def put(self, tensors: Sequence[torch.Tensor]) -> list[TensorShardInfo]:
        """Put tensors; all of them are there, or none.

        Raises:
            ray.exceptions.RayError: The store has no room.
            RuntimeError: Ray is not initialised in this process.
        """
        if not session():
            raise RuntimeError(f"cannot store {len(tensors):,} shards in Ray's object store: {NO_RAY}")
        with plain_tensors():
            return [info for group in packed(tensors) for info in self._put_group(group)]

    def trim(self) -> bool:
        """Give the spare memory back; whether there was any."""
        spare, self._spare = self._spare, []
        return bool(spare)

    def _put_group(self, group: Packed) -> list[TensorShardInfo]:
        names = [str(tensor.dtype).removeprefix("torch.") for tensor in group.tensors]
        shapes = [tuple(tensor.shape) for tensor in group.tensors]
        shared = self._side_by_side(group)
        # They are the caller's, who may resize them later, as FSDP does; Ray copies them at once.
        bytes_of_each = [bytes_for_now(one) if is_dense(one) else host_bytes(one) for one in group.alone]
        arrays = [np.frombuffer(one, np.uint8) for one in bytes_of_each]
        arrays.insert(0, shared[: group.shared_bytes].numpy())
        ref = self._ray.put((_FORMAT, names, shapes, group.places, arrays))
        self._spare = [shared][: len(shared) <= GROUP_BYTES]
        # In a later session the same numbers come again: the name must not.
        name = f"{RAY_PREFIX}{ref.hex()}.{secrets.token_hex(4)}"
        made = RayObject(name, ref, len(group.tensors))
        return [info_of(made, number) for number in range(len(group.tensors))]

    def _side_by_side(self, group: Packed) -> torch.Tensor:
        """Memory that begins with the first array of an object."""
        try:
            memory = self._spare.pop()
        except IndexError:
            memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        if len(memory) < group.shared_bytes:
            memory = host_tensor(group.shared_bytes)
        for tensor, (number, begin) in zip(group.tensors, group.places, strict=True):
            if number == 0 and tensor.nbytes:
                place = memory[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                place.copy_(tensor.detach())
        return memory


class _Array:
    """An array of Ray's store as one that torch takes without a warning: it says that it may be written into."""

    def __init__(self, array: Any) -> None:
        self.array = array
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


class _OddObjectError(Exception):
    """An object that neither this project nor AReaL has put."""


class RayReader:
    """A `ShardReader` that lends the objects of Ray's store as they are mapped here. Objects that are ready come first.

    Args:
        ray: The module.
        shards: Where each is.
        promises: Of the handles, where known.
        timeout_s: How long reading may take, in seconds.
    Attributes:
        num_received: Bytes that were read so far.
    """

    node = transport = "ray"

    def __init__(
        self,
        ray: Any,
        shards: Mapping[Hashable, TensorShardInfo],
        promises: Mapping[Hashable, Promise],
        timeout_s: float,
    ) -> None:
        self.keys = list(shards)
        self.failures: dict[Hashable, Exception] = {}
        self.is_lending, self.num_received = False, 0
        self._ray, self._shards, self._promises = ray, shards, promises
        self._wait_s = timeout_s * _SHARE_OF_WAITING
        self._deadline = time.monotonic() + self._wait_s
        self._pending: dict[Any, list[Hashable]] | None = None  # by reference
        self._num_objects = 0
        self._is_cancelled = False
        self._places: list[tuple[LentMemory, int, int]] = []  # of the part: memory, begin, length
        self._at = self._start = 0  # the next to be read: number, bytes read

    def __repr__(self) -> str:
        return f"RayReader({len(self.keys):,} shards)"

    def next_specs(self) -> Sequence[ShardSpec] | None:
        """Wait for objects, and describe the shards in those that are there."""
        self._places, self._at, self._start, self.is_lending = [], 0, 0, False
        if self._pending is None:
            self._pending = self._by_object()
            self._num_objects = len(self._pending)
        while self._pending:
            specs: list[ShardSpec] = []
            for ref in self._ready(list(self._pending)):
                self._add(ref, self._pending.pop(ref), specs)
            if specs:
                self.is_lending = True
                return specs
        return None

    def read_into(self, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers with the next bytes."""
        fill_from_lent(self, buffers)

    def read_run(self, places: Sequence[tuple[int, int]]) -> list[Stretch]:
        """Where the next bytes are in the store; neighbours are one stretch."""
        runs, self._at, self._start = joined_places(self._places, self._at, self._start, places)
        self.num_received += sum(nbytes for _, nbytes in places)
        return [Stretch(*run) for run in runs]

    def confirm(self) -> None:
        """Raise if it is cancelled. Nothing changes an object that is mapped."""
        if self._is_cancelled:
            raise ShardUnreachableError("Failed to fetch shards from ray: the fetch was given up")

    def cancel(self) -> None:
        """End the wait."""
        self._is_cancelled = True

    def close(self) -> None:
        """Let go of the objects."""
        self._places, self._pending = [], {}

    def _by_object(self) -> dict[Any, list[Hashable]]:
        """The shards by reference; those of which this process has none fail."""
        found: dict[Any, list[Hashable]] = {}
        here = session()
        for key, info in self._shards.items():
            known = info._object
            ref = info.shard_id if known is None else known.reference_for(_number(key))
            if here and isinstance(ref, self._ray.ObjectRef) and (known is None or known.session == here):
                found.setdefault(ref, []).append(key)
            else:
                self.failures[key] = _unreadable(info, here)
        return found

    def _ready(self, refs: list[Any]) -> list[Any]:
        """Objects that are here now, or the first ones to come; at the deadline the others fail."""
        ready: list[Any] = self._ray.wait(refs, num_returns=len(refs), timeout=0)[0]
        while not ready:
            self.confirm()
            left_s = self._deadline - time.monotonic()
            if left_s <= 0:
                return self._give_up()
            ready = self._ray.wait(refs, num_returns=1, timeout=min(left_s, _LOOK_S))[0]
        return ready

    def _give_up(self) -> list[Any]:
        assert self._pending is not None
        why = (
            f"{len(self._pending):,} of {self._num_objects:,} objects are not in this node's store within "
            f"{self._wait_s:.1f} s"
        )
        for key in itertools.chain.from_iterable(self._pending.values()):
            self.failures[key] = ShardTimeoutError(f"Failed to fetch shard {key} from ray: {why}")
        self._pending.clear()
        return []

    def _add(self, ref: Any, keys: Sequence[Hashable], specs: list[ShardSpec]) -> None:
        """Describe the shards of an object that is here; they fail if it turns out to be lost."""
        try:
            left_s = max(self._deadline - time.monotonic(), _LOOK_S)
            names, shapes, places, arrays = _parts(self._ray.get(ref, timeout=left_s))
            memories = [LentMemory(torch.from_numpy(np.asarray(_Array(one))), is_lasting=False) for one in arrays]
        except Exception as error:  # Ray's own, and what an object that is none of ours may raise
            self.failures |= {key: self._failure(key, error) for key in keys}
            return
        for number, key in sorted((_number(key), key) for key in keys):
            try:
                spec = self._spec(key, names[number], shapes[number])
                of, begin = places[number]
                memory = memories[of]
                if not 0 <= begin <= len(memory.tensor) - spec.nbytes:
                    raise _OddObjectError(f"too short, {len(memory.tensor):,} bytes")
            except (ShardAnswerError, _OddObjectError, IndexError, KeyError) as error:
                self.failures[key] = self._failure(key, error)
                continue
            specs.append(spec)
            if spec.nbytes:
                self._places.append((memory, begin, spec.nbytes))

    def _spec(self, key: Hashable, name: str, shape: tuple[int, ...]) -> ShardSpec:
        dtype, promise = DTYPES[name], self._promises.get(key)
        if promise is not None and (promise[0] is not dtype or tuple(promise[1]) != shape):
            raise answer_error(key, promise, (dtype, torch.Size(shape), promise[2]))
        return ShardSpec(key, dtype, shape)

    def _failure(self, key: Hashable, error: Exception) -> Exception:
        """The error of one shard; it always has a reason."""
        if isinstance(error, ShardFetchError):
            return error
        raised = self._ray.exceptions
        if isinstance(error, _OddObjectError):
            return ShardAnswerError(f"Failed to fetch shard {key} from ray: its object is {error}, not one of ours")
        text = f"Failed to fetch shard {key} from ray: {_reason(error)}"
        if isinstance(error, raised.GetTimeoutError):
            return ShardTimeoutError(text)
        if isinstance(error, (raised.ObjectLostError, ValueError)):  # the latter: of another session
            return ShardMissingError(text)
        return (ShardFetchError if isinstance(error, raised.RayError) else ShardAnswerError)(text)


def _number(key: Hashable) -> int:
    """The number of a shard in its object. AReaL's own objects are one tensor."""
    return int(key.rpartition("/")[2]) if isinstance(key, str) else 0


def _parts(value: object) -> tuple[list[str], list[tuple[int, ...]], list[tuple[int, int]], list[Any]]:
    """Dtypes, shapes and places of the shards in an object, and its arrays."""
    if isinstance(value, torch.Tensor):  # of AReaL's own Ray backend
        flat = np.frombuffer(host_bytes(value), np.uint8)
        return [str(value.dtype).removeprefix("torch.")], [tuple(value.shape)], [(0, 0)], [flat]
    if not (isinstance(value, tuple) and len(value) == 5 and value[0] == _FORMAT):
        raise _OddObjectError(f"of type {type(value).__name__}")
    return value[1:]


def _unreadable(info: TensorShardInfo, here: str) -> ShardFetchError:
    """The error of a shard of which this process has no reference that Ray would know."""
    text, known = f"Failed to fetch shard {info.shard_id} from ray: ", info._object
    if not here:
        return ShardMissingError(text + NO_RAY)
    if known is not None and known.session != here:
        why = f"Ray was shut down here since its handle came, or this is a forked child ({known.session}; now {here})"
        return ShardMissingError(text + why)
    if known is not None:
        return ShardMissingError(text + "it was cleared, here or before its handle was sent")
    if is_of_ray(info.shard_id):
        why = "this process has no reference of its object: it was cleared, or its handle came as text or bytes, and "
        return ShardMissingError(text + why + ONLY_RAYS_SERIALIZER)
    owner = info.node_addr or "its owner"
    why = f"it is not in Ray's object store; if {owner} serves it over HTTP, call set_backend(HttpRTensorBackend())"
    return ShardFetchError(text + why)


def _reason(error: Exception) -> str:
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:_MAX_REASON]}" if words else repr(error)
