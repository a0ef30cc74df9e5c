"""The CUDA runtime library: pinning, sticky errors, captures in other threads, torch's streams, events and copies.

Everything here gets torch's CUDA module as an argument, and is called with the device already current.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context, not only the registering thread's
_READ_ONLY = 8  # cudaHostRegisterReadOnly: of pages that this process cannot write
_TURN_S = 10.0  # longest wait for another process that registers
_THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal
_DEFAULT = 4  # cudaMemcpyDefault: the addresses tell the direction
_IN_STREAM_ORDER = 1  # cudaMemcpySrcAccessOrderStream: the source is read when the stream gets there
_FIRST_BATCHED, _FIRST_WITHOUT_INDEX = 12_080, 13_000  # runtimes with cudaMemcpyBatchAsync, and with its later form

NOT_READY = 600  # cudaErrorNotReady
_CAPTURE_IMPLICIT = 906  # cudaErrorStreamCaptureImplicit: the default stream would wait for a captured one

_CURRENT_STREAM = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # only in a CUDA build

_log = logging.getLogger(__name__)


class RawCalls:
    """Functions of the runtime library, with the types of their arguments: without those ctypes cuts handles.

    Args:
        library: Called with the GIL kept: a call takes about a microsecond, but a busy thread may keep the GIL for
            5 ms.
        waiting: The same, for calls that wait: they let go of the GIL.
    Raises:
        AttributeError: A function is missing.
    Thread-safety: any thread. The device must be current, as these calls would make a context on another one.
    """

    def __init__(self, library: Any, waiting: Any) -> None:
        pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
        numbers = ctypes.POINTER(number)
        self.event_create = _typed(library, "cudaEventCreateWithFlags", ctypes.POINTER(pointer), ctypes.c_uint)
        self.event_record = _typed(library, "cudaEventRecord", pointer, pointer)
        self.event_query = _typed(library, "cudaEventQuery", pointer)
        self.event_synchronize = _typed(waiting, "cudaEventSynchronize", pointer)
        elapsed = next(name for name in ("cudaEventElapsedTime", "cudaEventElapsedTime_v2", "") if _has(library, name))
        self.event_elapsed_time = _typed(library, elapsed, ctypes.POINTER(ctypes.c_float), pointer, pointer)
        self.stream_wait_event = _typed(library, "cudaStreamWaitEvent", pointer, pointer, ctypes.c_uint)
        # ctypes takes an address in half the time of a typed pointer, and a fence asks each of 129 streams twice.
        self._is_capturing = _typed(library, "cudaStreamIsCapturing", pointer, pointer)
        self._copy = _typed(library, "cudaMemcpyAsync", pointer, pointer, size, number, pointer)
        self._version_of = _typed(library, "cudaRuntimeGetVersion", numbers)
        self.clear = _typed(library, "cudaGetLastError")
        self._library = library
        self._status = threading.local()  # where answers go: one for each thread, made once

    def check(self, code: int, call: str) -> None:
        """Raise for the code of a failure.

        Raises:
            RuntimeError: Names the call and the code; the error is cleared.
        """
        if code:
            self.clear()
            raise RuntimeError(f"{call}: CUDA error {code}")

    def is_capturing(self, streams: Iterable[int]) -> bool:
        """Whether a graph is being captured on one of the streams, or on one that the default stream would wait for."""
        answer, ask = self._answer(), self._is_capturing
        place = ctypes.addressof(answer)
        for stream in streams:
            if code := ask(stream, place):
                self.clear()
                if code != _CAPTURE_IMPLICIT:
                    raise RuntimeError(f"cudaStreamIsCapturing: CUDA error {code}")
                return True
            if answer.value:
                return True
        return False

    def copy(self, copies: Sequence[tuple[int, int, int]], stream: int) -> None:
        """Enqueue copies of pinned or device memory: where to, where from, how many bytes. They must not overlap.

        Raises:
            RuntimeError: One was refused; those before it may be under way.
        """
        if len(copies) > 1 and stream and self._copy_batch is not None and self._copy_at_once(copies, stream):
            return
        for dst, src, nbytes in copies:
            if code := self._copy(dst, src, nbytes, _DEFAULT, stream):
                self.check(code, "cudaMemcpyAsync")

    def _copy_at_once(self, copies: Sequence[tuple[int, int, int]], stream: int) -> bool:
        """Copy by one call. If an older driver refuses it, never try it again: to copy twice is harmless."""
        number = len(copies)
        pointers, sizes = ctypes.c_void_p * number, ctypes.c_size_t * number
        dsts, srcs, lengths = zip(*copies, strict=True)
        first = ctypes.c_size_t(0)  # the first copy that the attributes hold for
        if code := self._copy_batch(
            pointers(*dsts), pointers(*srcs), sizes(*lengths), number, _attributes(), ctypes.byref(first), 1,
            *self._fail_index(), stream,
        ):  # fmt: skip
            self.clear()
            self._copy_batch = None
            _log.info("copies are enqueued one by one: cudaMemcpyBatchAsync: CUDA error %d", code)
        return not code

    @functools.cached_property
    def _copy_batch(self) -> Any:
        """`cudaMemcpyBatchAsync` with the arguments that this version of it takes; None where there is none."""
        version = self._version
        if version < _FIRST_BATCHED or not _has(self._library, "cudaMemcpyBatchAsync"):
            return None
        pointers, sizes = ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_size_t)
        index = [sizes] if version < _FIRST_WITHOUT_INDEX else []
        return _typed(
            self._library, "cudaMemcpyBatchAsync", pointers, pointers, sizes, ctypes.c_size_t, ctypes.c_void_p, sizes,
            ctypes.c_size_t, *index, ctypes.c_void_p,
        )  # fmt: skip

    def _fail_index(self) -> list[Any]:
        """The place for the number of a failed copy, in the form of the call that has it."""
        return [ctypes.byref(ctypes.c_size_t())] if self._version < _FIRST_WITHOUT_INDEX else []

    @functools.cached_property
    def _version(self) -> int:
        answer = self._answer()
        self.check(self._version_of(answer), "cudaRuntimeGetVersion")
        return int(answer.value)

    def _answer(self) -> Any:
        if (answer := getattr(self._status, "answer", None)) is None:
            answer = self._status.answer = ctypes.c_int()
        return answer


def _has(library: Any, name: str) -> bool:
    return not name or hasattr(library, name)


def _typed(library: Any, name: str, *arguments: Any) -> Any:
    function = getattr(library, name)
    function.argtypes, function.restype = arguments, ctypes.c_int
    return function


def _attributes() -> Any:
    """`cudaMemcpyAttributes` with nothing but the order, its first field; longer than any version of it."""
    return (ctypes.c_uint * 64)(_IN_STREAM_ORDER)


class CudaRuntime:
    """The CUDA runtime library that torch uses.

    Args:
        cuda: Torch's CUDA module.
        maps: Names the files mapped into this process, one a line.
        load: Opens a library by path, to be called with the GIL kept.
        load_waiting: The same, to be called without it.
        current_stream: Returns the handle of the calling thread's current stream, by the device's index. None: torch is
            asked for the stream, which takes 4 us.
        turn_file: Locked by the process that registers shared memory; None: a file of this user's.
    Thread-safety: any thread; sticky errors and capture modes are the calling thread's.
    """

    def __init__(
        self,
        cuda: Any,
        maps: str = "/proc/self/maps",
        load: Callable[[str], Any] = ctypes.PyDLL,
        load_waiting: Callable[[str], Any] = ctypes.CDLL,
        current_stream: Callable[[int], int] | None = _CURRENT_STREAM,
        turn_file: str | None = None,
    ) -> None:
        self._cuda, self._maps, self._load, self._load_waiting = cuda, maps, load, load_waiting
        self._current_stream = current_stream
        self._turn_file = turn_file
        self._has_warned = self._has_told = False

    @functools.cached_property
    def raw(self) -> RawCalls | None:
        """Its functions; None where they cannot be called."""
        for path, library in self._libraries.items():
            with contextlib.suppress(OSError, AttributeError):
                return RawCalls(library, self._load_waiting(path))
        return None

    def current_stream(self, device: torch.device) -> int:
        """The handle of the calling thread's current stream."""
        if self._current_stream is None:
            return int(self._cuda.current_stream(device).cuda_stream)
        return self._current_stream(device.index)

    def pin(self, address: int, nbytes: int) -> bool:
        """Page-lock host memory; False, with one warning, where the system refuses."""
        code = self._checked(self._cuda.cudart().cudaHostRegister(address, nbytes, _PORTABLE))
        if code and not self._has_warned:
            self._has_warned = True
            _log.warning(
                f"cannot pin a staging buffer of {nbytes:,} bytes (cudaHostRegister: error {code}); copies to the "
                "device will be slow. Raise the limit on locked memory (ulimit -l, for a container --ulimit "
                "memlock=-1), or lower staging_slots or staging_slot_bytes"
            )
        return not code

    def pin_shared(self, address: int, nbytes: int) -> bool:
        """Page-lock memory that another process owns and this one only reads; False, with one line, if refused.

        One process at a time: of several that register the same pages at once, each waits for all.
        """
        with _one_process_at_a_time(self._turn_file):
            code = self._checked(self._cuda.cudart().cudaHostRegister(address, nbytes, _PORTABLE | _READ_ONLY))
        if code and not self._has_told:
            self._has_told = True
            _log.info(
                f"shards in shared memory are staged: {nbytes:,} bytes of it cannot be registered (cudaHostRegister: "
                f"error {code})"
            )
        return not code

    def unpin(self, address: int) -> None:
        """Undo a `pin` or `pin_shared` that returned True."""
        self._checked(self._cuda.cudart().cudaHostUnregister(address))

    def beside_captures(self) -> contextlib.AbstractContextManager[None]:
        """Keep this thread's calls inside from breaking a CUDA graph capture in another thread.

        By default a capture fails when *any* thread allocates, pins, or queries an event meanwhile. In thread-local
        mode calls of this thread affect its own captures only.
        Source: torch's ProcessGroupNCCL, whose watchdog queries events the same way (pytorch#148594).
        """
        return _ThreadLocalCaptures(self._exchange)

    def _checked(self, status: Any) -> int:
        """The code of a status. An error is sticky: left alone, the next kernel launch would report it as its own."""
        code = int(status)
        if code:
            bound = getattr(self._cuda.cudart(), "cudaGetLastError", None)  # only in newer torch
            for clear in [bound] if bound else self._symbols("cudaGetLastError"):
                clear()
        return code

    @functools.cached_property
    def _exchange(self) -> Any:
        return next(iter(self._symbols("cudaThreadExchangeStreamCaptureMode")), None)

    def _symbols(self, name: str) -> list[Any]:
        """The function of that name in each runtime library; several may be mapped, each with errors of its own."""
        return [getattr(library, name) for library in self._libraries.values() if hasattr(library, name)]

    @functools.cached_property
    def _libraries(self) -> dict[str, Any]:
        """Open the library that torch has mapped: another copy would have errors of its own.

        First those of the version that torch was built for; handles are the driver's, and good for any.
        """
        libraries = {}
        version = f".so.{(torch.version.cuda or '').split('.')[0]}"
        for path in sorted(_mapped(self._maps, "libcudart"), key=lambda path: version not in path):
            with contextlib.suppress(OSError):  # replaced on disk since
                libraries[path] = self._load(path)
        return libraries


