"""A cache for all processes of one user on one host: `python -m gpu_cache.rpc.node_cache`.

It fetches a shard of an owner on another host once, whichever processes ask for it, and keeps it in memory that they
map: an owner by proxy. They reach it as they reach an owner of their own host, see `server/same_host.py`.

**Clears.** For each question the node cache first asks the owner which of the shards it has, and under which serials.
It keeps bytes under such a serial and the incarnation of the owner's server, and fetches them after the owner has named
both. So a consumer that asks after the owner has confirmed a clear does not get the shard, even if the node cache was
not told of the clear. Nor does it get bytes of an owner that has restarted, or that has stored other bytes under the
id. The price is one small request to the owner for each question.

The memory of cleared shards becomes free later, in one of three ways:

- At once, when a consumer of this host evicts the shards, or clears them at their owner.
- After the next question about the same owner, when another process cleared them. An owner's answers count its
  removals. When the count has changed, the node cache asks which of its shards are left.
- By eviction, least recently used first.

The node cache does not keep a shard that is cleared while it is being fetched.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import itertools
import logging
import math
import os
import select
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import torch

from gpu_cache import CacheClosedError, CacheConfig, Promise, ShardReader, ShardSpec, TensorCache
from gpu_cache.config import ALIGNMENT, parse_size, whole
from gpu_cache.device.host import HostDevice
from gpu_cache.device.protocol import Arena
from gpu_cache.process import OwnThread, forget_sockets, leave_to_parent
from gpu_cache.rpc.client.http import Checked, HttpRTensorBackend
from gpu_cache.rpc.client.reader import HttpReader
from gpu_cache.rpc.client.same_host import SameHostReader
from gpu_cache.rpc.segments import NODE_CACHE_VARIABLE, Segments, leads_to_socket, node_cache_path
from gpu_cache.rpc.server.connections import raise_descriptor_limit
from gpu_cache.rpc.server.expiry import option, parse_seconds
from gpu_cache.rpc.server.main import readable_on
from gpu_cache.rpc.server.same_host import Located, SameHostServer
from gpu_cache.rpc.shard import ShardFetchError, TensorShardInfo
from gpu_cache.rpc.store import ShardStore
from gpu_cache.rpc.wire.records import ELSEWHERE, UNKNOWN_COUNT, Proxied, boot_id, record_of
from gpu_cache.source import NO_SOURCE
from gpu_cache.throttle import Throttle

ROLE = "node-cache"
DEFAULT_MAX_BYTES = 8 << 30
_SLAB_BYTES = 64 << 20
_LOOK_S = 1.0  # between two looks whether a client is connected
_MAX_UNDER_WAY = 128  # questions at once; the shards of further ones are left to their owners
_MAX_FORGOTTEN = 65_536  # versions that are remembered beside those of cached shards
_MAX_CHECKED = 16_384  # shards in one question to an owner
_SWEEP_S = 10.0  # the longest wait for an owner that is asked which shards are left
_LONGEST_S = 600.0  # the longest time for one question of a consumer

logger = logging.getLogger(__name__)


class Version(NamedTuple):
    """The key of a shard in the cache. Equal keys mean equal bytes, whatever owners store and restart.

    Attributes:
        shard_id: Its id.
        address: Its owner's.
        tag: The incarnation of the owner's server, and the serial that the shard had before it was fetched.
    """

    shard_id: str
    address: str
    tag: tuple[str, str]

    def __str__(self) -> str:
        return self.shard_id

    def __repr__(self) -> str:
        return repr(self.shard_id)


class SharedMemory(HostDevice):
    """Host memory that other processes map, as the device of a cache.

    Args:
        segments: Where arenas lie.
    """

    hard_limit = "max_bytes (--max-bytes)"

    def __init__(self, segments: Segments) -> None:
        super().__init__()
        self._segments = segments

    def arena(self, nbytes: int, *, private: bool = True) -> Arena:
        """A range of a segment; raises `torch.OutOfMemoryError` where there is none."""
        (memory,) = self._segments.take([nbytes])
        if memory is None:
            raise torch.OutOfMemoryError(f"no shared memory for {nbytes:,} bytes")
        return Arena(torch.from_numpy(memory))

    def release_arena(self, arena: Arena) -> None:
        """Give it back to the system, but for what others map."""
        super().release_arena(arena)
        self._segments.trim()


class NodeCache:
    """A `Proxy`: answers for owners on other hosts.

    Args:
        max_bytes: The most memory for shards. It evicts none that a consumer reads. Shards that then find no room come
            over HTTP.
    Attributes:
        segments: The shared memory that they lie in.
    Raises:
        ValueError: `max_bytes` is no whole number, at least 512, or a GPU_CACHE_* variable is out of range.
    Thread-safety: any thread.
    """

    def __init__(self, max_bytes: int) -> None:
        max_bytes = whole(max_bytes, "max_bytes", least=ALIGNMENT)
        self.segments = Segments(lambda: True)
        self._backend = HttpRTensorBackend(same_host=False)
        config = CacheConfig.from_env(
            device="cpu", pool_bytes=max_bytes, slab_bytes=min(_SLAB_BYTES, max_bytes), prealloc_bytes=0, role=ROLE,
            rank=0, host_tier_bytes=0, on_mutation="ignore", debug_checksum=False, ready="host",
        )  # fmt: skip
        self.cache = TensorCache(config, device=SharedMemory(self.segments))
        self.cache.report_beside(self.segments.reported)
        self.cache.get_many([], NO_SOURCE)  # reports from now on
        # Guards every field below.
        self._lock = threading.Lock()
        self._latest: dict[str, Version] = {}  # by id, in the order of the latest questions
        self._seen: dict[str, tuple[str, str]] = {}  # by address: incarnation and removals at the latest answer
        self._failures: dict[str, Throttle] = {}  # by address, of lines in the log
        self._num_under_way = 0

    def begin(self, asked: Proxied, answer: Callable[[Located], None]) -> None:
        """Answer about shards, on a thread of its own."""
        with self._lock:
            is_busy = self._num_under_way >= _MAX_UNDER_WAY
            self._num_under_way += not is_busy
        if is_busy:
            answer(_left_to_owner(asked))
            self._tell_left(asked, f"{_MAX_UNDER_WAY} questions are under way")
            return
        try:
            OwnThread(lambda: self._work(asked, answer), "gpu-cache-proxy").start()
        except RuntimeError as error:  # the system has no thread left
            answer(_left_to_owner(asked))
            self._end_one(asked, str(error))

    def forget(self, shard_ids: Sequence[str]) -> None:
        """Drop what was cleared; also what is on its way."""
        with self._lock:  # the versions stay: a question may be about to fetch one that another consumer clears then
            gone = [self._latest[shard_id] for shard_id in shard_ids if shard_id in self._latest]
        if gone:
            self.cache.clear(gone)

    def close(self) -> None:
        """Drop everything, and end every fetch. Idempotent."""
        self.cache.close()
        self._backend.close()

    def _work(self, asked: Proxied, answer: Callable[[Located], None]) -> None:
        located, checked, failure = _left_to_owner(asked), None, ""
        try:
            timeout_s = min(asked.timeout_s, _LONGEST_S)
            deadline = time.monotonic() + timeout_s
            checked = self._backend.check(asked.address, asked.ids, timeout_s)
            located = self._brought(asked, checked, deadline)
        except (ShardFetchError, CacheClosedError) as error:  # whatever fails, the consumer asks the owner itself
            failure = str(error)
        except Exception:
            logger.exception("fetching %d shards of %s failed", len(asked.ids), asked.address)
        answer(located)
        del located  # the client holds it
        self._end_one(asked, failure)
        try:
            if checked is not None:
                self._sweep(asked.address, checked)
        except Exception as error:  # top of a thread
            logger.info("shards that %s may have cleared stay for now: %s", asked.address, str(error))

    def _end_one(self, asked: Proxied, failure: str) -> None:
        """Count a question as answered."""
        with self._lock:
            self._num_under_way -= 1
        if failure:
            self._tell_left(asked, failure)

    def _tell_left(self, asked: Proxied, why: str) -> None:
        """Say, once a minute for each owner, why its shards were left to it."""
        with self._lock:
            throttle = self._failures.setdefault(asked.address, Throttle())
        if throttle.opens():
            logger.info("leaving %d shards of %s to their owner: %s", len(asked.ids), asked.address, why)

    def _brought(self, asked: Proxied, checked: Checked, deadline: float) -> Located:
        """Fetch what is not here."""
        if checked.memory.partition(" ")[0] == boot_id() or not checked.incarnation:
            return _left_to_owner(asked)  # the consumer reads its memory; or it does not say which server it is
        versions = self._versions(asked.address, checked)
        promises: dict[Hashable, Promise] = {version: asked.promises[key] for key, version in versions.items()}
        tensors = self.cache.get_many(
            list(promises),
            _VersionSource(self._backend, promises),
            timeout_s=max(0.0, deadline - time.monotonic()),
            on_error="none",
            expected=promises,
        )
        records = {key: self._record(tensor) for key, tensor in zip(versions, tensors, strict=True)}
        removals = min(int(checked.removals), UNKNOWN_COUNT) if checked.removals.isdecimal() else UNKNOWN_COUNT
        return Located(b"".join([records.get(key, ELSEWHERE) for key in asked.ids]), tensors, removals)

    def _versions(self, address: str, checked: Checked) -> dict[str, Version]:
        """The keys of the shards that an owner has. The cache drops copies under earlier keys."""
        versions = {key: Version(key, address, (checked.incarnation, one)) for key, one in checked.serials.items()}
        num_cached = len(self.cache)
        with self._lock:
            before = {key: self._latest.pop(key) for key in versions if key in self._latest}
            self._latest.update(versions)
            is_long = len(self._latest) > _MAX_FORGOTTEN + 2 * num_cached
        if old := [one for key, one in before.items() if one != versions[key]]:
            self.cache.clear(old)
        if is_long:
            self._forget_evicted()
        return versions

    def _forget_evicted(self) -> None:
        """Forget versions of shards that were evicted, but the latest: questions may be fetching them."""
        cached = {version.shard_id for version in self._cached()}
        with self._lock:
            kept = cached.union(itertools.islice(reversed(self._latest), _MAX_FORGOTTEN // 2))
            self._latest = {key: one for key, one in self._latest.items() if key in kept}

    def _record(self, tensor: torch.Tensor | None) -> bytes:
        """Where a shard is; ELSEWHERE if it did not arrive, or found no room here."""
        if tensor is None:
            return ELSEWHERE
        place = self.segments.locate(tensor.data_ptr(), tensor.nbytes) if tensor.nbytes else (0, 0)
        return ELSEWHERE if place is None else record_of(tensor.dtype, tensor.shape, *place)

    def _sweep(self, address: str, checked: Checked) -> None:
        """Drop shards that an owner has no more, if it has removed some since it was last asked, or has restarted."""
        now = checked.incarnation, checked.removals
        with self._lock:
            before, self._seen[address] = self._seen.get(address, now), now
        if before == now:
            return
        try:
            self._drop_gone(address)
        except ShardFetchError:
            with self._lock:
                self._seen[address] = before  # the next question is followed by another try
            raise

    def _cached(self) -> list[Version]:
        return cast(list[Version], self.cache.keys())

    def _drop_gone(self, address: str) -> None:
        mine = [one for one in self._cached() if one.address == address]
        for start in range(0, len(mine), _MAX_CHECKED):
            group = mine[start : start + _MAX_CHECKED]
            found = self._backend.check(address, [one.shard_id for one in group], _SWEEP_S)
            gone = [one for one in group if one.tag != (found.incarnation, found.serials.get(one.shard_id))]
            if gone:
                self.cache.clear(gone)


class _VersionSource:
    """A `ShardSource` for keys that are versions.

    Args:
        backend: Fetches them.
        promises: Dtype, shape and owner of each.
    """

    def __init__(self, backend: HttpRTensorBackend, promises: Mapping[Hashable, Promise]) -> None:
        self._backend, self._promises = backend, promises

    def open(self, keys: Sequence[Hashable], timeout_s: float) -> Iterable[ShardReader]:
        """One reader for each owner."""
        versions: dict[Hashable, Version] = {one.shard_id: one for one in cast(Sequence[Version], keys)}
        expected = {key: self._promises[version] for key, version in versions.items()}
        shards = {key: TensorShardInfo(key, one.address) for key, one in versions.items()}
        readers = self._backend.source(shards, expected).open(list(versions), timeout_s)
        return [_VersionReader(reader, versions) for reader in readers]


class _VersionReader:
    """A reader whose shards go by their versions."""

    def __init__(self, reader: HttpReader | SameHostReader, versions: Mapping[Hashable, Version]) -> None:
        self.node, self._reader, self._versions = reader.node, reader, versions
        self.keys = [versions[key] for key in reader.keys]
        self.read_into, self.cancel, self.close = reader.read_into, reader.cancel, reader.close

    @property
    def failures(self) -> Mapping[Hashable, Exception]:
        return {self._versions[key]: error for key, error in self._reader.failures.items()}

    @property
    def transport(self) -> str:
        """How the latest part came."""
        return self._reader.transport

    @property
    def num_received(self) -> int:
        """Bytes that came so far."""
        return self._reader.num_received

    def next_specs(self) -> Sequence[ShardSpec] | None:
        """Ask for the next part."""
        specs = self._reader.next_specs()
        return specs and [ShardSpec(self._versions[one.key], one.dtype, one.shape) for one in specs]


def _left_to_owner(asked: Proxied) -> Located:
    return Located(ELSEWHERE * len(asked.ids), (), UNKNOWN_COUNT)


class Running:
    """A node cache that consumers of this host find. A context manager: leaving it ends it.

    Args:
        path: Where they look for it: a link to its socket.
        max_bytes: The most memory for shards.
    Raises:
        BlockingIOError: Another one is there.
        OSError: There is no place for its socket, or something else is at `path`.
        ValueError: As for `NodeCache`.
        RuntimeError: The system has no thread left.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path = path
        self._lock = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, self._lock)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.cache = NodeCache(max_bytes)
            stack.callback(self.cache.close)
            store = ShardStore(segments=self.cache.segments)
            self.server = SameHostServer(store, uuid.uuid4().hex, proxy=self.cache)
            stack.callback(self.server.stop)
            _link(path, self.server.path)
            stack.callback(_unlink, path, self.server.path)
            self._stack = stack.pop_all()
        leave_to_parent(self)

    def disown(self) -> object:
        """Let go of the place in a forked child, which else keeps it taken when the parent is gone."""
        forget_sockets([self._lock])
        kept, self._stack = self._stack, contextlib.ExitStack()
        return kept

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def look(self) -> None:
        """Put the link back if it is gone: programs that tidy /tmp remove old ones."""
        if not os.path.lexists(self.path):
            with contextlib.suppress(OSError):  # its folder is gone, too
                _link(self.path, self.server.path)

    def stop(self) -> None:
        """End it. Idempotent."""
        try:
            self._stack.close()
        finally:
            self._lock = -1  # a later file may get its number


