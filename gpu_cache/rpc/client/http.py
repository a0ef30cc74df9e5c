"""The HTTP backend: shards of rollout workers over kept-alive connections, one thread for each node."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import importlib
import json
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from gpu_cache import FetchError, Promise, ShardReader, ShardSpec
from gpu_cache.config import whole
from gpu_cache.device.hostmem import host_tensor
from gpu_cache.rpc.clearing import in_own_thread
from gpu_cache.rpc.client.connection import HttpAnswer
from gpu_cache.rpc.client.deleter import HttpDeleter
from gpu_cache.rpc.client.memory import OwnersMemory
from gpu_cache.rpc.client.pool import ConnectionPool, NodeState
from gpu_cache.rpc.client.reader import HttpReader
from gpu_cache.rpc.client.requester import (
    CHECK,
    CLEAR,
    DEFAULT_MAX_UNKNOWN_BYTES,
    FETCH,
    HttpSettings,
    Requester,
    Route,
    kind_of_status,
    shortened,
)
from gpu_cache.rpc.client.same_host import SameHostReader
from gpu_cache.rpc.segments import is_wanted, node_cache_path
from gpu_cache.rpc.shard import ShardAnswerError, TensorShardInfo, check_owners
from gpu_cache.rpc.store import ShardStore
from gpu_cache.rpc.tokens import find_token
from gpu_cache.rpc.wire.serialization import check_stored, tensor_from_json

_MAX_SERIAL, _ANSWER_SLACK_BYTES = 64, 4096  # bytes of a shard's serial in JSON, and of what is around all of them


class Checked(NamedTuple):
    """An owner's answer about shards, without their bytes.

    Attributes:
        incarnation: That of its server.
        removals: How often it has removed shards.
        memory: Where processes of its host find its memory.
        serials: By id, of those that it has. Equal serials of one incarnation mean equal bytes.
    """

    incarnation: str
    removals: str
    memory: str
    serials: dict[str, str]


class HttpRTensorBackend:
    """Fetches shards from the `/data` routes of their owners.

    Args:
        max_shards_per_request: Bounds a request in the JSON form; a binary one is bounded by 256 MiB and 4,096 ids.
        token: Sent as `Authorization: Bearer`; None reads AREAL_RPC_TOKEN. White space around it is dropped.
        shards: Where `store` keeps tensors; None until the backend is made this process's own.
        max_unknown_bytes: The longest shard that `fetch` takes, in bytes. `source` takes what the handles promise,
            however long it is, and nothing longer.
        same_host: Whether shards of owners on this host are read from their memory. None: unless GPU_CACHE_SHM says no.
        node_cache: Where a node cache is looked for, by way of which shards of other hosts are read; "": nowhere. None:
            where GPU_CACHE_NODE_CACHE says. Without shared memory there is none.
    Attributes:
        on_removal: Called with an owner's address when its answer to a fetch says that it has removed shards since the
            answer before; set before the first request.
    Raises:
        ValueError: `max_shards_per_request` or `max_unknown_bytes` is no whole number, at least 1; or the token is not
            one line of printable ASCII.
    Thread-safety: any thread.
    """

    def __init__(
        self,
        max_shards_per_request: int = 32,
        *,
        token: str | None = None,
        shards: ShardStore | None = None,
        max_unknown_bytes: int = DEFAULT_MAX_UNKNOWN_BYTES,
        same_host: bool | None = None,
        node_cache: str | None = None,
    ) -> None:
        if max_shards_per_request <= 0:
            raise ValueError("max_shards_per_request must be positive")  # in AReaL's words
        self.max_shards_per_request = whole(max_shards_per_request, "max_shards_per_request", least=1)
        self.shards = shards
        self.on_removal: Callable[[str], object] = lambda _: None
        secret = find_token(token)
        self._settings = HttpSettings(
            {"Authorization": f"Bearer {secret}"} if secret else {},
            max_json_shards=self.max_shards_per_request,
            max_unknown_bytes=whole(max_unknown_bytes, "max_unknown_bytes", least=1),
        )
        self._connections = ConnectionPool()
        has_memory = is_wanted() if same_host is None else same_host
        proxy = node_cache_path() if node_cache is None and has_memory else node_cache or ""
        self.memories = OwnersMemory(proxy) if has_memory else None
        self._nodes: dict[str, NodeState] = {}

    def __repr__(self) -> str:
        return f"HttpRTensorBackend(max_shards_per_request={self.max_shards_per_request})"

    def source(self, shards: Mapping[Hashable, TensorShardInfo], expected: Mapping[Hashable, Promise]) -> HttpSource:
        """A source for these shards by id; `expected` has the promises of their handles."""
        return HttpSource(self, shards, expected)

    def fetch(self, shards: list[TensorShardInfo]) -> list[torch.Tensor]:
        """Fetch into tensors of the host's own memory, past every cache; nodes in parallel.

        Nothing says how long these shards are: one longer than `max_unknown_bytes` is not taken.

        Raises:
            ShardFetchError: One did not arrive.
            ShardConflictError: One id has two owners. Nothing was asked for.
        """
        if self._has_other_groups:
            with concurrent.futures.ThreadPoolExecutor(1) as pool:  # the caller may be inside a loop
                return pool.submit(asyncio.run, self._fetch_in_groups(shards)).result()
        check_owners(shards)
        wanted = {info.shard_id: info for info in shards}
        readers = self.source(wanted, {}).open(list(wanted), self._settings.fetch_timeout_s)
        tensors: dict[Hashable, torch.Tensor] = {}
        with concurrent.futures.ThreadPoolExecutor(max_workers=8) as pool:
            for arrived in pool.map(drained, readers):
                tensors.update(arrived)
        return [tensors[info.shard_id] for info in shards]

    @property
    def _has_other_groups(self) -> bool:
        """Whether AReaL's private names are replaced, in a subclass or, as AReaL's tests do, in this object."""
        own = vars(HttpRTensorBackend)
        found = (getattr(self, name) for name in ("_create_session", "_fetch_shard_group"))
        return any(getattr(one, "__func__", one) not in own.values() for one in found)

    async def _fetch_in_groups(self, shards: list[TensorShardInfo]) -> list[torch.Tensor]:
        """Fetch as AReaL does, which its private names belong to: so many shards of one node in each request."""
        numbered: dict[str, list[tuple[int, TensorShardInfo]]] = {}
        for number, info in enumerate(shards):
            numbered.setdefault(info.node_addr, []).append((number, info))
        found: dict[int, torch.Tensor] = {}
        async with self._create_session() as session:
            for node, listed in numbered.items():
                for start in range(0, len(listed), self.max_shards_per_request):
                    group = listed[start : start + self.max_shards_per_request]
                    tensors = await self._fetch_shard_group(session, node, group)
                    found |= {number: tensor for (number, _), tensor in zip(group, tensors, strict=True)}
        return [found[number] for number in range(len(shards))]

    def _create_session(self) -> Any:
        """AReaL's private name: an aiohttp session. Only code that replaces this or `_fetch_shard_group` uses it."""
        aiohttp = importlib.import_module("aiohttp")  # takes a quarter of a second, and hardly a client needs it
        timeout = aiohttp.ClientTimeout(total=self._settings.fetch_timeout_s)
        return aiohttp.ClientSession(timeout=timeout, headers=self._settings.headers)

    async def _fetch_shard_group(
        self, session: Any, node_addr: str, grouped: list[tuple[int, TensorShardInfo]]
    ) -> list[torch.Tensor]:
        """AReaL's private name: the shards of one request, in the JSON form, over a session."""
        url = f"http://{node_addr}{FETCH.path}"
        async with session.post(url, json={"shard_ids": [info.shard_id for _, info in grouped]}) as answer:
            if answer.status != 200:
                text = shortened((await answer.text()).strip())
                raise kind_of_status(answer.status)(
                    f"Failed to fetch shard batch from {url}: {answer.status} body={text}"
                )
            return [tensor_from_json(described) for described in json.loads(await answer.read())]

    def store(self, tensor: torch.Tensor) -> str:
        """Keep a tensor for others to fetch; returns a fresh uuid4.

        Raises:
            TypeError: They could not: it does not travel, or has no values.
            RuntimeError: The backend has no store: it is not this process's own.
        """
        if self.shards is None:
            raise RuntimeError(
                "this HttpRTensorBackend has no store; pass one as shards=, or make it the process's with set_backend"
            )
        check_stored(tensor)
        shard_id = str(uuid.uuid4())
        self.shards.put(shard_id, tensor)
        return shard_id

    def take_back(self, shard_ids: Sequence[Any]) -> None:
        """Forget what `store` has kept, without a request."""
        if self.shards is not None:
            self.shards.remove(shard_ids)

    async def delete(self, node_addr: str, shard_ids: list[Any]) -> dict[str, Any]:
        """Delete shards at their owner: three tries within 10 s. Unknown ids are no error.

        After a refusal the client asks in halves, so that one bad id keeps none of the others.

        Returns:
            The owner's statistics.
        Raises:
            ShardFetchError: The owner could not be told, or refused. A `ShardClearError` says what it may still have.
        """
        return await in_own_thread(self._delete, node_addr, list(shard_ids))

    def check(self, node_addr: str, shard_ids: Sequence[str], timeout_s: float) -> Checked:
        """Ask an owner which shards it has at this moment.

        Raises:
            ShardFetchError: It did not answer, or is of a version that does not tell.
        """
        requester = self._requester(node_addr, CHECK, timeout_s)
        try:
            return requester.send(shard_ids, partial(_checked, requester, shard_ids))
        except ValueError as error:
            raise ShardAnswerError(f"Failed to look for shards at {requester.url}: {error}") from error
        finally:
            requester.release()

    def close(self) -> None:
        """Close the idle connections, and unmap what is mapped. Idempotent."""
        self._connections.close()
        if self.memories is not None:
            self.memories.close()

    def _requester(self, address: str, route: Route, timeout_s: float) -> Requester:
        if (node := self._nodes.get(address)) is None:
            node = self._nodes.setdefault(address, NodeState(partial(self.on_removal, address)))
        return Requester(address, route, self._connections, self._settings, time.monotonic() + timeout_s, node)

    def _delete(self, node_addr: str, shard_ids: list[Any]) -> dict[str, Any]:
        requester = self._requester(node_addr, CLEAR, self._settings.delete_timeout_s)
        try:
            return HttpDeleter(requester).delete(shard_ids)
        finally:
            requester.release()
            if self.memories is not None:  # once they are gone: a consumer could have read them again meanwhile
                self.memories.forget_shards(shard_ids)


