"""A strict stand-in for `libcudart`, as `ctypes` shows it: function pointers, so that types matter as they do there.

A function whose argument types were not set gets handles cut to 32 bits, which no stream and no event has. A fault
that a GPU would not report at the call is a violation, for tests to look at. Calls are counted by name.
"""

from __future__ import annotations

import ctypes
import itertools
from collections import Counter
from collections.abc import Callable
from ctypes import PYFUNCTYPE, c_int, c_size_t, c_uint, c_void_p
from typing import Any

from tests.support.fake_cuda_objects import FakeEvent, FakeStream

_INVALID_VALUE, _INVALID_HANDLE, _NOT_READY, _CAPTURE_UNSUPPORTED = 1, 400, 600, 900
_CAPTURED_EVENT, _NEWER_DRIVER_NEEDED, _UNKNOWN = 907, 36, 999
_FIRST_HANDLE = 0x7E57_0000_1000
_IN_STREAM_ORDER, _DEFAULT_KIND = 1, 4


class RawEvent:
    """An event made by a raw call; each record of it is an event of its own to those who wait for it."""

    def __init__(self, handle: int, timing: bool, device: int) -> None:
        self.handle, self.timing, self.device = handle, timing, device
        self.recorded: FakeEvent | None = None
        self.is_captured = False


