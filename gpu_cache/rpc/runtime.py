"""This process's cache, backend and store. The module-level state of `gpu_cache.rpc`."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextvars import ContextVar
from functools import partial
from typing import Any, Protocol, cast

import torch

import gpu_cache
from gpu_cache import Promise, ShardReader
from gpu_cache.config import OnError, Prefer, settings_of
from gpu_cache.device.placement import choose_device
from gpu_cache.errors import listed
from gpu_cache.rpc.clearing import ClearsTogether, StepClearer
from gpu_cache.rpc.client.backend import CallSource, RTensorBackend, StreamingBackend
from gpu_cache.rpc.client.connection import AddressError, split_address
from gpu_cache.rpc.client.http import HttpRTensorBackend, drained
from gpu_cache.rpc.client.ray import RayRTensorBackend
from gpu_cache.rpc.shard import (
    ShardFetchError,
    ShardMissingError,
    TensorShardInfo,
    answer_error,
    is_of_ray,
    ray_objects,
)
from gpu_cache.rpc.store import ShardStore
from gpu_cache.source import opened


class Handle(Protocol):
    """The part of an `RTensor` that names its shard."""

    shard: TensorShardInfo

    @property
    def promise(self) -> Promise:
        """Dtype, shape and owner."""


class Runtime:
    """The cache, the store and the backend that the handles of one process share.

    Args:
        config: Settings of the cache; None reads the GPU_CACHE_* variables.
    Attributes:
        store: The tensors that this process owns.
        clears: Joins clears that begin together.
        clearer: Clears the steps that this process ends, unless it has been given one for each controller.
        endings: Called when it is closed.
    Thread-safety: any thread.
    """

    def __init__(self, config: gpu_cache.CacheConfig | None) -> None:
        self.pid = os.getpid()
        self.store = ShardStore()
        self._names: dict[str, Any] = {}
        self.cache = self._cache_of(config)
        self.store.segments.on_growth = partial(_report, weakref.ref(self))
        self.clearer = StepClearer()
        self.clears = ClearsTogether()
        self.endings: list[Callable[[], object]] = []
        self.own_addresses: set[str] = set()  # addresses of servers in this process
        self.noted_addresses: set[str] = set()  # that handles of this process's store name
        # Guards _backend, _is_chosen_here.
        self._lock = threading.Lock()
        self._backend: RTensorBackend | None = None
        self._is_chosen_here = False  # the backend, so that the runtime closes it
        # Single values without a lock; a race counts one step too many, or too few.
        self._num_told = 0  # times that this process was told to clear
        self._told_before: dict[str, int] = {}  # by owner: _num_told when it last said that it had removed shards

    def __repr__(self) -> str:
        return f"Runtime({self.cache!r}, {self._backend!r}, {self.store!r})"

    @property
    def backend(self) -> RTensorBackend:
        """The backend; Ray's if Ray is in use when first asked, else HTTP. After Ray's shutdown, chosen again."""
        with self._lock:
            if self._is_chosen_here and isinstance(self._backend, RayRTensorBackend) and not is_ray_in_use():
                self._backend = None
            if self._backend is None:
                self._backend = RayRTensorBackend() if is_ray_in_use() else self._http_backend()
                self._is_chosen_here = True
            return self._backend

    def _http_backend(self) -> HttpRTensorBackend:
        made = HttpRTensorBackend(shards=self.store)
        made.on_removal = partial(_note_removal, weakref.ref(self))
        return made

    def set_backend(self, backend: RTensorBackend | None) -> None:
        """Use `backend` from now on; None decides again when next asked.

        Raises:
            TypeError: It is no backend.
        """
        lacking = [name for name in ("fetch", "store", "delete") if not callable(getattr(backend, name, None))]
        if hasattr(backend, "__mro__"):
            name = getattr(backend, "__name__", "")
            raise TypeError(f"an RTensorBackend is expected, not the class of one: write {name}()")
        if backend is not None and "fetch" in lacking:  # one that only reads needs no other
            kind = type(backend).__name__
            raise TypeError(f"an RTensorBackend is expected, not {kind}, which has no {', '.join(lacking)}")
        if isinstance(backend, HttpRTensorBackend) and backend.shards is None:
            backend.shards = self.store
        with self._lock:
            unused = self._backend if self._is_chosen_here and self._backend is not backend else None
            self._is_chosen_here = self._is_chosen_here and self._backend is backend
            self._backend = backend
        if isinstance(unused, HttpRTensorBackend):
            unused.close()

    def get_many(
        self,
        handles: Sequence[Handle],
        promises: Mapping[Hashable, Promise],
        timeout_s: float | None = None,
        on_error: OnError = "raise",
        prefer: Prefer = "device",
        keep: bool = False,
    ) -> Sequence[torch.Tensor | None]:
        """The tensors of remote handles, given by shard id: from the cache, this process's store, or their owners.

        Raises:
            gpu_cache.FetchError: Some did not arrive; the others are cached. Not with `on_error="none"`.
        """
        if on_error == "raise" and _wants_host_memory.get() and not self._hands_out_host_memory():
            return self._read_past_cache(handles, promises, timeout_s)
        return self.cache.get_many(
            list(promises),
            _HandleSource(self, handles, promises),
            timeout_s=timeout_s,
            on_error=on_error,
            prefer=prefer,
            expected=promises,
            keep=keep,
        )

    def _hands_out_host_memory(self) -> bool:
        """Whether the cache's tensors are in host memory, or would be."""
        try:
            return choose_device(self.cache.config.device).device.torch_device.type == "cpu"
        except (RuntimeError, ValueError):  # a device, and nothing tells which
            return False

    def _read_past_cache(
        self, handles: Sequence[Handle], promises: Mapping[Hashable, Promise], timeout_s: float | None
    ) -> list[torch.Tensor]:
        timeout_s = self.cache.config.fetch_timeout_s if timeout_s is None else timeout_s
        found: dict[Hashable, torch.Tensor] = {}
        for reader in _HandleSource(self, handles, promises).open(list(promises), timeout_s):
            found |= drained(reader)
        return [found[key] for key in promises]

    def prefetch(
        self,
        handles: Sequence[Handle],
        promises: Mapping[Hashable, Promise],
        timeout_s: float | None = None,
        prefer: Prefer = "device",
        keep: bool = False,
    ) -> Future[int]:
        """Begin to fetch shards that are not cached. Arguments as for `get_many`."""
        source = _HandleSource(self, handles, promises)
        return self.cache.prefetch(
            list(promises), source, timeout_s=timeout_s, prefer=prefer, expected=promises, keep=keep
        )

    def evict(self, shard_ids: Sequence[Any]) -> int:
        """Drop shards from the cache; ids that cannot be ids are passed over."""
        self._num_told += 1
        if isinstance(backend := self._backend, HttpRTensorBackend) and backend.memories is not None:
            backend.memories.forget_shards(shard_ids)
        try:
            return self.cache.clear(shard_ids)
        except TypeError:  # one cannot be hashed, so nothing was dropped
            return self.cache.clear(filter(_can_be_id, shard_ids))

    def release(self, shard_ids: Sequence[Any]) -> None:
        """Let go of shards in Ray's object store of which this process has handles; others are passed over."""
        if ray_objects and isinstance(backend := self.backend, RayRTensorBackend):
            backend.take_back(shard_ids)

    def note_removal(self, address: str) -> None:
        """An owner has removed shards: count a clear, unless this process was told to clear since it last had.

        So what stays in a consumer that is never told to clear has outlived clears, and is a leak for all to see.
        """
        if self._told_before.get(address, 0) == self._num_told:
            self.cache.clear([_NO_SHARD])
        self._told_before[address] = self._num_told

    def name_process(self, role: str, rank: int) -> None:
        """Say what this process is, for its reports, where neither the program nor a variable does."""
        self._names = {"role": role, "rank": rank}
        if not len(self.cache):
            self.replace_cache(self.cache.config)

    def trim(self) -> bool:
        """Give unused memory of cache and store back; whether any was."""
        is_trimmed = self.store.segments.trim()
        if isinstance(self._backend, RayRTensorBackend):
            is_trimmed |= self._backend.trim()
        return bool(self.cache.trim()) or is_trimmed

    def add_own_address(self, address: str) -> None:
        """Serve handles with this address from the store, without a request."""
        self.own_addresses.add(address)

    def check_owner(self, address: str) -> None:
        """Refuse an address that no client of the HTTP backend could connect to; warn of one that only this host's can.

        Raises:
            ValueError: It is not host:port.
        """
        if isinstance(self.backend, HttpRTensorBackend) and not takes_any_address:
            try:
                host, _ = split_address(address if isinstance(address, str) else repr(address))
            except AddressError as error:
                raise ValueError(f"node_addr {error}, where clients reach this process's server") from None
            if host in _WILDCARDS:
                text = f"node_addr {address!r} is each client's own host: give the host:port that other hosts use"
                warnings.warn(text, stacklevel=3)

    def note_owner(self, address: str) -> None:
        """Learn an address of this process from the handles that it makes, if they are of its store.

        It is only said to be this process's: shards that the store does not have are asked for there all the same.
        """
        backend = self.backend
        if address and isinstance(backend, HttpRTensorBackend) and backend.shards is self.store:
            self.noted_addresses.add(address)

    def remove_own_address(self, address: str) -> None:
        """The server at this address has stopped."""
        self.own_addresses.discard(address)
        self.noted_addresses.discard(address)

    def replace_cache(self, config: gpu_cache.CacheConfig) -> None:
        """Go on with an empty cache; what waits for shards of the old one fails."""
        previous, self.cache = self.cache, self._cache_of(config)
        previous.close()
        self.cache.report()  # of shared memory, which stays

    def _cache_of(self, config: gpu_cache.CacheConfig | None) -> gpu_cache.TensorCache:
        config = settings_of(config)
        unsaid = {name: value for name, value in self._names.items() if getattr(config, name) is None}
        cache = gpu_cache.TensorCache(dataclasses.replace(config, **unsaid), broken=answer_error)
        cache.report_beside(self.store.segments.reported)
        return cache

    def close(self) -> None:
        """Close the cache, what serves the store beside others' servers, and the backend's connections. Idempotent."""
        while self.endings:
            self.endings.pop()()
        self.cache.close()
        if isinstance(self._backend, HttpRTensorBackend):
            self._backend.close()

    def owns(self, shard_id: Hashable, address: str | None) -> bool:
        """Whether the shard of that address is read from this process's store."""
        return address in self.own_addresses or (address in self.noted_addresses and shard_id in self.store)

    def _load_own(
        self, shards: Mapping[Hashable, TensorShardInfo], keys: Iterable[Hashable], timeout_s: float
    ) -> list[torch.Tensor | Exception]:
        found = dict(self.store.get_many(keys)[0])
        missing = (
            "Failed to fetch shard {} from {}: that is this process, which does not have it: it was cleared, or "
            "another process, such as a worker forked from this one, gave its shard this address"
        )
        return [
            found[key].tensor if key in found else ShardMissingError(missing.format(key, shards[key].node_addr))
            for key in keys
        ]


