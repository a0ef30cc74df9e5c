"""Events of a CUDA device: by raw calls of the runtime library, where events are used again, or torch's own.

Every call is made with the device already current, as in `CudaDevice._here`.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

from gpu_cache.device.cudart import NOT_READY, RawCalls

_DISABLE_TIMING = 2  # cudaEventDisableTiming
_MOST_LOOKS = 4  # at sets that were let go before they were seen done; then new events are made


class Events(Protocol):
    """How a device records, asks and waits for events. Any thread."""

    def record(self, stream: Any, *, timing: bool) -> Any:
        """A new event behind the work that is enqueued on a stream."""

    def record_all(self, streams: Sequence[Any]) -> list[Any]:
        """Events behind the work that is enqueued on streams. One event may stand for several streams."""

    def discard(self, events: Sequence[Any]) -> None:
        """Never ask these, nor record them again: a capture may have taken them in."""

    def has_seen(self, event: Any) -> bool:
        """Whether it was seen done before. Asks nothing of the device."""

    def query(self, event: Any) -> bool:
        """Whether it is done."""

    def synchronize(self, event: Any) -> None:
        """Wait until it is done."""

    def wait(self, stream: Any, event: Any) -> None:
        """Make a stream wait for it."""

    def elapsed_s(self, start: Any, end: Any) -> float:
        """Seconds between two that are timed and done."""

    def is_capturing(self, streams: Sequence[Any]) -> bool:
        """Whether a graph is being captured on one of the streams."""


class EventSet:
    """Events that were recorded together, one on each of some streams; done when all of them are.

    When the last reference to it goes, the events may be recorded again as soon as they are done.
    """

    __slots__ = ("_let_go", "handles", "num_done", "timing")

    def __init__(self, handles: list[int], timing: bool, let_go: deque[tuple[list[int], bool, int]]) -> None:
        self.handles, self.timing, self._let_go = handles, timing, let_go
        self.num_done = 0  # so many of the first ones are done; the worst that a race does is to ask twice

    def __len__(self) -> int:
        return len(self.handles)

    def __repr__(self) -> str:
        return f"EventSet({self.num_done} of {len(self)} done)"

    def __del__(self) -> None:
        # Nothing else: a collection may run it anywhere.
        self._let_go.append((self.handles, self.timing, self.num_done))


class RawEvents:
    """Events by raw calls: a set over all 129 streams of torch's costs 0.17 ms instead of 6.1, our measurement.

    It never calls `cudaStreamQuery`, nor `cuCtxRecordEvent` for one event behind all streams: either would break a
    capture.

    Args:
        raw: The calls.
    Thread-safety: any thread, by single operations of deques.
    """

    def __init__(self, raw: RawCalls) -> None:
        self._raw = raw
        self._idle: dict[bool, deque[int]] = {False: deque(), True: deque()}  # done and unreferenced, timed or not
        self._let_go: deque[tuple[list[int], bool, int]] = deque()  # unreferenced; the number tells how many are done
        self._handles: tuple[Sequence[Any], list[int]] = ((), [])  # handles of the streams that were last named

    def record(self, stream: Any, *, timing: bool) -> EventSet:
        return self._record([stream.cuda_stream], timing)

    def record_all(self, streams: Sequence[Any]) -> list[EventSet]:
        return [self._record(self._handles_of(streams), False)]

    def discard(self, events: Sequence[EventSet]) -> None:
        for one in events:
            one.handles = []

    def has_seen(self, event: EventSet) -> bool:
        return event.num_done == len(event.handles)

    def query(self, event: EventSet) -> bool:
        event.num_done = self._num_done(event.handles, event.num_done)
        return self.has_seen(event)

    def synchronize(self, event: EventSet) -> None:
        while not self.query(event):
            self._raw.check(self._raw.event_synchronize(event.handles[event.num_done]), "cudaEventSynchronize")

    def wait(self, stream: Any, event: EventSet) -> None:
        for handle in event.handles[event.num_done :]:
            self._raw.check(self._raw.stream_wait_event(stream.cuda_stream, handle, 0), "cudaStreamWaitEvent")

    def elapsed_s(self, start: EventSet, end: EventSet) -> float:
        milliseconds = ctypes.c_float()
        code = self._raw.event_elapsed_time(ctypes.byref(milliseconds), start.handles[0], end.handles[0])
        self._raw.check(code, "cudaEventElapsedTime")
        return milliseconds.value / 1e3

    def is_capturing(self, streams: Sequence[Any]) -> bool:
        return self._raw.is_capturing(self._handles_of(streams))

    def _record(self, streams: Sequence[int], timing: bool) -> EventSet:
        found = EventSet(self._take(len(streams), timing), timing, self._let_go)
        record = self._raw.event_record
        for handle, stream in zip(found.handles, streams, strict=True):
            if code := record(handle, stream):
                found.handles = []  # as `discard`: that may have been a capture's beginning
                self._raw.check(code, "cudaEventRecord")
        return found

    def _take(self, number: int, timing: bool) -> list[int]:
        """Events that are done and unreferenced, and new ones for what is missing."""
        idle = self._idle[timing]
        if len(idle) < number:
            self._reclaim()
        taken: list[int] = []
        with contextlib.suppress(IndexError):  # another thread took the rest
            while len(taken) < number:
                taken.append(idle.popleft())
        while len(taken) < number:
            handle = ctypes.c_void_p()
            code = self._raw.event_create(ctypes.byref(handle), 0 if timing else _DISABLE_TIMING)
            self._raw.check(code, "cudaEventCreateWithFlags")
            assert handle.value is not None
            taken.append(handle.value)
        return taken

    def _reclaim(self) -> None:
        """Look which of the sets that were let go are done."""
        num_looks = 0
        with contextlib.suppress(IndexError):
            for _ in range(len(self._let_go)):
                handles, timing, num_done = self._let_go.popleft()
                num_looks += num_done < len(handles)
                if num_looks <= _MOST_LOOKS:
                    num_done = self._num_done(handles, num_done)
                if num_done == len(handles):
                    self._idle[timing].extend(handles)
                else:
                    self._let_go.append((handles, timing, num_done))

    def _num_done(self, handles: Sequence[int], num_done: int) -> int:
        """How many of the first ones are done, at least `num_done`."""
        query = self._raw.event_query
        while num_done < len(handles):
            if code := query(handles[num_done]):
                self._raw.clear()  # "not ready" is an error to the next kernel launch, too
                if code != NOT_READY:
                    raise RuntimeError(f"cudaEventQuery: CUDA error {code}")
                break
            num_done += 1
        return num_done

    def _handles_of(self, streams: Sequence[Any]) -> list[int]:
        """Handles of the fence's streams, which are the same sequence most of the time."""
        named, handles = self._handles
        if named is not streams:
            handles = [stream.cuda_stream for stream in streams]
            if len(handles) > 1:
                self._handles = streams, handles
        return handles


class TorchEvents:
    """Events by torch's own objects, where the runtime library cannot be called."""

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda

    def record(self, stream: Any, *, timing: bool) -> Any:
        event = self._cuda.Event(enable_timing=timing)
        event.record(stream)
        return event

    def record_all(self, streams: Sequence[Any]) -> list[Any]:
        return [self.record(stream, timing=False) for stream in streams]

    def discard(self, events: Sequence[Any]) -> None:
        pass

    def has_seen(self, event: Any) -> bool:
        return False

    def query(self, event: Any) -> bool:
        return bool(event.query())

    def synchronize(self, event: Any) -> None:
        event.synchronize()

    def wait(self, stream: Any, event: Any) -> None:
        stream.wait_event(event)

    def elapsed_s(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) / 1e3

    def is_capturing(self, streams: Sequence[Any]) -> bool:
        return any(map(self._is_capturing, streams))

    def _is_capturing(self, stream: Any) -> bool:
        with self._cuda.stream(stream):
            return bool(self._cuda.is_current_stream_capturing())