class FakeLibrary:
    """One mapped runtime library.

    Args:
        cuda: The fake module that it belongs to.
        version: As `cudaRuntimeGetVersion` tells it; decides the form of `cudaMemcpyBatchAsync`.
        missing: Names of functions that it does not have.
        batches: Whether the driver knows batches of copies.
    """

    def __init__(self, cuda: Any, version: int = 13_000, missing: tuple[str, ...] = (), batches: bool = True) -> None:
        self.calls: Counter[str] = Counter()
        self.batches = batches
        self.events: dict[int, RawEvent] = {}
        self._cuda, self._version = cuda, version
        self._handles = itertools.count(_FIRST_HANDLE, 0x40)
        batch = [c_void_p, c_void_p, c_void_p, c_size_t, c_void_p, c_void_p, c_size_t, c_void_p]
        forms: dict[str, tuple[Callable[..., int], list[Any]]] = {
            "cudaGetLastError": (cuda._get_last_error, []),
            "cudaThreadExchangeStreamCaptureMode": (cuda._exchange_capture_mode, [c_void_p]),
            "cudaRuntimeGetVersion": (self._runtime_version, [c_void_p]),
            "cudaEventCreateWithFlags": (self._event_create, [c_void_p, c_uint]),
            "cudaEventRecord": (self._event_record, [c_void_p, c_void_p]),
            "cudaEventQuery": (self._event_query, [c_void_p]),
            "cudaEventSynchronize": (self._event_synchronize, [c_void_p]),
            "cudaEventElapsedTime": (self._event_elapsed, [c_void_p, c_void_p, c_void_p]),
            "cudaStreamWaitEvent": (self._stream_wait, [c_void_p, c_void_p, c_uint]),
            "cudaStreamIsCapturing": (self._is_capturing, [c_void_p, c_void_p]),
            "cudaMemcpyAsync": (self._copy, [c_void_p, c_void_p, c_size_t, c_int, c_void_p]),
        }
        if version >= 12_080:
            index = [c_void_p] if version < 13_000 else []
            forms["cudaMemcpyBatchAsync"] = (self._copy_batch, [*batch[:-1], *index, c_void_p])
        self._kept = []
        process = ctypes.PyDLL(None)
        for name, (function, arguments) in forms.items():
            if name not in missing:
                pointer = PYFUNCTYPE(c_int, *arguments)(self._counted(name, function))
                self._kept.append(pointer)
                setattr(self, name, process._FuncPtr(ctypes.cast(pointer, c_void_p).value))

    def _counted(self, name: str, function: Callable[..., int]) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            self.calls[name] += 1
            try:
                code = function(*(0 if one is None else one for one in arguments))
            except Exception as error:  # which a callback cannot raise
                self._cuda.violations.append(f"{name}: {type(error).__name__}: {error}")
                code = _UNKNOWN
            if code and name != "cudaGetLastError":
                self._cuda.thread.sticky_error = code
            return code

        return call

    def _violated(self, what: str, code: int) -> int:
        self._cuda.violations.append(what)
        return code

    def _device(self) -> int:
        """The current one, which has a context from now on."""
        self._cuda.contexts.add(self._cuda.thread.device)
        return int(self._cuda.thread.device)

    def _stream(self, handle: int) -> FakeStream | None:
        return self._cuda.stream_of(handle, self._device())

    def _runtime_version(self, answer: int) -> int:
        c_int.from_address(answer).value = self._version
        return 0

    def _event_create(self, answer: int, flags: int) -> int:
        handle = next(self._handles)
        self.events[handle] = RawEvent(handle, not flags & 2, self._device())
        c_void_p.from_address(answer).value = handle
        return 0

    def _event_record(self, event: int, stream: int) -> int:
        one, on = self.events.get(event), self._stream(stream)
        if one is None or on is None or one.device != on.device.index:
            return self._violated(f"recorded event {event:#x} on stream {stream:#x}: no such", _INVALID_HANDLE)
        if one.recorded is not None and one.recorded.done_at_ms is None and not one.is_captured:
            return self._violated("an event was recorded again before it was done", _INVALID_VALUE)
        one.is_captured = on in self._cuda.captures
        one.recorded = FakeEvent(self._cuda, one.timing)
        if not one.is_captured:
            one.recorded.record(on)
        return 0

    def _asked(self, event: int) -> tuple[int, FakeEvent | None]:
        """The immediate answer to a query or a wait by the host."""
        self._device()
        one = self.events.get(event)
        if one is None:
            return self._violated(f"asked event {event:#x}: no such", _INVALID_HANDLE), None
        if one.is_captured:
            return self._violated("asked an event that a capture took in", _CAPTURED_EVENT), None
        if one.recorded is None:
            return self._violated("asked an event that was never recorded", _INVALID_VALUE), None
        if self._cuda.is_forbidden_by_capture():
            return _CAPTURE_UNSUPPORTED, None
        return 0, one.recorded

    def _event_query(self, event: int) -> int:
        code, recorded = self._asked(event)
        return code or (_NOT_READY if recorded is not None and recorded.done_at_ms is None else 0)

    def _event_synchronize(self, event: int) -> int:
        code, recorded = self._asked(event)
        if recorded is not None:
            self._cuda.advance()
            if recorded.done_at_ms is None:
                return self._violated("waited for an event that can never be done", _UNKNOWN)
        return code

    def _event_elapsed(self, answer: int, start: int, end: int) -> int:
        times = []
        for handle in (start, end):
            one = self.events.get(handle)
            if one is None or not one.timing or one.recorded is None:
                return self._violated("timed an event that is not", _INVALID_HANDLE)
            if one.recorded.done_at_ms is None:
                return _NOT_READY
            times.append(one.recorded.done_at_ms)
        ctypes.c_float.from_address(answer).value = times[1] - times[0]
        return 0

    def _stream_wait(self, stream: int, event: int, flags: int) -> int:
        one, on = self.events.get(event), self._stream(stream)
        if one is None or on is None or one.recorded is None or flags:
            return self._violated(f"stream {stream:#x} waits for event {event:#x}: no such", _INVALID_HANDLE)
        if one.is_captured or on in self._cuda.captures:
            return self._violated("a wait across a capture's border", _CAPTURE_UNSUPPORTED)
        self._cuda.queue(on).append(("wait", one.recorded))
        return 0

    def _is_capturing(self, stream: int, answer: int) -> int:
        on = self._stream(stream)
        if on is None:
            return self._violated(f"asked stream {stream:#x}: no such", _INVALID_HANDLE)
        if not stream and self._cuda.implicit_capture:
            return 906
        c_int.from_address(answer).value = int(on in self._cuda.captures)
        return 0

    def _copy(self, dst: int, src: int, nbytes: int, kind: int, stream: int) -> int:
        on = self._stream(stream)
        if on is None or kind != _DEFAULT_KIND or not nbytes:
            return self._violated(f"a copy of {nbytes} bytes of kind {kind} on stream {stream:#x}", _INVALID_VALUE)
        if on in self._cuda.captures:
            return self._violated("copied into a graph", _CAPTURE_UNSUPPORTED)
        if self._cuda.thread.sticky_error:
            return self._violated("a copy meets the error of an earlier call", _UNKNOWN)
        if not all(self._cuda.is_known(address, nbytes) for address in (dst, src)):
            return self._violated("a raw copy of pageable memory, which waits with the GIL kept", _INVALID_VALUE)
        ctypes.memmove(dst, src, nbytes)
        self._cuda.copies.append(on)
        return 0

    def _copy_batch(
        self,
        dsts: int,
        srcs: int,
        sizes: int,
        count: int,
        attributes: int,
        indices: int,
        num_attributes: int,
        *rest: int,
    ) -> int:
        *index, stream = rest
        if not self.batches:
            return _NEWER_DRIVER_NEEDED
        form = (c_uint.from_address(attributes).value, c_size_t.from_address(indices).value, num_attributes)
        if form != (_IN_STREAM_ORDER, 0, 1) or not stream or not count or 0 in index:
            return self._violated(f"a batch of {count} copies of the form {form}", _INVALID_VALUE)
        words = c_size_t * count
        copies = zip(*(words.from_address(address) for address in (dsts, srcs, sizes)), strict=True)
        return next((code for one in copies if (code := self._copy(*one, _DEFAULT_KIND, stream))), 0)
