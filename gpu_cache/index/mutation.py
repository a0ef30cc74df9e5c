"""The policy about shards that a reader wrote into."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from gpu_cache.config import MutationPolicy
from gpu_cache.errors import MutatedError
from gpu_cache.index.entry import Entry
from gpu_cache.throttle import Throttle

logger = logging.getLogger(__name__)

REMEDY = "clone a tensor before writing into it, see on_mutation (GPU_CACHE_ON_MUTATION)"
DOUBTED = -1  # a version that no tensor has


class Mutations:
    """The policy about entries that a reader wrote into, and their count.

    Args:
        policy: As `CacheConfig.on_mutation`.
        now: Seconds, monotonic.
    Attributes:
        is_on: Whether hand-outs look for writes at all.
        num_found: Shards found changed. Guarded by the index lock.
    Thread-safety: the index calls `found` under its lock, and `tell`, which logs, outside of it. The worst that a
        race in `tell` does is a second line, or a count that lacks some.
    """

    def __init__(self, policy: MutationPolicy = "ignore", now: Callable[[], float] = time.monotonic) -> None:
        self.is_on, self.is_error = policy != "ignore", policy == "error"
        self.num_found = 0
        self._gate = Throttle(now=now)
        self._num_untold = 0

    def found(self, changed: list[Entry]) -> None:
        """Count entries that were found changed.

        Raises:
            MutatedError: There are some, and the policy is "error". The list is empty then: a kept error keeps its
                frames, which must not keep blocks.
        """
        self.num_found += len(changed)
        if changed and self.is_error:
            keys = [entry.key for entry in changed]
            changed.clear()
            raise MutatedError(keys)

    def tell(self, dropped: Sequence[Entry]) -> None:
        """Warn of entries that were dropped because a reader wrote into them; one line a minute at most."""
        if not self._gate.opens():
            self._num_untold += len(dropped)
            return
        others, self._num_untold = self._num_untold + len(dropped) - 1, 0
        logger.warning(
            "shard %r (%s bytes from %s) was written to in place: it is no longer cached, and the next reader gets the "
            "original bytes%s; %s",
            dropped[0].key,
            f"{dropped[0].nbytes:,}",
            dropped[0].node or "this process",
            f" ({others:,} more such since the last of these lines)" if others else "",
            REMEDY,
        )
