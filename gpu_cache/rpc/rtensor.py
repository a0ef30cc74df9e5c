"""RTensor: a small handle of a tensor that lives elsewhere, and the functions that AReaL users call."""

from __future__ import annotations

import copy
import dataclasses
import math
import operator
import threading
import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, Literal, TypeVar, overload

import torch

import gpu_cache
from gpu_cache import Promise
from gpu_cache.config import OnError, Prefer
from gpu_cache.device.modes import plain_tensors
from gpu_cache.errors import several
from gpu_cache.rpc import runtime
from gpu_cache.rpc.clearing import ClearFailure, ClearReport, SizedId, StepClearer
from gpu_cache.rpc.client.backend import RTensorBackend
from gpu_cache.rpc.client.http import HttpRTensorBackend
from gpu_cache.rpc.client.ray import RayRTensorBackend
from gpu_cache.rpc.shard import (
    ShardAnswerError,
    ShardClearError,
    ShardConflictError,
    ShardFetchError,
    ShardLocalError,
    ShardLostError,
    ShardMissingError,
    ShardRefusedError,
    ShardTimeoutError,
    ShardUnreachableError,
    TensorShardInfo,
    check_owners,
    collect_leaves,
    map_leaves,
    promise_of,
)
from gpu_cache.rpc.storing import check_all_travel, stored
from gpu_cache.rpc.views import FetchBufferView, StorageStatsView, StorageView
from gpu_cache.rpc.wire.handles import MetaState, described_handle, is_message, parsed_handle
from gpu_cache.rpc.wire.serialization import HANDLE_PATH, SHARD_PATH, check_stored, meta_tensor, register_dataclass

__all__ = [
    "ClearFailure",
    "ClearReport",
    "HttpRTensorBackend",
    "RTensor",
    "RTensorBackend",
    "RayRTensorBackend",
    "ShardAnswerError",
    "ShardClearError",
    "ShardConflictError",
    "ShardFetchError",
    "ShardLocalError",
    "ShardLostError",
    "ShardMissingError",
    "ShardRefusedError",
    "ShardTimeoutError",
    "ShardUnreachableError",
    "StepClearer",
    "TensorShardInfo",
    "buffer_stats",
    "clear_batches",
    "clear_fetch_buffer",
    "fetch",
    "fetch_buffer_stats",
    "flatten_shard_ids",
    "get_backend",
    "remove",
    "scope",
    "set_backend",
    "storage_stats",
    "store",
]

KeyT = TypeVar("KeyT")
TensorT = TypeVar("TensorT", bound=torch.Tensor)

# Upstream's private names. Its tests hold the locks around calls on the views; our own code never takes them.
_fetch_buffer = FetchBufferView()
_storage = StorageView()
_storage_stats = StorageStatsView()
_fetch_buffer_lock = threading.Lock()
_storage_lock = threading.Lock()

_UNSEEN: Any = type("Unseen", (), {})  # for the `data` of a handle that was not looked at; a class is its own copy