def _link(path: Path, target: str) -> None:
    """Let a path lead to the socket, from one moment to the next; raises `OSError` if something else is there."""
    if os.path.lexists(path) and not leads_to_socket(path):
        raise FileExistsError(errno.EEXIST, "there is something that is no link of a node cache", str(path))
    hidden = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    hidden.symlink_to(target)
    try:
        os.rename(hidden, path)
    except OSError:
        hidden.unlink()
        raise


def _unlink(path: Path, target: str) -> None:
    """Remove the link to the socket, unless something else has come to its path."""
    with contextlib.suppress(OSError):  # gone, or no link
        if os.readlink(path) == target:
            path.unlink()


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT, or until it has been idle for too long."""
    parser = _parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(level=options.log_level)
    if options.path is None:
        options.path = node_cache_path({**os.environ, NODE_CACHE_VARIABLE: "auto"})
    if not options.path:
        parser.error("there is no folder for its socket: name a path by --path")
    raise_descriptor_limit()
    ending = readable_on(signal.SIGTERM, signal.SIGINT)
    try:
        running = Running(Path(options.path), options.max_bytes)
    except BlockingIOError:
        print(f"a node cache is at {options.path} already", flush=True)
        return 0
    except (OSError, ValueError, RuntimeError) as error:
        parser.error(str(error))
    with running:
        print(f"listening at {options.path}", flush=True)
        _wait(ending, running, options.idle_timeout)
    return 0


def _wait(ending: socket.socket, running: Running, idle_s: float) -> None:
    """Wait for a signal, or until no process has been connected for so long; keep its link in place."""
    ends_at = math.inf
    while time.monotonic() < ends_at:
        if select.select([ending], [], [], min(_LOOK_S, idle_s))[0]:
            return
        running.look()
        is_idle = not running.server.num_clients
        ends_at = min(ends_at, time.monotonic() + idle_s) if is_idle else math.inf


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gpu_cache.rpc.node_cache", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--path", help=f"where consumers look for it (default: where {NODE_CACHE_VARIABLE}=auto has them look)"
    )
    parser.add_argument(
        "--max-bytes",
        type=option(parse_size),
        default=DEFAULT_MAX_BYTES,
        help='most memory for shards (default: "8GiB")',
    )
    parser.add_argument(
        "--idle-timeout",
        type=option(parse_seconds),
        default=math.inf,
        metavar="TIME",
        help='end when no process has been connected for so long, such as "10m" (default: stay)',
    )
    parser.add_argument("--log-level", default="INFO", choices=["DEBUG", "INFO", "WARNING", "ERROR"])
    return parser


if __name__ == "__main__":
    sys.exit(main())
