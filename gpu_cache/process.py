"""The life of this process: caches and threads that end with it, and objects that a forked child must not touch.

Module-level state of `gpu_cache`.
"""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401
import contextlib
import ctypes
import gc
import logging
import multiprocessing.util
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import Any, Protocol

import torch

logger = logging.getLogger(__name__)

# Longest waits at exit, each for all together: for cut-off reads of caches, for servers, for every other thread.
_CLOSE_S = 5.0
_SERVERS_S = 6.0
_THREADS_S = 2.0


class LiveCache(Protocol):
    @property
    def device_name(self) -> str:
        """The name of its device; "" while undecided."""

    def end(self, deadline: float) -> None:
        """Give everything back. Waits for reads that were cut off, until `deadline` by `time.monotonic()`."""

    def disown(self) -> object:
        """Refuse every further call, and return an object that must never be freed in this process."""


class Inherited(Protocol):
    def disown(self) -> object:
        """Close inherited descriptors in a child, by `forget_sockets`; return an object that must never be freed."""


class OwnThread(threading.Thread):
    """A daemon thread that this process waits for before its interpreter goes, within a bound.

    Python ends a daemon thread that comes back to a finalizing interpreter. C++ code on its stack does not survive
    that: the process aborts. So a thread that may run torch's code is one of these.

    Args:
        work: The function that the thread runs.
        name: The thread's name.
        ask_to_end: Makes `work` return soon. Called at exit; must not block.
        is_server: Whether `work` needs executors, which Python ends before anything else: it ends first.
    """

    def __init__(
        self,
        work: Callable[[], object],
        name: str,
        ask_to_end: Callable[[], object] = lambda: None,
        *,
        is_server: bool = False,
    ) -> None:
        super().__init__(target=work, name=name, daemon=True)
        self.ask_to_end, self.is_server = ask_to_end, is_server

    def run(self) -> None:
        """Work, and then keep nothing alive."""
        try:
            super().run()
        finally:
            self.ask_to_end = lambda: None

    def wait(self, deadline: float) -> None:
        """Join it until a deadline, as by `time.monotonic()`; a thread does not wait for itself."""
        if self is not threading.current_thread() and self.is_alive():
            self.join(max(0.0, deadline - time.monotonic()))


class CollectorPause:
    """A `with` in which no cyclic collection starts by itself, in any thread. Entered by several threads at once.

    Only short work belongs inside: no wait, and no code of users. Building thousands of tensors sets off a collection
    of all objects of the process, amid a landing. If a caller switches the collector off during a pause, it is on
    again afterwards: Python does not say so.
    Source: our measurement: 0.8 to 1.1 us a shard, and stalls of 160 to 190 ms of other threads.
    """

    def __init__(self) -> None:
        # Guards _inside, _was_on, and the switch of the collector. A signal's handler may enter under it.
        self._lock = threading.RLock()
        self._inside: dict[int, int] = {}  # by thread, how deep
        self._was_on = False

    def __enter__(self) -> None:
        thread = threading.get_ident()
        with self._lock:
            if not self._inside:
                self._was_on = gc.isenabled()
            self._inside[thread] = self._inside.get(thread, 0) + 1
            gc.disable()

    def __exit__(self, *error: object) -> None:
        thread = threading.get_ident()
        with self._lock:
            if (depth := self._inside.get(thread, 0)) > 1:
                self._inside[thread] = depth - 1
            else:
                self.leave()

    @property
    def is_entered(self) -> bool:
        """Whether this thread is inside: entering again would change nothing."""
        return threading.get_ident() in self._inside

    def leave(self) -> None:
        """End this thread's pauses: an exception, as of Ctrl-C, may come between two steps of one."""
        with self._lock:
            if self._inside.pop(threading.get_ident(), 0) and not self._inside and self._was_on:
                gc.enable()

    def forget(self) -> None:
        """Forget the threads inside: in a forked child they do not exist."""
        if self._inside and self._was_on:
            gc.enable()
        self._lock, self._inside = threading.RLock(), {}


_signal: Any = getattr(signal, "_signal", signal)  # in C; `signal` looks names up, and takes 13 us for a pair, not 0.7


class InterruptPause:
    """A `with` in which Ctrl-C does not raise: it does at the end.

    Python runs the handler of a signal between any two steps of the main thread. Amid the books of a pool it would
    leave them torn: later calls would fail, or wait for a lock that no thread gives back. Other threads run no handler.
    Short work belongs inside, and no code of users that waits. A second Ctrl-C raises at once. Other signals whose
    handlers raise are not held back.
    """

    def __init__(self) -> None:
        # The main thread's alone.
        self._depth = 0
        self._handler: Any = None
        self._has_come = False

    def __enter__(self) -> None:
        if threading.get_ident() != threading.main_thread().ident:
            return
        if self._depth == 0:
            if not callable(handler := _signal.getsignal(signal.SIGINT)):  # it raises nothing
                return
            self._handler, self._has_come = handler, False
            _signal.signal(signal.SIGINT, self._note)  # the last step before which Ctrl-C may raise
        self._depth += 1

    def __exit__(self, *error: object) -> None:
        if self._depth and threading.get_ident() == threading.main_thread().ident:
            self._depth -= 1
            if self._depth == 0:
                try:
                    self._give_back()
                finally:
                    if self._has_come:
                        self._handler(signal.SIGINT, None)

    def forget(self) -> None:
        """Give the signal back amid a pause: at a second Ctrl-C, or in a child that another thread forked."""
        if self._depth:
            self._depth = 0
            self._give_back()

    def _give_back(self) -> None:
        try:
            _signal.signal(signal.SIGINT, self._handler)
        except BaseException:  # of another signal's handler, which ran before this could be done
            _signal.signal(signal.SIGINT, self._handler)
            raise

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._has_come:
            self.forget()
            self._handler(number, frame)
        self._has_come = True


