"""A reader whose answers are timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence

from gpu_cache.ranges import FETCH, profiled
from gpu_cache.source import ShardReader, ShardSpec


class MeteredReader:
    """Another `ShardReader`, and how long each of its parts took.

    Args:
        inner: Does the work.
        on_answer: Told the node, and the seconds from the request for a part to its last byte; not of one that failed.
    """

    def __init__(
        self,
        inner: ShardReader,
        on_answer: Callable[[str, float], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._inner, self._on_answer, self._now = inner, on_answer, now
        self._began: float | None = None  # the part under way; None between two, and after a failure
        self._ended = 0.0  # its latest read

    @property
    def node(self) -> str:
        return self._inner.node

    @property
    def keys(self) -> Sequence[Hashable]:
        return self._inner.keys

    @property
    def failures(self) -> Mapping[Hashable, Exception]:
        return self._inner.failures

    @property
    def num_received(self) -> int | None:
        return getattr(self._inner, "num_received", None)

    def next_specs(self) -> Sequence[ShardSpec] | None:
        """Pass it on; the part before it is complete."""
        self._tell()
        began = self._now()
        with profiled(FETCH):
            specs = self._inner.next_specs()
        if specs is not None:
            self._began, self._ended = began, self._now()
        return specs

    def read_into(self, buffers: Sequence[memoryview]) -> None:
        """Pass it on."""
        began, self._began = self._began, None
        with profiled(FETCH):
            self._inner.read_into(buffers)
        self._began, self._ended = began, self._now()

    def cancel(self) -> None:
        """Pass it on."""
        self._inner.cancel()

    def close(self) -> None:
        """Pass it on; the last part is complete, unless it failed."""
        self._tell()
        self._inner.close()

    def _tell(self) -> None:
        began, self._began = self._began, None
        if began is not None:
            self._on_answer(self.node, self._ended - began)