def _report(of: weakref.ref[Runtime]) -> None:
    """Report on an owner that may never use its cache."""
    if (runtime := of()) is not None:
        runtime.cache.report()


def _note_removal(of: weakref.ref[Runtime], address: str) -> None:
    if (runtime := of()) is not None:
        runtime.note_removal(address)


@dataclasses.dataclass(slots=True)
class _HandleSource:
    """The source of remote handles: this process's store, or the backend. Of a cached batch it looks at none."""

    runtime: Runtime
    handles: Sequence[Handle]
    promises: Mapping[Hashable, Promise]

    def open(self, keys: Sequence[Hashable], timeout_s: float) -> Iterable[ShardReader]:
        """One reader for each node and connection."""
        here, promises = self.runtime, self.promises
        shards = {handle.shard.shard_id: handle.shard for handle in self.handles}
        owners, backend = {owner for _, _, owner in promises.values()}, here.backend
        if not all(owners) and isinstance(backend, HttpRTensorBackend):
            _check_not_of_ray(keys)
        readers: list[ShardReader] = []
        if owners & (here.own_addresses | here.noted_addresses):
            own = {key: None for key in keys if here.owns(key, promises[key][2])}
            local = CallSource("local", partial(here._load_own, shards), promises, may_hang=False)
            readers += local.open(list(own), timeout_s) if own else ()
            keys = [key for key in keys if key not in own]
        if keys:
            readers += opened(_source_of(backend, shards, promises, keys), keys, timeout_s)
        return readers


