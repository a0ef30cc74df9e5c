"""The owner's memory that other processes of this host may map: memfd segments, cut into ranges, and used again.

A range lives as long as any alias of its bytes does: the array that the owner got, tensors and buffers made of it, and
a connection that holds the shard for a reader. Only then is it given to another shard. So no reader ever sees bytes
change under it because a shard was cleared.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import fcntl
import itertools
import logging
import os
import stat
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_cache.config import is_off, says_yes
from gpu_cache.device.hostmem import POPULATE_WRITE, advise, mapped
from gpu_cache.pool.block import aligned
from gpu_cache.pool.freelist import FreeList
from gpu_cache.pool.high_water import HighWater
from gpu_cache.process import forget_sockets, leave_to_parent, no_interrupts
from gpu_cache.report.files import problem_of
from gpu_cache.throttle import Throttle

VARIABLE = "GPU_CACHE_SHM"  # 0: neither offer shared memory nor read it
NODE_CACHE_VARIABLE = "GPU_CACHE_NODE_CACHE"  # the path at which a node cache is found; auto: the usual one
_NODE_CACHE = "node-cache"
_FOLDER = "gpu-cache-memory-"  # begins the names of folders for sockets; the user's number follows
MAX_PATH = 100  # bytes of a socket's path; the system takes 107
SEGMENT_BYTES = 256 << 20
# The first one; each further one doubles what there is, up to SEGMENT_BYTES. A consumer's GPU driver takes all pages
# of a segment that it registers.
FIRST_BYTES = 16 << 20
_FUTURE_WRITE = 0x0010  # F_SEAL_FUTURE_WRITE, Linux 5.1 and later: no writable mapping but those that are there
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _FUTURE_WRITE | fcntl.F_SEAL_SEAL
_CHUNK_BYTES = 1 << 20  # pages are taken in such steps

logger = logging.getLogger(__name__)


def is_wanted(environ: Mapping[str, str] | None = None) -> bool:
    """Whether this process offers its shards in shared memory, and reads those of others there.

    Raises:
        ValueError: The variable says neither yes nor no.
    """
    return says_yes(VARIABLE, environ, default=True)


def node_cache_path(environ: Mapping[str, str] | None = None) -> str:
    """Where consumers look for a node cache: a link to its socket. "" for nowhere, the default.

    Raises:
        ValueError: The variable holds a word that is neither "auto" nor no.
    """
    said = (os.environ if environ is None else environ).get(NODE_CACHE_VARIABLE, "").strip()
    if not said or is_off(said):
        return ""
    if said.lower() != "auto":
        if "/" not in said:
            raise ValueError(f"{NODE_CACHE_VARIABLE}={said!r}: must be auto, a path with a slash in it, or 0 for none")
        return said
    try:
        return str(socket_folder(environ) / _NODE_CACHE)
    except OSError as error:
        logger.info("no node cache is looked for: no folder for its socket (%s)", str(error))
        return ""


class Range(weakref.ref[Any]):
    """A range that is in use; dies with the last alias of its array."""

    __slots__ = ("nbytes", "segment", "start")

    segment: Segment
    start: int
    nbytes: int  # whole alignment steps

    __hash__, __eq__ = object.__hash__, object.__eq__  # not the array's

    @classmethod
    def of(cls, memory: Any, segment: Segment, start: int, nbytes: int, freed: Callable[[Any], None]) -> Range:
        """Note who uses a range.

        Args:
            memory: Its array.
            segment: Where it lies.
            start: Its first byte there.
            nbytes: Its length.
            freed: Told this object when the array is dead; on any thread, so it takes no lock.
        """
        lease = cls(memory, freed)
        lease.segment, lease.start, lease.nbytes = segment, start, nbytes
        return lease


class Segment:
    """One sealed memfd: only this process can write, and no process can resize it.

    Raises:
        OSError: The system has none, or does not seal it so.
    """

    def __init__(self, number: int, nbytes: int) -> None:
        self.number, self.nbytes = number, nbytes
        self.descriptor = os.memfd_create("gpu-cache-shards", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.descriptor, nbytes)
            self.memory = mapped(self.descriptor, nbytes, is_writable=True)
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(self.descriptor)
            raise
        self.address = self.memory.ctypes.data
        self.free = FreeList(nbytes)
        self.leases: set[Range] = set()
        self._is_present = bytearray(nbytes // _CHUNK_BYTES)

    def populate(self, start: int, nbytes: int) -> None:
        """Take the pages of a range now: later, a system without memory would end the process.

        Raises:
            OSError: There is not that much memory.
        """
        first, last = start // _CHUNK_BYTES, -(-(start + nbytes) // _CHUNK_BYTES)
        absent = [chunk for chunk in range(first, last) if not self._is_present[chunk]]
        if not absent:
            return
        begin, end = absent[0] * _CHUNK_BYTES, (absent[-1] + 1) * _CHUNK_BYTES
        if (code := advise(self.address + begin, end - begin, POPULATE_WRITE)) not in (0, errno.EINVAL):
            raise OSError(code, f"{os.strerror(code)}: {end - begin:,} bytes of shared memory")
        self._is_present[absent[0] : absent[-1] + 1] = bytes([1]) * (absent[-1] + 1 - absent[0])

    def close(self) -> None:
        """Give it back to the system, as far as this process keeps it. Nothing of it is in use."""
        os.close(self.descriptor)


class Segments:
    """The segments of one owner, taken as they are needed, and kept for the next step.

    It keeps the segments that the latest steps used: a fresh page costs as much as two copies into it. Without shared
    memory (another system, an older kernel, `GPU_CACHE_SHM=0`) `take` gives nothing, and shards live in plain memory.

    Attributes:
        on_growth: Called after a segment was taken, by the thread that stores; set before the first.
    Thread-safety: any thread. Maps, populates and closes outside the lock.
    Source: our measurement; first writes into a memfd 1.7 GB/s, later ones as fast as any memory.
    """

    def __init__(
        self, is_wanted: Callable[[], bool] = is_wanted, make: Callable[[int, int], Segment] = Segment
    ) -> None:
        self._is_wanted, self._make = is_wanted, make
        self.on_growth: Callable[[], object] = lambda: None
        self._numbers = itertools.count(1)
        self._warnings = Throttle()
        self._freed: deque[Range] = deque()  # appended to by any thread, in the middle of anything
        # Guards every field below, and the free lists and leases of segments.
        self._lock = threading.Lock()
        self._segments: dict[int, Segment] = {}  # by number
        self._places: list[tuple[int, Segment]] = []  # by address
        self._used_bytes = self._reserved_bytes = 0
        self._high_water = HighWater()
        self._is_inherited = False
        leave_to_parent(self)

    def __repr__(self) -> str:
        with self._lock:
            used, reserved = self._used_bytes, self._reserved_bytes
            return f"Segments({used:,} of {reserved:,} bytes in use, {len(self._segments)} segments)"

    def take(self, sizes: Sequence[int]) -> list[Any]:
        """Memory for shards that are stored together, side by side: one range, or a few where they fill segments.

        Args:
            sizes: In bytes, each at least 1.
        Returns:
            An array for each, `(nbytes,)` uint8; the range is in use for as long as any alias of it lives. None for
            each that has to live in plain memory.
        """
        found: list[Any] = []
        for together in _batches(sizes):
            with no_interrupts:
                found += self._take_batch(together) or [None] * len(together)
        return found

    def locate(self, address: int, nbytes: int) -> tuple[int, int] | None:
        """The segment's number, and the place in it, of bytes of this process; None where they lie in none."""
        with self._lock:
            at = bisect.bisect_right(self._places, address, key=lambda place: place[0]) - 1
            if at < 0:
                return None
            begin, segment = self._places[at]
        offset = address - begin
        return (segment.number, offset) if offset + nbytes <= segment.nbytes else None

    def settle(self, *, ends_step: bool = False) -> None:
        """Give back what nothing uses any more.

        Args:
            ends_step: Whether shards were cleared: then segments go that the latest steps had no use for.
        """
        with no_interrupts:
            with self._lock:
                self._gather_locked()
                self._high_water.pass_time(self._used_bytes)
                is_over = ends_step and self._high_water.clear(self._used_bytes)
                unused = self._surplus_locked() if is_over else []
            for segment in unused:
                segment.close()

    def trim(self) -> bool:
        """Give every segment back that nothing uses; whether there was one."""
        with no_interrupts:
            with self._lock:
                self._gather_locked()
                self._high_water.rest()
                unused = self._surplus_locked()
            for segment in unused:
                segment.close()
            return bool(unused)

    def descriptors(self, numbers: Sequence[int]) -> list[tuple[int, int, int]]:
        """Number, length and descriptor of segments; those that hold the shards of the caller stay open."""
        with self._lock:
            found = [self._segments[number] for number in numbers]
        return [(segment.number, segment.nbytes, segment.descriptor) for segment in found]

    def numbers(self) -> list[int]:
        """Of the segments that there are."""
        with self._lock:
            return list(self._segments)

    def stats(self) -> dict[str, int]:
        """`shared_bytes` in use, and `shared_reserved_bytes` taken from the system, of one moment."""
        with no_interrupts, self._lock:
            self._gather_locked()
            return {"shared_bytes": self._used_bytes, "shared_reserved_bytes": self._reserved_bytes}

    def reported(self) -> dict[str, int]:
        """The same for the report of this process; nothing if it has taken none."""
        return found if (found := self.stats())["shared_reserved_bytes"] else {}

    def disown(self) -> object:
        """Close the descriptors in a forked child, where the lock may be held for good, and offer nothing there."""
        self._lock, self._is_inherited = threading.Lock(), True
        forget_sockets(segment.descriptor for segment in self._segments.values())
        kept, self._segments, self._places = (self._segments, self._places), {}, []
        return kept

    def _take_batch(self, sizes: Sequence[int]) -> list[Any] | None:
        """Arrays in one range; None without shared memory."""
        nbytes = sum(map(aligned, sizes))
        try:
            place = self._reserve(nbytes)
            if place is None:
                return None
            self._populate(*place, nbytes)
        except OSError as error:
            if self._warnings.opens():
                text = "shards go to plain memory, where no other process can read them: %s"
                logger.warning(text, str(error))  # a log that kept the error would keep the caller's frames
            return None
        return self._leased(*place, sizes)

    def _reserve(self, nbytes: int) -> tuple[Segment, int] | None:
        while not self._is_inherited and self._is_wanted() and hasattr(os, "memfd_create"):
            with self._lock:
                self._gather_locked()
                if (place := self._take_locked(nbytes)) is not None:
                    return place
                grown = max(min(self._reserved_bytes, SEGMENT_BYTES), FIRST_BYTES, nbytes)
            segment = self._make(next(self._numbers), -(-grown // _CHUNK_BYTES) * _CHUNK_BYTES)
            with self._lock:
                self._segments[segment.number] = segment
                bisect.insort(self._places, (segment.address, segment), key=lambda place: place[0])
                self._reserved_bytes += segment.nbytes
            self.on_growth()
        return None

    def _populate(self, segment: Segment, start: int, nbytes: int) -> None:
        try:
            segment.populate(start, nbytes)
        except BaseException:
            with self._lock:
                self._give_locked(segment, start, nbytes)
            raise

    def _leased(self, segment: Segment, start: int, sizes: Sequence[int]) -> list[Any]:
        arrays, freed = [], self._freed.append
        leases = []
        for nbytes in sizes:
            memory = segment.memory[start : start + nbytes]
            leases.append(Range.of(memory, segment, start, aligned(nbytes), freed))
            arrays.append(memory)
            start += aligned(nbytes)
        with self._lock:
            segment.leases.update(leases)
        return arrays

    def _take_locked(self, nbytes: int) -> tuple[Segment, int] | None:
        for segment in self._segments.values():
            if (start := segment.free.take(nbytes)) is not None:
                self._used_bytes += nbytes
                in_use = sum(one.nbytes for one in self._segments.values() if not one.free.is_empty)
                self._high_water.note(in_use, self._used_bytes, nbytes)
                return segment, start
        return None

    def _give_locked(self, segment: Segment, start: int, nbytes: int) -> None:
        segment.free.give(start, nbytes)
        self._used_bytes -= nbytes

    def _gather_locked(self) -> None:
        """Take back what was freed; neighbours that died one after the other go back as one range."""
        segment: Segment | None = None
        start = end = 0
        with contextlib.suppress(IndexError):
            while True:
                lease = self._freed.popleft()
                lease.segment.leases.discard(lease)
                if lease.segment is segment and lease.start == end:
                    end += lease.nbytes
                elif lease.segment is segment and lease.start + lease.nbytes == start:
                    start = lease.start  # a list drops its items from the last to the first
                else:
                    if segment is not None:
                        self._give_locked(segment, start, end - start)
                    segment, start, end = lease.segment, lease.start, lease.start + lease.nbytes
        if segment is not None:
            self._give_locked(segment, start, end - start)

    def _surplus_locked(self) -> list[Segment]:
        """Unused segments beyond what is kept, the smallest first; forgotten here."""
        unused = []
        for segment in sorted(self._segments.values(), key=lambda one: one.nbytes):
            if segment.free.is_empty and self._reserved_bytes - segment.nbytes >= self._high_water.nbytes:
                unused.append(segment)
                self._reserved_bytes -= segment.nbytes
                del self._segments[segment.number]
                self._places.remove((segment.address, segment))
        return unused


def _batches(sizes: Sequence[int]) -> list[list[int]]:
    """Sizes, in order, so grouped that each group fits a segment; what is longer is alone."""
    groups: list[list[int]] = []
    left = 0
    for nbytes in sizes:
        if aligned(nbytes) > left:
            groups.append([])
            left = SEGMENT_BYTES
        groups[-1].append(nbytes)
        left -= aligned(nbytes)
    return groups


def leads_to_socket(link: Path) -> bool:
    """Whether it is a link to a socket in a folder for sockets, though the socket may be gone."""
    return link.is_symlink() and link.readlink().parent.name.startswith(_FOLDER)


def socket_folder(environ: Mapping[str, str] | None = None) -> Path:
    """A folder for sockets that only this user enters, made if need be.

    Raises:
        OSError: There is none.
    """
    given = (os.environ if environ is None else environ).get("XDG_RUNTIME_DIR", "")
    problems = []
    for base in dict.fromkeys([given, tempfile.gettempdir(), "/tmp"]):
        path = Path(base, f"{_FOLDER}{os.geteuid()}")
        if not base or len(os.fsencode(path)) > MAX_PATH - 40 or not os.path.isdir(base):
            continue
        try:
            with contextlib.suppress(FileExistsError):
                path.mkdir(0o700)
            found = os.lstat(path)
            problem = problem_of(found, None)
            if problem is None and not stat.S_IMODE(found.st_mode) & 0o077:
                return path
            problems.append(f"{path} {problem or 'lets others in'}")
        except OSError as error:
            problems.append(str(error))
    raise OSError(errno.EACCES, "; ".join(problems) or "there is no folder for a socket")
