"""Names and promises of shards, the errors of fetching one, and the one walk over nested containers."""

from __future__ import annotations

import copy
import math
import operator
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch

from gpu_cache import Promise
from gpu_cache.errors import LOCAL, FetchError, FetchTimeoutError, broken_promise

MAX_PROMISES = 4096  # that are remembered
_promises: dict[Promise, Promise] = {}

LeafT = TypeVar("LeafT")

_CONTAINERS = (dict, list, tuple)

# Begins the ids of shards in Ray's object store. A process without Ray knows them by it, too.
RAY_PREFIX = "ray:"
# Objects of Ray's store that this process holds a reference of, by the part of a shard's id before the slash. Module
# state as Ray's own is: a process has one Ray, and a handle finds its object where it is unpickled.
ray_objects: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()

# A header of every answer: the random id that the server took when it started.
INCARNATION_HEADER = "X-Shard-Incarnation"
MAX_INCARNATION = 64  # characters; ours have 32
# Beside it: how often this server's owner has removed shards.
REMOVALS_HEADER = "X-Shard-Removals"
# A header of a request: a random name of the client, by which a server that closes connections knows it again.
CLIENT_HEADER = "X-Shard-Client"
# A header of a busy server's answer, beside Retry-After: the same in milliseconds.
RETRY_AFTER_MS_HEADER = "Retry-After-Ms"


def is_of_ray(shard_id: object) -> bool:
    """Whether an id is that of a shard in Ray's object store, as our backend makes them."""
    return type(shard_id) is str and shard_id.startswith(RAY_PREFIX)


@dataclass
class TensorShardInfo:
    """Where a shard lives.

    Args:
        shard_id: Opaque id, unique in the cluster: a string. AReaL's own Ray backend makes it an `ObjectRef`.
        node_addr: `host:port` of the owner's server; empty for Ray.
    """

    shard_id: Any
    node_addr: str

    # The object of Ray's store with the shard, which stays there while this lives. No annotation, no field.
    _object = cast(Any, None)

    def __post_init__(self) -> None:
        if is_of_ray(self.shard_id):
            self._object = ray_objects.get(self.shard_id.partition("/")[0])

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Take the reference of Ray's object along."""
        return super().__reduce_ex__(protocol) if self._object is None else self._object.reduced(self)

    def __wire_fields__(self) -> dict[str, Any]:
        """The fields that travel in a message.

        Raises:
            TypeError: The shard is in Ray's object store.
        """
        check_has_text_form(self.shard_id)
        return {"shard_id": self.shard_id, "node_addr": self.node_addr}


def check_has_text_form(shard_id: object) -> None:
    """Refuse ids of Ray's object store.

    Raises:
        TypeError: It is one.
    """
    if is_of_ray(shard_id):
        raise TypeError(f"the handle of shard {shard_id} cannot be written as text or bytes: {ONLY_RAYS_SERIALIZER}")


ONLY_RAYS_SERIALIZER = (
    "its shard is in Ray's object store, which keeps it only for references that travel through Ray's own serializer; "
    "pass the handle to a method of an actor, or to ray.put, or store over HTTP: set_backend(HttpRTensorBackend())"
)


class ShardFetchError(FetchError):
    """The owner could not be asked for a shard, or its answer is no use."""


class ShardMissingError(ShardFetchError):
    """The owner answered that it does not have the shard. Asking again does not help."""

    reason = "missing"