def _source_of(
    backend: RTensorBackend,
    shards: Mapping[Hashable, TensorShardInfo],
    promises: Mapping[Hashable, Promise],
    keys: Sequence[Hashable],
) -> gpu_cache.ShardSource:
    """A source over any backend: its own if it streams, else one `fetch` for all that is missing."""
    # Asked of the class: a mock in the place of a backend has every attribute.
    if hasattr(type(backend), "source"):
        return cast(StreamingBackend, backend).source(shards, promises)

    def load(keys: Sequence[Hashable], timeout_s: float) -> list[torch.Tensor]:
        return backend.fetch([shards[key] for key in keys])

    nodes = listed(sorted({shards[key].node_addr for key in keys}))
    return CallSource(nodes, load, promises)


def _check_not_of_ray(shards: Iterable[Hashable]) -> None:
    """Refuse to ask owners over HTTP for what is in Ray's object store.

    Raises:
        ShardFetchError: Some is; names one, and the remedy.
    """
    of_ray = [key for key in shards if is_of_ray(key)]
    if of_ray:
        remedy = ": call set_backend(None)" if is_ray_in_use() else "; Ray is not initialised here: call ray.init"
        raise ShardFetchError(
            f"Failed to fetch shard {of_ray[0]} ({len(of_ray):,} such): in Ray's object store, and the backend of "
            f"this process is HTTP{remedy}"
        )


