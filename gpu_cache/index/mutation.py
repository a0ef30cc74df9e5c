"""Shards that a reader wrote into: what becomes of them, and what is said of it.

Every tensor handed out is a detached alias of one base, and those share torch's version counter: each operation in
place through any of them, as far as torch knows of it, is counted on the base.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterable, Mapping

from gpu_cache.config import MutationPolicy
from gpu_cache.errors import MutatedError
from gpu_cache.index.entry import Entry
from gpu_cache.throttle import Throttle

logger = logging.getLogger(__name__)

_REMEDY = "clone a tensor before writing into it, see on_mutation (GPU_CACHE_ON_MUTATION)"
DOUBTED = -1  # a version that no tensor has


class Doubts:
    """What an index does about entries that were written to. Has no lock: the index calls it under its own.

    The `tell_*` methods log, so they are called outside of it; each kind of line comes once a minute at most.

    Args:
        policy: As `CacheConfig.on_mutation`.
        now: Seconds, monotonic.
    Attributes:
        is_on: Whether hand-outs look for writes at all.
        num_found: Shards found changed.
    """

    def __init__(self, policy: MutationPolicy = "ignore", now: Callable[[], float] = time.monotonic) -> None:
        self.is_on, self.is_error = policy != "ignore", policy == "error"
        self.num_found = 0
        self._now = now
        self._gates: dict[str, Throttle] = {}
        self._num_untold: dict[str, int] = {}

    def refuse_changed(self, entries: Mapping[Hashable, Entry], keys: Iterable[Hashable]) -> list[Hashable]:
        """The keys, if nobody wrote into any of them.

        Raises:
            MutatedError: Somebody did.
        """
        wanted = list(keys)
        if changed := [key for key in wanted if (entry := entries.get(key)) is not None and entry.is_changed]:
            self.num_found += len(changed)
            raise MutatedError(changed)
        return wanted

    def wants_refetch(self, entry: Entry) -> bool:
        """Whether the next call that has a source will fetch it anew."""
        return self.is_on and not self.is_error and entry.is_fetch and entry.is_changed

    def found_without_source(self, entries: Mapping[Hashable, Entry], entry: Entry) -> None:
        """A changed entry is asked for by a call that cannot fetch; one with a source will, later.

        Raises:
            MutatedError: As for `refuse_changed`.
        """
        if self.is_error:
            self.refuse_changed(entries, [entry.key])
        if not entry.is_fetch:
            self.accept(entry)

    def accept(self, entry: Entry) -> None:
        """Nobody has the original of a changed entry: what is there is handed out, from now on without a word."""
        place = entry.place
        assert place.counted is not None
        place.version, entry.checksum, entry.is_accepted = place.counted._version, None, True
        self.num_found += 1

    def revive(self, entry: Entry) -> bool:
        """Give an entry that could not be fetched what it was to replace; whether it may be indexed."""
        suspect, entry.suspect = entry.suspect, None
        assert suspect is not None
        entry.base, entry.loan, entry.lease = suspect.base, suspect.loan, suspect.lease
        entry.completion, entry.nbytes = suspect.completion, suspect.nbytes
        entry.parked, entry.promise = suspect.parked, suspect.promise
        self.accept(entry)
        lease = entry.place.lease
        return lease is None or lease() is not None  # else its storage was swapped meanwhile

    def tell_changed(self, entry: Entry) -> None:
        """Another generation of it was fetched, and the bytes differ."""
        self._tell(
            "changed", entry, "its bytes are no longer those of its source: it was fetched again, and readers get the "
            "original from now on"
        )  # fmt: skip

    def tell_unknown(self, entry: Entry, error: Exception) -> None:
        """Another generation of it was fetched, and the device could not compare them."""
        self._tell("unknown", entry, f"it was fetched again; whether bytes changed is not known ({error})")

    def tell_kept(self, entries: Iterable[Entry], error: BaseException) -> None:
        """They could not be fetched again."""
        for entry in entries:
            self._tell("kept", entry, f"it could not be fetched again ({error}): what is there is handed out")

    def tell_unverified(self, entries: Iterable[Entry]) -> None:
        """There is nothing to fetch them from: they were put, or asked for by `get`."""
        for entry in entries:
            why = "`get` has no source to fetch it from again" if entry.is_fetch else "it was put, and has no source"
            self._tell("unverified", entry, f"{why}: what is there is handed out")

    def _tell(self, kind: str, entry: Entry, what: str) -> None:
        if not self._gates.setdefault(kind, Throttle(now=self._now)).opens():
            self._num_untold[kind] = self._num_untold.get(kind, 0) + 1
            return
        others = self._num_untold.pop(kind, 0)
        logger.warning(
            "shard %r (%s bytes from %s) was written to in place: %s%s; %s",
            entry.key,
            f"{entry.nbytes:,}",
            entry.node or "this process",
            what,
            f" ({others:,} more such since the last of these lines)" if others else "",
            _REMEDY,
        )