@dataclasses.dataclass
class RTensor:
    """A handle of a tensor that another process owns, until the caller asks for its values.

    Attributes:
        shard: Where it lives.
        data: Its shape and dtype on `meta` while remote; the tensor itself once localized. On the wire it is always
            the former: a handle stays small. The meta tensor is made when a caller first looks at it.
    """

    shard: TensorShardInfo
    data: torch.Tensor

    # `_promise` is that of the handle while it is remote; this is the meta tensor that it was read from. Reading each
    # tensor again would make localizing thousands of cached shards a third slower.
    # No annotation, which would make it a field.
    _said = _UNSEEN

    def __post_init__(self) -> None:
        if isinstance(self.data, torch.Tensor) and self.data.is_meta and isinstance(self.shard, TensorShardInfo):
            self._note()

    @classmethod
    def _remote(cls, shard: TensorShardInfo, dtype: torch.dtype, shape: tuple[int, ...]) -> RTensor:
        """A handle whose meta tensor is not made yet."""
        handle = cls.__new__(cls)
        handle.shard = shard
        handle._promise = promise = promise_of(dtype, shape, shard.node_addr)
        shard.node_addr = promise[2] or ""  # the same text, as one object with that of other handles
        return handle

    def __repr__(self) -> str:
        if self._known is None:
            return f"RTensor(data {self.data!r}, shard {self.shard.shard_id!r} of {self.shard.node_addr or 'Ray'})"
        dtype, shape = str(self.dtype).removeprefix("torch."), list(self.shape)
        place = "remote" if self.device.type == "meta" else f"on {self.device}"
        return f"RTensor({dtype} {shape} {place}, shard {self.shard.shard_id!r} of {self.shard.node_addr or 'Ray'})"

    def __eq__(self, other: object) -> bool:
        """Whether it is a handle of the same shard, with the same dtype and shape; values are not compared."""
        if not isinstance(other, RTensor):
            return NotImplemented
        return self.shard == other.shard and self._known == other._known

    __hash__ = None  # type: ignore[assignment]  # its fields may be set

    def _note(self) -> Promise:
        data = self.__dict__.get("data", _UNSEEN)
        dtype, shape = self._described()
        promise = promise_of(dtype, shape, self.shard.node_addr)
        self.shard.node_addr = promise[2] or ""
        if data is _UNSEEN or data.is_meta:  # a localized tensor must not live as long as the handle
            self._promise, self._said = promise, data
        return promise

    def _described(self) -> tuple[torch.dtype, tuple[int, ...]]:
        data = self.__dict__.get("data", _UNSEEN)
        return self._promise[:2] if data is _UNSEEN else (data.dtype, data.shape)

    @property
    def _known(self) -> tuple[torch.dtype, tuple[int, ...]] | None:
        """Its dtype and shape; None where a caller has set `data` to None to free a tensor."""
        return self._described() if self.__dict__.get("data", _UNSEEN) is not None else None

    @property
    def promise(self) -> Promise:
        """Dtype, shape and owner of its shard, as it says while it is remote."""
        is_known = self._said is self.__dict__.get("data", _UNSEEN) and self._promise[2] is self.shard.node_addr
        return self._promise if is_known else self._note()

    @property
    def shape(self) -> torch.Size:
        """Its shape."""
        return torch.Size(self._described()[1])

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        return self._described()[0]

    @property
    def device(self) -> torch.device:
        """`meta` while remote."""
        return self.data.device if "data" in self.__dict__ else _META

    @property
    def ndim(self) -> int:
        """Its number of dimensions."""
        return len(self._described()[1])

    def to_local(self, *, timeout_s: float | None = None) -> torch.Tensor:
        """The tensor itself: from `data` if it is there, else from the cache or the owner; kept in `data`.

        Args:
            timeout_s: Longest wait, in seconds; None: `fetch_timeout_s` of the cache's settings.
        Raises:
            gpu_cache.FetchError: It did not arrive.
        """
        _fill([self], timeout_s)
        return self.data

    @overload
    @staticmethod
    def localize(
        obj: RTensor,
        *,
        timeout_s: float | None = None,
        on_error: Literal["raise"] = "raise",
        prefer: Prefer = "device",
        keep: bool = False,
    ) -> torch.Tensor: ...

    @overload
    @staticmethod
    def localize(
        obj: list[RTensor],
        *,
        timeout_s: float | None = None,
        on_error: Literal["raise"] = "raise",
        prefer: Prefer = "device",
        keep: bool = False,
    ) -> list[torch.Tensor]: ...

    @overload
    @staticmethod
    def localize(
        obj: dict[KeyT, RTensor],
        *,
        timeout_s: float | None = None,
        on_error: Literal["raise"] = "raise",
        prefer: Prefer = "device",
        keep: bool = False,
    ) -> dict[KeyT, torch.Tensor]: ...

    @overload
    @staticmethod
    def localize(
        obj: TensorT,
        *,
        timeout_s: float | None = None,
        on_error: OnError = "raise",
        prefer: Prefer = "device",
        keep: bool = False,
    ) -> TensorT: ...

    @overload
    @staticmethod
    def localize(
        obj: Any,
        *,
        timeout_s: float | None = None,
        on_error: OnError = "raise",
        prefer: Prefer = "device",
        keep: bool = False,
    ) -> Any: ...

    @staticmethod
    def localize(
        obj: Any,
        *,
        timeout_s: float | None = None,
        on_error: OnError = "raise",
        prefer: Prefer = "device",
        keep: bool = False,
    ) -> Any:
        """Replace the handles in nested containers by their tensors; misses are fetched in one go.

        Args:
            obj: A handle, or dicts, lists and tuples of them; anything else passes through.
            timeout_s: Longest wait, in seconds; None: `fetch_timeout_s` of the cache's settings.
            on_error: "none": a shard that does not arrive is None in the result, and its handle stays remote. The log
                tells why; see `TensorCache.get_many`.
            prefer: "host": for batches that should never sit on the GPU; see `TensorCache.get_many`. A handle that was
                localized before keeps the tensor that it has.
            keep: These shards are meant to outlive clears of other shards, as weights are: never reported as a leak.
        Returns:
            New containers of the same types. The handles are filled too.
        Raises:
            gpu_cache.FetchError: Some did not arrive; its `failures` has the cause by shard id. The others are cached,
                so that another call asks for the rest only.
            ShardConflictError: Handles give one id two owners. Nothing was asked for.
            gpu_cache.MutatedError: As for `TensorCache.get_many`; so are CacheClosedError, TransferError, ValueError.
        Thread-safety: any thread, also with handles that others localize.
        """
        _fill(_handles_in(obj), timeout_s, on_error, prefer, keep)
        return map_leaves(obj, RTensor, _DATA_OF if on_error == "raise" else _data_or_none)

    @staticmethod
    def prefetch(
        obj: Any, *, timeout_s: float | None = None, prefer: Prefer = "device", keep: bool = False
    ) -> Future[int]:
        """Begin to fetch what `localize` of the same handles would have to fetch, and return at once.

        Args:
            obj: As for `localize`.
            timeout_s: How long that may take, in seconds; None: `fetch_timeout_s` of the cache's settings.
            prefer: As for `localize`.
            keep: As for `localize`.
        Returns:
            A future of the number of shards on their way. It need not be waited for.
        """
        remote = [handle for handle in _handles_in(obj) if _is_remote(handle)]
        check_owners(handle.shard for handle in remote)
        promises = {handle.shard.shard_id: handle._promise for handle in remote}
        return runtime.current().prefetch(remote, promises, timeout_s, prefer, keep)

    @staticmethod
    def remotize(obj: Any, node_addr: str) -> Any:
        """Store the tensors in nested containers in this process, and return the containers with handles.

        Each tensor is detached and copied to host memory. In a dict with an `attention_mask` trailing padding is
        trimmed first. All are stored, or none: every tensor is looked at before the first is stored, and if storing
        fails half-way, what was stored is removed.

        Args:
            obj: A tensor, or dicts, lists and tuples of them; anything else passes through.
            node_addr: Address under which this process serves them, as "host:port" or "[ipv6]:port". It reads its own
                ones without a request.
        Raises:
            TypeError: A tensor that does not travel; says where in `obj` it is, and what to do.
            ValueError: The backend is HTTP, and `node_addr` is no such address.
        """
        with plain_tensors():
            if check_all_travel(obj):
                runtime.current().check_owner(node_addr)
            handles = stored(obj, node_addr, get_backend(), RTensor._remote)
        runtime.current().note_owner(node_addr)
        return handles

    @staticmethod
    def collect_shards(obj: Any) -> dict[str, list[Any]]:
        """The distinct shard ids in nested containers, by address of their owner."""
        return {node_addr: [one.shard_id for one in owned] for node_addr, owned in _sized_shards(obj).items()}

    @staticmethod
    async def clear_node(node_addr: str, shard_ids: Sequence[Any]) -> Any:
        """Evict shards here, then delete them at their owner; unknown ids are no error.

        Calls that begin together, as those of one `asyncio.gather`, end one step. Each owner learns the shards of all
        of them: it may have read them too, and AReaL tells some consumers of no clear, such as its teacher.

        Returns:
            The owner's statistics.
        Raises:
            ShardClearError: Over HTTP: the owner was not told, or refused some. They are evicted here all the same.
        """
        wanted = _ids(shard_ids)
        clear_fetch_buffer(wanted)
        of_step = await runtime.current().clears.join(wanted)
        backend = get_backend()
        return await backend.delete(node_addr, of_step if isinstance(backend, HttpRTensorBackend) else wanted)

    @staticmethod
    async def clear_everywhere(
        obj: Any, consumers: Iterable[Callable[[list[Any]], Any]] = (), *, clearer: StepClearer | None = None
    ) -> ClearReport:
        """End a step: clear the shards in `obj` here, at their owners, and at every consumer, all at once.

        Args:
            obj: Containers of handles.
            consumers: Called with the flat list of ids, each on a thread of its own; may return an awaitable. Reports
                name one by its `__qualname__`. The clear waits for it as long as the clearer's `timeout_s` says.
            clearer: Remembers what could not be cleared, for the next step to try once more. None: this process's.
        Returns:
            The shards that were cleared, and those that could not be. No failure keeps another from being cleared.
        Raises:
            TypeError: A consumer cannot be called. Nothing was cleared.
        """
        shards = _sized_shards(obj)
        if not shards:
            _warn_of_no_handles(obj)
        ending = runtime.current().clearer if clearer is None else clearer
        return await ending.clear(shards, _clear_owner, consumers)

    def __getstate__(self) -> dict[str, Any]:
        return {"shard": self.shard, "data": MetaState(*self._described())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.shard, self.data = state["shard"], state["data"]
        self.__post_init__()

    def __copy__(self) -> RTensor:
        return self._copied(self.shard, self.__dict__.get("data", _UNSEEN))

    def __deepcopy__(self, memo: dict[int, Any]) -> RTensor:
        return self._copied(copy.deepcopy(self.shard, memo), copy.deepcopy(self.__dict__.get("data", _UNSEEN), memo))

    def _copied(self, shard: TensorShardInfo, data: Any) -> RTensor:
        return RTensor._remote(shard, *self._promise[:2]) if data is _UNSEEN else RTensor(shard, data)

    def __wire_fields__(self) -> dict[str, Any]:
        """The fields that travel: shape and dtype, never the values."""
        dtype, shape = self._described()
        return {"shard": self.shard, "data": meta_tensor(dtype, *shape)}


class _MetaTensor:
    """`RTensor.data` until a caller looks at it: makes the meta tensor then.

    Callers look at few of the thousands that travel. Each drop of a tensor gives the GIL away. Beside a busy thread the
    drops took 14 s of a step of 3,072 shards.
    """

    def __get__(self, handle: RTensor | None, owner: type) -> torch.Tensor:
        if handle is None or "_promise" not in handle.__dict__:
            raise AttributeError(f"{owner.__name__} has no attribute 'data'")
        made = meta_tensor(handle._promise[0], *handle._promise[1])
        # Another thread may have localized the handle.
        found: torch.Tensor = handle.__dict__.setdefault("data", made)
        handle._said = made
        return found


RTensor.data = _MetaTensor()  # type: ignore[assignment]  # in the place of an attribute that a handle lacks


_TEXT_OR_TENSOR: Any = (str, torch.Tensor)
_DATA_OF = operator.attrgetter("data")
_META = torch.device("meta")


def handle_to_json(handle: RTensor) -> dict[str, Any] | None:
    """Encode a handle; see `described_handle`."""
    return described_handle(handle.shard, *handle._described())


def handle_from_json(value: dict[Any, Any]) -> RTensor | None:
    """The handle that a message describes; see `parsed_handle`."""
    return None if (found := parsed_handle(value)) is None else RTensor._remote(*found)


register_dataclass(HANDLE_PATH, RTensor, handle_from_json, handle_to_json)
register_dataclass(SHARD_PATH, TensorShardInfo)


async def _clear_owner(node_addr: str, shard_ids: list[Any]) -> Any:
    """Evict shards here, then delete them at their owner, which learns of no others."""
    clear_fetch_buffer(shard_ids)
    return await get_backend().delete(node_addr, shard_ids)


def get_backend() -> RTensorBackend:
    """The backend of this process; picked at first use: Ray's if Ray is initialised, else HTTP."""
    return runtime.current().backend


def set_backend(backend: RTensorBackend | None) -> None:
    """Use `backend` from now on; None picks again at the next use."""
    runtime.current().set_backend(backend)


def clear_fetch_buffer(shard_ids: Iterable[Any] | None = None) -> int:
    """Evict shards from this process's cache, all of them for None; unknown ids are ignored.

    Returns:
        How many were cached.
    Raises:
        TypeError: Handles, or a dict, are in the place of the ids.
    """
    current = runtime.current()
    return current.cache.clear() if shard_ids is None else current.evict(_ids(shard_ids))


def scope(name: str = "") -> gpu_cache.Scope:
    """A `with` at whose end this process drops from its cache whatever was fetched inside; see `TensorCache.scope`.

    Their owners keep theirs: those are for `clear_everywhere`. After `runtime.configure` a scope from before is of the
    cache from before.
    """
    return runtime.current().cache.scope(name)


def clear_batches(shard_ids: Iterable[Any] | None = None) -> int:
    """Evict a step's shards, as an engine does at its end; no ids mean nothing to do, never a flush.

    Handles that this process still has of shards in Ray's object store do not keep them there any longer.

    Returns:
        How many were cached.
    Raises:
        TypeError: As for `clear_fetch_buffer`.
    """
    if not shard_ids:
        return 0
    wanted = _ids(shard_ids)
    current = runtime.current()
    current.release(wanted)
    return current.evict(wanted)


def flatten_shard_ids(obj: Any) -> list[Any]:
    """The shard ids in nested containers, in order and with repeats."""
    return [handle.shard.shard_id for handle in _handles_in(obj)]


def fetch_buffer_stats() -> dict[str, int]:
    """Upstream's statistics of the cache: exactly `{"num_entries": n}`."""
    return {"num_entries": len(runtime.current().cache)}


def buffer_stats() -> dict[str, Any]:
    """All figures of this process's cache; see `gpu_cache.BufferStats`."""
    return dict(runtime.current().cache.buffer_stats())


def store(shard_id: Hashable, tensor: torch.Tensor) -> None:
    """Keep a tensor under an id of the caller's choosing, for others to fetch.

    Raises:
        TypeError: They could not: it does not travel, or has no values.
    """
    check_stored(tensor)
    runtime.current().store.put(shard_id, tensor)


def fetch(shard_id: Hashable) -> torch.Tensor:
    """A tensor that this process owns.

    Raises:
        KeyError: It does not own such a shard.
    """
    return runtime.current().store[shard_id]


def remove(shard_id: Hashable) -> int:
    """Forget a shard that this process owns, and evict it from its cache; returns how many it owned, 0 or 1.

    Raises:
        TypeError: It is a handle.
    """
    current = runtime.current()
    removed = current.store.remove(_ids([shard_id]))
    current.evict([shard_id])
    return removed


def storage_stats() -> dict[str, int]:
    """`num_tensors` and `total_bytes` of what this process owns."""
    return runtime.current().store.stats()


# Upstream's private name.
_store_local = store


def _ids(shard_ids: Iterable[Any]) -> list[Any]:
    """List shard ids. Ids that cannot be are passed over, but a clear of handles that cleared nothing would be a leak.

    Raises:
        TypeError: Handles, a dict or a text are in their place.
    """
    is_handle = isinstance(shard_ids, RTensor | TensorShardInfo | dict)
    wanted = [shard_ids] if is_handle else several(shard_ids)
    if is_handle or any(issubclass(kind, RTensor | TensorShardInfo) for kind in set(map(type, wanted))):
        kind = next(type(one).__name__ for one in wanted if isinstance(one, RTensor | TensorShardInfo | dict))
        raise TypeError(f"shard ids are expected, not {kind}: flatten_shard_ids(...) lists those of handles")
    return wanted


def _sized_shards(obj: Any) -> dict[str, list[SizedId]]:
    """The distinct shards in nested containers, by address of their owner.

    An id that cannot be a key counts as one of its own, and one without a tensor as empty: it must not keep the others
    from being cleared.
    """
    shards: dict[str, dict[Any, SizedId]] = {}
    for handle in _handles_in(obj):
        dtype, shape = handle._known or (torch.uint8, (0,))
        sized = SizedId(handle.shard.shard_id, math.prod(shape) * dtype.itemsize)
        owned = shards.setdefault(handle.shard.node_addr, {})
        try:
            owned[sized.shard_id] = sized
        except TypeError:  # unhashable
            owned["unhashable", id(sized.shard_id)] = sized
    return {node_addr: list(owned.values()) for node_addr, owned in shards.items()}


def _handles_in(obj: Any) -> list[RTensor]:
    """The handles in nested containers; warns of a message that was not deserialized, which has none."""
    handles = collect_leaves(obj, RTensor)
    if not handles and is_message(obj):
        text = "this is a message as it travels, without handles: call deserialize_value on it first"
        warnings.warn(text, stacklevel=3)
    return handles


def _warn_of_no_handles(obj: Any) -> None:
    """Warn that a clear of tensors, of ids, or of an object that is no container, clears nothing: a leak."""
    is_known = obj is None or isinstance(obj, dict | list | tuple)
    if not is_known or (collect_leaves(obj, _TEXT_OR_TENSOR) and not is_message(obj)):
        text = "nothing is cleared: there are no handles in this; pass those that localize got, not tensors or ids"
        warnings.warn(text, stacklevel=3)


def _data_or_none(handle: RTensor) -> torch.Tensor | None:
    return None if _is_remote(handle) else handle.data


def _fill(
    handles: Sequence[RTensor],
    timeout_s: float | None,
    on_error: OnError = "raise",
    prefer: Prefer = "device",
    keep: bool = False,
) -> None:
    """Put the tensors of the handles that are still remote in their `data`."""
    remote = [
        handle
        for handle in handles
        if (handle.__dict__.get("data", _UNSEEN) is handle._said and handle._promise[2] is handle.shard.node_addr)
        or _is_remote(handle)  # a call for each of thousands costs more than the look
    ]
    if not remote:
        return
    promises = {handle.shard.shard_id: handle._promise for handle in remote}
    if len(promises) < len(remote):
        _fill_repeated(remote, timeout_s, on_error, prefer, keep)
        return
    tensors = runtime.current().get_many(remote, promises, timeout_s, on_error, prefer, keep)
    for handle, tensor in zip(remote, tensors, strict=True):
        if tensor is not None:
            handle.data = tensor


def _is_remote(handle: RTensor) -> bool:
    """Whether it has no values; then `_promise` is what it says by now, as it may have another tensor or owner."""
    data = handle.__dict__.get("data", _UNSEEN)
    if data is None:
        raise AttributeError(f"`data` of the handle of shard {handle.shard.shard_id!r} is None: a tensor is expected")
    if data is not _UNSEEN and not data.is_meta:
        return False
    if handle._said is not data or handle._promise[2] is not handle.shard.node_addr:
        handle._note()
    return True


def _fill_repeated(
    remote: Sequence[RTensor], timeout_s: float | None, on_error: OnError, prefer: Prefer, keep: bool
) -> None:
    """Fill handles of which some have one shard. If those promise different things, each promise is asked for alone."""
    check_owners(handle.shard for handle in remote)
    promised: dict[Hashable, dict[Hashable, list[RTensor]]] = {}
    for handle in remote:
        groups = promised.setdefault(handle.shard.shard_id, {})
        groups.setdefault(handle.promise, []).append(handle)
    for number in range(max(map(len, promised.values()))):
        asked = {key: list(groups.values())[number] for key, groups in promised.items() if number < len(groups)}
        first = {key: group[0] for key, group in asked.items()}
        promises = {key: handle.promise for key, handle in first.items()}
        tensors = runtime.current().get_many(list(first.values()), promises, timeout_s, on_error, prefer, keep)
        for group, tensor in zip(asked.values(), tensors, strict=True):
            if tensor is not None:
                for handle in group:
                    handle.data = tensor