def _can_be_id(value: Any) -> bool:
    """Whether it can be hashed; a tuple says so of itself whatever it contains."""
    try:
        hash(value)
    except TypeError:
        return False
    return True


_WILDCARDS = ("0.0.0.0", "::")  # a server may bind these; connected to, they are the connecting host
_NO_SHARD = object()  # a key that no cache has
_wants_host_memory: ContextVar[bool] = ContextVar("wants_host_memory", default=False)


@contextlib.contextmanager
def host_reads() -> Iterator[None]:
    """Let reads of this context bring host memory: past a cache on a device, from one in host memory as ever."""
    token = _wants_host_memory.set(True)
    try:
        yield
    finally:
        _wants_host_memory.reset(token)


# Whether Ray's object store is an option. An AReaL that has no such handles would not understand them.
may_use_ray = True
# Whether any text may be an owner's address, as for AReaL: its tests have some that no client could connect to.
takes_any_address = False


def is_ray_in_use() -> bool:
    """Whether Ray is initialised here, and not in the parent of a forked child. Does not import it: its user has."""
    ray = sys.modules.get("ray") if may_use_ray else None
    return ray is not None and bool(ray.is_initialized())


# Guards _current.
_lock = threading.Lock()
_current: Runtime | None = None


def current() -> Runtime:
    """This process's runtime, made at first use; in a forked child a fresh one, which caches in host memory."""
    found = _current
    if found is not None and found.pid == os.getpid():
        return found
    config = None if found is None else gpu_cache.CacheConfig.from_env(device="cpu")
    return _install(Runtime(config), instead_of=found)


def configure(config: gpu_cache.CacheConfig | None = None, **settings: Any) -> Runtime:
    """Start over with a new cache; the store, its servers and the backend stay.

    Args:
        config: Settings of the cache; None reads the GPU_CACHE_* variables.
        settings: Fields of `CacheConfig` that win over the variables, as in `configure(device="cpu")`.
    Raises:
        ValueError: A setting is out of range, or both `config` and `settings` are given.
    """
    if config is not None and settings:
        raise ValueError(f"give a config or settings, not both: {sorted(settings)}")
    runtime = current()
    runtime.replace_cache(config or gpu_cache.CacheConfig.from_env(**settings))
    return runtime


def _install(runtime: Runtime, instead_of: Runtime | None) -> Runtime:
    """Make `runtime` the current one, unless another thread was first."""
    global _current
    with _lock:
        if _current is instead_of:
            _current = runtime
        assert _current is not None
        return _current


def _forget_lock() -> None:
    """In a forked child the lock may be held by a thread that does not exist there, and Ray is the parent's."""
    global _lock, may_use_ray
    may_use_ray = may_use_ray and not is_ray_in_use()
    _lock = threading.Lock()


def _close_at_exit() -> None:
    """Close the connections that are kept alive; in a forked child they are the parent's."""
    if _current is not None and _current.pid == os.getpid():
        _current.close()


os.register_at_fork(after_in_child=_forget_lock)
atexit.register(_close_at_exit)