class _ThreadLocalCaptures:
    """A capture mode for as long as the context is entered. No generator: each call of a device enters it."""

    __slots__ = ("_exchange", "_has_changed", "_mode")

    def __init__(self, exchange: Any) -> None:
        self._exchange, self._mode = exchange, ctypes.c_int(_THREAD_LOCAL)

    def __enter__(self) -> None:
        self._has_changed = self._exchange is not None and self._exchange(ctypes.byref(self._mode)) == 0

    def __exit__(self, *_: object) -> None:
        if self._has_changed:
            self._exchange(ctypes.byref(self._mode))  # which is the earlier mode by now


@contextlib.contextmanager
def _one_process_at_a_time(path: str | None) -> Iterator[None]:
    """Hold a lock of this user's processes, if it comes free in time."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            file = path or os.path.join(tempfile.gettempdir(), f"gpu-cache-register-{os.geteuid()}.lock")
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, descriptor)
            _lock_in_time(descriptor)
        yield


def _lock_in_time(descriptor: int) -> None:
    ends = time.monotonic() + _TURN_S
    while True:
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if time.monotonic() > ends:
            return None
        time.sleep(0.001)


def _mapped(maps: str, prefix: str) -> list[str]:
    """Paths of mapped files whose name begins with `prefix`; some wheels put a hash between that and `.so`."""
    with open(maps) as lines:
        fields = [line.split(maxsplit=5) for line in lines]
    paths = dict.fromkeys(field[5].strip().removesuffix(" (deleted)") for field in fields if len(field) == 6)
    return [path for path in paths if os.path.basename(path).startswith(prefix)]


def pooled_streams(cuda: Any, device: torch.device) -> list[Any]:
    """The default stream, then every stream that torch deals out: 32 for each priority, in turn."""
    found = {0: cuda.default_stream(device)}
    least, greatest = getattr(cuda.Stream, "priority_range", lambda: (0, -1))()
    for priority in range(greatest, least + 1):
        num_known = -1
        # Whole rounds leave every other caller's turn as it was; a round without news shows that none was missed.
        while num_known < len(found):
            num_known = len(found)
            dealt = [cuda.Stream(device=device, priority=priority) for _ in range(32)]
            found |= {stream.cuda_stream: stream for stream in dealt}
    return list(found.values())


def has_context(index: int) -> bool:
    """Whether this process already has a context on a CUDA device; asking makes none."""
    return bool(torch._C._cuda_hasPrimaryContext(index))  # type: ignore[attr-defined]


def nvml_uuid(properties: Any) -> str:
    """The UUID in a device's properties. NVML's prefix tells a slice of a GPU (MIG) from a whole one."""
    uuid = str(properties.uuid)
    if uuid.startswith(("GPU-", "MIG-")):
        return uuid
    return f"{'MIG' if ' MIG ' in properties.name else 'GPU'}-{uuid}"


def pci_address(properties: Any) -> str:
    """The PCI address in a device's properties, as NVML writes it; "" where torch does not tell."""
    parts = [getattr(properties, f"pci_{part}_id", 0) for part in ("domain", "bus", "device")]
    return "{:08X}:{:02X}:{:02X}.0".format(*parts) if any(parts) else ""