no_interrupts = InterruptPause()
no_collections = CollectorPause()
_caches: weakref.WeakSet[LiveCache] = weakref.WeakSet()
_inherited: weakref.WeakSet[Inherited] = weakref.WeakSet()
_drainers: weakref.WeakSet[threading.Thread] = weakref.WeakSet()  # callers' threads that have run torch for a cache
_finalizers: list[object] = []  # one in a worker of multiprocessing


def register(cache: LiveCache) -> None:
    """Close `cache` at exit, and cut it off in a forked child."""
    _caches.add(cache)
    if multiprocessing.parent_process() is not None and not _finalizers:
        # A forked worker ends by `os._exit`, without `atexit`: this is the hook that it has.
        _finalizers.append(multiprocessing.util.Finalize(None, _end_all, exitpriority=0))


def unregister(cache: LiveCache) -> None:
    """Forget a cache that was closed."""
    _caches.discard(cache)


def note_drainer() -> None:
    """Note that this thread, a caller's, runs torch for a cache: it must not abort the process at exit either."""
    _drainers.add(threading.current_thread())


def leave_to_parent(one: Inherited) -> None:
    """Cut `one` off in a forked child, for as long as it lives."""
    _inherited.add(one)


def forget_sockets(descriptors: Iterable[int]) -> None:
    """Close descriptors in a forked child, without a word to the peer.

    Objects in the child still name them. So each number stays taken, by the null device: no such object can close a
    later file of the child's.
    """
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for descriptor in descriptors:
        if descriptor >= 0:  # else closed before the fork
            os.dup2(null, descriptor, inheritable=False)
    os.close(null)


def warn_if_shared(device: torch.device) -> None:
    """Warn of several live caches on one CUDA device: each takes its own share of the memory."""
    count = sum(cache.device_name == str(device) for cache in list(_caches))
    if device.type == "cuda" and count > 1:
        logger.warning("%d caches on %s in one process; each takes up to its own pool_bytes", count, device)


def _own_threads() -> list[OwnThread]:
    return [thread for thread in threading.enumerate() if isinstance(thread, OwnThread)]


def _end_threads(threads: Sequence[OwnThread], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        thread.ask_to_end()
    for thread in threads:
        thread.wait(deadline)


def _end_servers() -> None:
    """End servers when the main thread ends: after executors, which Python ends next, they would answer with errors."""
    _end_threads([thread for thread in _own_threads() if thread.is_server], _SERVERS_S)


def _end_all() -> None:
    """End everything at exit. A thread that is left does not abort the process, even if this is interrupted."""
    try:
        _close_all()
        _end_threads(_own_threads(), _THREADS_S)
    finally:
        if _own_threads() or any(thread.daemon and thread.is_alive() for thread in list(_drainers)):
            _outlive_threads()


def _close_all() -> None:
    deadline = time.monotonic() + _CLOSE_S
    for cache in list(_caches):
        try:
            cache.end(deadline)
        except Exception:
            logger.exception("closing %r at exit failed", cache)


def _outlive_threads() -> None:
    """Keep threads that nothing can end, such as a caller's backend inside torch, from aborting the process.

    Two things would. First, Python up to 3.13 ends a thread by `pthread_exit` when it asks a finalizing interpreter for
    the lock. A C++ frame on its stack turns that into `std::terminate`. So that handler becomes one that sleeps: Python
    3.14 treats every such thread so. Second, `exit` destroys C++ objects that the thread may be using. So `_exit` comes
    before that, with the same status, once Python's own end is over. `os._exit` in an `atexit` handler would skip
    handlers of others, and the status is not known there.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        c, cpp = ctypes.CDLL(None), ctypes.CDLL("libstdc++.so.6")
        cpp._ZSt13set_terminatePFvvE(c.pause)
        c.on_exit(c._exit, None)
        c["__cxa_atexit"](c.fflush, None, None)  # before `_exit`, being registered later


def _disown_all() -> None:
    """Cut everything off in a forked child. Takes no lock: a thread that does not exist here may hold it."""
    no_collections.forget()
    no_interrupts.forget()
    for one in (*_caches, *_inherited):
        # It has arenas, events and pinned buffers of the parent. To free them here, or when the interpreter clears its
        # modules, would call a CUDA context that did not survive the fork.
        try:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(one.disown()))
        except Exception:  # such as no descriptor left; the others are to be cut off all the same
            logger.exception("cutting off %r in a forked child failed", one)
    _caches.clear()
    _inherited.clear()
    _finalizers.clear()


atexit.register(_end_all)
# Python's executors use this hook, too. The last registered is called first, and theirs is registered when
# `concurrent.futures.thread` is imported. Where it is missing, servers end after executors, with errors in the log.
getattr(threading, "_register_atexit", atexit.register)(_end_servers)
os.register_at_fork(after_in_child=_disown_all)
