"""A backstop at the owner: it drops shards that were not cleared for very long."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from typing import Any, TypeVar

from gpu_cache.config import seconds
from gpu_cache.process import OwnThread
from gpu_cache.rpc.store import ShardStore

logger = logging.getLogger(__name__)

OptionT = TypeVar("OptionT")

_UNITS_S = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([smhd]?)\s*")
# How often it looks: so many times in a shard's life, but not all the time, and not so seldom that memory comes late.
_LOOKS_PER_LIFE = 10
_MIN_PERIOD_S, _MAX_PERIOD_S = 0.05, 10.0
_LOG_PERIOD_S = 60.0


def parse_seconds(text: float | str) -> float:
    """Seconds of a number, or of text such as "90", "10m", "2h", "1.5 d" or "inf".

    Raises:
        ValueError: Not a time, or none that could be meant.
    """
    match = _DURATION.fullmatch(str(text))
    try:
        found = float(match[1]) * _UNITS_S[match[2]] if match else float(str(text))
    except ValueError:
        found = 0.0
    if not found > 0.0:
        raise ValueError(f"{text!r} is not a time above 0; write seconds, or a number with s, m, h or d")
    return seconds(found)


def option(parse: Callable[[str], OptionT]) -> Callable[[str], OptionT]:
    """The parser of a command's option: argparse shows the words of this error, but not those of a `ValueError`."""

    def parsed(text: str) -> OptionT:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed


class ShardExpiry:
    """Drops shards of a store that are older than `ttl_s`, and counts them.

    A shard's age is the time since it was stored, whether or not a client reads it. One that is being sent is sent to
    its end.

    Args:
        store: The shards to look at.
        ttl_s: How old they may get, in seconds.
        evict: Drops shards from the owner's own cache too.
        now: Seconds, monotonic, of the clock by which the store dates its shards.
    Attributes:
        num_shards: Dropped so far.
        nbytes: The bytes of these shards.
    Thread-safety: any thread.
    """

    def __init__(
        self,
        store: ShardStore,
        ttl_s: float,
        evict: Callable[[Sequence[Any]], object],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.ttl_s = ttl_s
        self._store, self._evict, self._now = store, evict, now
        # Guards every field below.
        self._lock = threading.Lock()
        self.num_shards = self.nbytes = 0
        self._unsaid: list[tuple[Hashable, int]] = []  # dropped since the last line of the log
        self._says_at = float("-inf")

    def __repr__(self) -> str:
        return f"ShardExpiry(ttl_s={self.ttl_s:g}, {self.num_shards:,} shards of {self.nbytes:,} bytes dropped)"

    def sweep(self) -> int:
        """Drop what is too old by now; returns how many shards. Costs a look at the oldest one if there is nothing."""
        moment = self._now()
        dropped = self._store.remove_stored_before(moment - self.ttl_s)
        with self._lock:
            self.num_shards += len(dropped)
            self.nbytes += sum(nbytes for _, nbytes in dropped)
            self._unsaid += dropped
            said = self._unsaid if moment >= self._says_at else []
            if said:
                self._unsaid, self._says_at = [], moment + _LOG_PERIOD_S
        if said:
            self._say(said)
        if dropped:  # last: it is the caller's code
            self._evict([shard_id for shard_id, _ in dropped])
        return len(dropped)

    def _say(self, dropped: Sequence[tuple[Hashable, int]]) -> None:
        num_bytes = sum(nbytes for _, nbytes in dropped)
        logger.warning(
            "dropped %d shards of %s bytes that were not cleared for %g s (--shard-ttl), %r the first; %d so far",
            len(dropped), f"{num_bytes:,}", self.ttl_s, dropped[0][0], self.num_shards,
        )  # fmt: skip

    async def sweeping(self, app: object = None) -> AsyncIterator[None]:
        """Sweep for as long as an application runs, on threads of its loop's executor."""
        task = asyncio.create_task(self._sweep_for_ever())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    def sweep_in_thread(self) -> OwnThread:
        """Sweep until this process ends, for a server that has no event loop."""
        is_over = threading.Event()

        def sweep_for_ever() -> None:
            while not is_over.wait(self._period_s):
                self._try_to_sweep()

        thread = OwnThread(sweep_for_ever, "areal-shard-expiry", is_over.set)
        thread.start()
        return thread

    @property
    def _period_s(self) -> float:
        return min(max(self.ttl_s / _LOOKS_PER_LIFE, _MIN_PERIOD_S), _MAX_PERIOD_S)

    async def _sweep_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._period_s)
            await asyncio.to_thread(self._try_to_sweep)

    def _try_to_sweep(self) -> None:
        try:
            self.sweep()
        except Exception:  # top of a task, or of a thread: the next one may go better
            logger.exception("dropping old shards failed")