class ShardClearError(ShardFetchError):
    """An owner was not told to delete some shards, or refused.

    Args:
        message: The failure in words.
        shard_ids: The shards that the owner may still have.
        statistics: The owner's figures after the other deletions; empty if it sent none.
    """

    def __init__(
        self, message: str, shard_ids: Iterable[Any] = (), statistics: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(message)
        self.shard_ids, self.statistics = list(shard_ids), dict(statistics or {})
        self.args = (message, self.shard_ids, self.statistics)


class ShardLostError(ShardMissingError):
    """The owner restarted since it was first asked, and does not have the shard: it is gone for good.

    Args:
        shard_id: Which.
        node_addr: The owner's address.
        before: Incarnation of the server that answered there first.
        now: Incarnation of the one that answers now.
    """

    def __init__(self, shard_id: Any, node_addr: str, before: str, now: str) -> None:
        super().__init__(
            f"Failed to fetch shard {shard_id} from {node_addr}: the owner does not have it; it restarted "
            f"(incarnation {before} before, {now} now)"
        )
        self.args = (shard_id, node_addr, before, now)
        self.shard_id, self.node_addr, self.before, self.now = shard_id, node_addr, before, now


class ShardRefusedError(ShardFetchError):
    """The owner refused: a token that is missing or wrong (401), a request too long (413), any other status 4xx."""

    reason = "refused"


class ShardAnswerError(ShardFetchError):
    """The owner's answer is no use: a broken frame, no HTTP, or a fault of its own (status 5xx)."""

    reason = "answer"


class ShardConflictError(ShardFetchError, ValueError):
    """Handles of one call give one shard id two owners. An id means one shard of one owner."""


class ShardUnreachableError(ShardFetchError):
    """No connection to the owner, or it broke off, and other tries did not mend that."""

    reason = "connection"


class ShardLocalError(ShardFetchError):
    """This process could not ask: it has no file descriptor left for a connection. No node has to do with that."""

    reason = LOCAL


class ShardTimeoutError(ShardFetchError, FetchTimeoutError):
    """The owner did not answer in time, or was busy until the time was up. Asking again may help."""

    reason = "timeout"


class WireError(ValueError):
    """A frame that breaks the wire format; nothing was allocated for it."""


class TooLongError(WireError):
    """An answer longer than the shards that it is about; its bytes were not read."""


def promise_of(dtype: torch.dtype, shape: tuple[int, ...], owner: str) -> Promise:
    """The promise of a handle. Equal promises are one object, as a rule, so that a comparison looks at a pointer.

    Source: our measurement; looking into tuples spread over memory made a hit 0.5 us slower on a busy machine.
    """
    if len(_promises) >= MAX_PROMISES:
        _promises.clear()
    promise = dtype, shape, owner
    return _promises.setdefault(promise, promise)


def nbytes_of(promise: Promise) -> int:
    """The length of the shard that a handle promises, in bytes."""
    return math.prod(promise[1]) * promise[0].itemsize


def check_owners(shards: Iterable[TensorShardInfo]) -> None:
    """Refuse shards of one id and two owners.

    Raises:
        ShardConflictError: There are some.
    """
    owners: dict[Hashable, str] = {}
    for shard in shards:
        shard_id, owner = shard.shard_id, shard.node_addr
        if (known := owners.setdefault(shard_id, owner)) != owner:
            raise ShardConflictError(
                f"Failed to fetch shard {shard_id}: handles of one call say that {known} owns it, and that {owner} "
                "does; an id means one shard of one owner"
            )


def answer_error(key: Hashable, promised: Promise, found: Promise) -> ShardAnswerError:
    """The error of a shard that is not what its handle promises."""
    return ShardAnswerError(f"Failed to fetch shard {key}{broken_promise(promised, found)}")


def collect_leaves(obj: object, leaf_type: type[LeafT]) -> list[LeafT]:
    """List the leaves of that type in a nest of dicts, lists and tuples, in order and with repeats.

    Args:
        obj: A leaf, or containers to any depth; anything else holds no leaves. A container that contains itself
            ends in `RecursionError`.
        leaf_type: A leaf is not entered, even if it is a container itself.
    """
    found: list[LeafT] = []
    _collect((obj,), leaf_type, found)
    return found


def _collect(children: Iterable[object], leaf_type: type[LeafT], found: list[LeafT]) -> None:
    """Append the leaves among `children`; one frame for a container and none for a leaf, as there may be thousands."""
    for child in children:
        if isinstance(child, leaf_type):
            found.append(child)
        elif isinstance(child, _CONTAINERS):
            _collect(_children(child), leaf_type, found)


def leaf_paths(obj: object, leaf_type: type[LeafT], path: str) -> Iterator[tuple[str, LeafT]]:
    """The leaves as of `collect_leaves`, each with the words that lead to it, as in `batch["mask"][2]`."""
    if isinstance(obj, leaf_type):
        yield path, obj
    elif isinstance(obj, dict):
        for key, child in obj.items():
            yield from leaf_paths(child, leaf_type, f"{path}[{key!r}]")
    elif isinstance(obj, _CONTAINERS):
        fields = getattr(obj, "_fields", None)  # only a named tuple has them
        for number, child in enumerate(cast(Iterable[object], obj)):
            yield from leaf_paths(child, leaf_type, f"{path}.{fields[number]}" if fields else f"{path}[{number}]")


def map_leaves(obj: Any, leaf_type: type[LeafT], fn: Callable[[LeafT], object]) -> Any:
    """Rebuild a nest of containers with `fn(leaf)` in the place of each leaf.

    Containers are new and keep their types: a named tuple stays one, a `defaultdict` keeps its factory. Everything
    that is neither leaf nor container is passed on as it is.

    Args:
        obj: As for `collect_leaves`.
        leaf_type: As for `collect_leaves`.
        fn: Called once for each occurrence, in the order of `collect_leaves`.
    """
    if isinstance(obj, leaf_type):
        return fn(obj)
    return _rebuild(obj, leaf_type, fn) if isinstance(obj, _CONTAINERS) else obj


def _rebuild(container: Any, leaf_type: type[LeafT], fn: Callable[[LeafT], object]) -> Any:
    """Leaves are told apart here as well as in `map_leaves`: a call for each of thousands costs more than the work."""
    if type(container) is dict:
        return {
            key: fn(child) if isinstance(child, leaf_type) else map_leaves(child, leaf_type, fn)
            for key, child in container.items()
        }
    mapped = [
        fn(child) if isinstance(child, leaf_type) else map_leaves(child, leaf_type, fn)
        for child in _children(container)
    ]
    return mapped if type(container) is list else like(container, mapped)


def _children(container: Any) -> Iterable[object]:
    children: Iterable[object] = container.values() if isinstance(container, dict) else container
    return children


def like(container: Any, children: list[object]) -> Any:
    """A new container of the same type: a refilled copy, which saves guessing at a subclass's constructor.

    A list or dict that cannot be copied, or does not take the children, becomes a plain one.
    """
    if isinstance(container, tuple):
        return _tuple_like(container, children)
    try:
        clone = copy.copy(container)
        if isinstance(container, list):
            clone[:] = children
            return clone
        # Item by item: `Counter.update`, for one, would add instead of replace.
        for key, child in zip(container, children, strict=True):
            clone[key] = child
        return clone
    except Exception:  # a class of users may refuse, in any words: to be copied, or to hold handles
        return children if isinstance(container, list) else dict(zip(container, children, strict=True))


def _tuple_like(container: tuple[object, ...], children: list[object]) -> Any:
    """A tuple of the same class, past its constructor, whose arguments may be others."""
    kind = type(container)
    try:
        made = tuple.__new__(kind, children)
    except TypeError:  # of a class in C: its constructor takes one iterable, if it can be called at all
        return container if all(map(operator.is_, container, children)) else kind(children)
    if hasattr(container, "__dict__"):
        vars(made).update(vars(container))
    return made