@dataclasses.dataclass(slots=True)
class HttpSource:
    """A `ShardSource` over one backend.

    Attributes:
        backend: Has connections, settings and mapped memory.
        shards: Where each is.
        expected: The promises of their handles, where known.
    """

    backend: HttpRTensorBackend
    shards: Mapping[Hashable, TensorShardInfo]
    expected: Mapping[Hashable, Promise]

    def open(self, keys: Sequence[Hashable], timeout_s: float) -> list[HttpReader | SameHostReader]:
        """One reader for each node; connects at its first read."""
        by_node: defaultdict[str, list[Hashable]] = defaultdict(list)
        for key in keys:
            by_node[self.shards[key].node_addr].append(key)
        readers: list[HttpReader | SameHostReader] = []
        backend, expected, ends = self.backend, self.expected, time.monotonic() + timeout_s
        memories = backend.memories
        for node, wanted in by_node.items():
            requester = backend._requester(node, FETCH, timeout_s)
            http = HttpReader(wanted, expected, requester, backend._settings)
            readers.append(http if memories is None else SameHostReader(http, requester.node, memories, expected, ends))
        return readers


def _checked(requester: Requester, shard_ids: Sequence[str], answer: HttpAnswer) -> Checked:
    if answer.status != 200:
        text = requester.text_of(answer)
        raise kind_of_status(answer.status)(
            f"Failed to look for shards at {requester.url}: {requester.refusal_of(answer.status, text)}"
        )
    found = json.loads(answer.read_rest(_MAX_SERIAL * len(shard_ids) + _ANSWER_SLACK_BYTES))
    serials = found.get("serials") if isinstance(found, dict) else None
    if not isinstance(serials, list) or len(serials) != len(shard_ids):
        raise ValueError("it sent no serials, or not so many")
    told = {key: one for key, one in zip(shard_ids, serials, strict=True) if isinstance(one, str) and one}
    return Checked(answer.incarnation, answer.removals, answer.memory, told)


def drained(reader: ShardReader) -> dict[Hashable, torch.Tensor]:
    """Everything that a reader delivers, each shard in memory of its own."""
    tensors: dict[Hashable, torch.Tensor] = {}
    try:
        while (specs := reader.next_specs()) is not None:
            _read_part(reader, specs, tensors)
        for error in reader.failures.values():
            raise error
    finally:
        reader.close()
    return tensors


def _read_part(reader: ShardReader, specs: Sequence[ShardSpec], tensors: dict[Hashable, torch.Tensor]) -> None:
    """Read the shards of a part, those without bytes first; the reader announces again what it could not complete."""
    try:
        for spec in sorted(specs, key=lambda spec: spec.nbytes > 0):
            flat = host_tensor(spec.nbytes)
            if spec.nbytes:
                reader.read_into([flat.numpy().data])
            tensors[spec.key] = flat.view(spec.dtype).view(spec.shape)
    except FetchError as error:
        if not error.may_go_on:
            raise
