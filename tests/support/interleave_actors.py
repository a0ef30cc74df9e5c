"""Readers that stop at every gate and getters in threads of their own; a board says when all stand still."""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import pytest
import torch

from gpu_cache import FetchError, ShardReader, ShardSpec, TensorCache
from gpu_cache.transfer.fetch import Fetch, ReaderTask

PATIENCE_S = 30.0


class Actor(Protocol):
    @property
    def is_still(self) -> bool:
        """Whether it goes on only when another actor does something."""


class Board:
    """Where actors say that they have come to something new; who moves them waits here."""

    def __init__(self) -> None:
        self._said: queue.SimpleQueue[None] = queue.SimpleQueue()

    def say(self) -> None:
        self._said.put(None)

    def settle(self, actors: Iterable[Actor]) -> None:
        """Wait until all of them stand still."""
        for actor in actors:
            while not actor.is_still:
                self._said.get(timeout=PATIENCE_S)


class SteppedReader:
    """Delivers shards in parts, and stops before each part, before each read and after it, until it is released.

    Args:
        node: Where the shards come from.
        parts: The keys of each part.
        tensors: The tensors behind the keys.
        board: Told whenever it stops.
    """

    def __init__(
        self, node: str, parts: Sequence[Sequence[Hashable]], tensors: Mapping[Hashable, torch.Tensor], board: Board
    ) -> None:
        self.node, self.failures = node, dict[Hashable, Exception]()
        self.keys = [key for part in parts for key in part]
        self.gate = ""  # where it stands; "" while it moves
        self.has_ended = self.ends_in_time = False
        self._parts, self._tensors, self._board = list(reversed(parts)), tensors, board
        self._left = b""
        self._go, self._credit = threading.Lock(), 0
        self._go.acquire()
        self._error: BaseException | None = None

    @property
    def is_still(self) -> bool:
        return bool(self.gate) or self.has_ended

    def release(self, num_gates: int) -> None:
        """Let it pass the gate where it stands, and as many more as make `num_gates`."""
        assert self.gate
        self._credit, self.gate = num_gates - 1, ""
        self._go.release()

    def break_off(self, error: BaseException | None = None) -> None:
        """Let it fail where it stands."""
        self._error = FetchError(f"{self.node} broke off {self.gate}") if error is None else error
        self.release(1)

    def end(self) -> None:
        """Its thread is done with it."""
        self.has_ended = True
        self._board.say()

    def next_specs(self) -> Sequence[ShardSpec] | None:
        self._pause("before specs" if self._parts else "before the end")
        if not self._parts:
            return None
        part = [(key, self._tensors[key]) for key in self._parts.pop()]
        self._left = b"".join(tensor.view(-1).view(torch.uint8).numpy().tobytes() for _, tensor in part)
        return [ShardSpec(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in part]

    def read_into(self, buffers: Sequence[memoryview]) -> None:
        self._pause("before a read")
        for buffer in buffers:
            buffer[:], self._left = self._left[: len(buffer)], self._left[len(buffer) :]
        self._pause("after a read")

    def cancel(self) -> None:
        pass

    def close(self) -> None:
        self._left = b""

    def _pause(self, gate: str) -> None:
        if self._credit:
            self._credit -= 1
            return
        self.gate = gate
        self._board.say()
        assert self._go.acquire(timeout=PATIENCE_S), f"no test released {self.node} {gate}"
        if self._error is not None:
            raise self._error


class SteppedSource:
    """Two nodes; each opens a reader of its own, which delivers in parts of at most so many shards."""

    def __init__(self, tensors: Mapping[Hashable, torch.Tensor], node_of: Mapping[Hashable, str], board: Board) -> None:
        self.readers: list[SteppedReader] = []
        self.part_length, self.ends_in_time = 3, False
        self._tensors, self._node_of, self._board = tensors, node_of, board

    def open(self, keys: Sequence[Hashable], timeout_s: float) -> Iterable[ShardReader]:
        by_node: dict[str, list[Hashable]] = {}
        for key in keys:
            by_node.setdefault(self._node_of[key], []).append(key)
        opened = [
            SteppedReader(node, self._in_parts(wanted), self._tensors, self._board) for node, wanted in by_node.items()
        ]
        for reader in opened:
            reader.ends_in_time = self.ends_in_time
        self.readers += opened
        return opened

    def _in_parts(self, keys: Sequence[Hashable]) -> list[Sequence[Hashable]]:
        return [keys[at : at + self.part_length] for at in range(0, len(keys), self.part_length)]


class Getter(threading.Thread):
    """A thread that calls `get_many` when it is told to, over and over; it stands still while it waits for others."""

    def __init__(self, board: Board) -> None:
        super().__init__(daemon=True)
        self.outcome: list[torch.Tensor] | BaseException | None = None
        self.keys: Sequence[Hashable] = ()  # the keys of the call under way
        self._board = board
        self._pending: Sequence[Future[Any]] | None = None
        self._calls: queue.SimpleQueue[Callable[[], list[torch.Tensor]] | None] = queue.SimpleQueue()
        self.start()

    @property
    def is_idle(self) -> bool:
        return not self.keys

    @property
    def is_still(self) -> bool:
        if self.is_idle:
            return True
        pending = self._pending
        return self.outcome is not None or (pending is not None and not all(future.done() for future in pending))

    def get(self, cache: TensorCache, keys: Sequence[Hashable], source: SteppedSource) -> None:
        """Begin a call."""
        self.keys = keys
        self._calls.put(lambda: cache.get_many(keys, source))

    def take(self) -> list[torch.Tensor] | BaseException:
        """The result of the call, which has ended."""
        outcome, self.outcome, self.keys = self.outcome, None, ()
        assert outcome is not None
        return outcome

    def wait_for(self, pending: Sequence[Future[Any]]) -> None:
        """The call is about to wait for these."""
        self._pending = pending
        self._board.say()

    def stop(self) -> None:
        self._calls.put(None)
        self.join(PATIENCE_S)
        assert not self.is_alive()

    def run(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                self.outcome = call()  # no local name: once it is taken, this thread must hold none of its tensors
            except BaseException as error:
                self.outcome = error.with_traceback(None)
            self._pending = None
            self._board.say()
            del call


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Let getters say what they wait for, and readers when their thread is done."""
    wait, run = Fetch.wait, ReaderTask.run

    @functools.wraps(wait)
    def watched_wait(fetch: Fetch) -> None:
        if isinstance(thread := threading.current_thread(), Getter):
            thread.wait_for(fetch._pending())
        wait(fetch)

    @functools.wraps(run)
    def watched_run(task: ReaderTask) -> None:
        if isinstance(thread := threading.current_thread(), Getter):  # it drains the reader itself
            thread.wait_for([task.done])
        try:
            run(task)
        finally:
            if isinstance(task.reader, SteppedReader):
                task.reader.end()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Fetch, "wait", watched_wait)
        patched.setattr(ReaderTask, "run", watched_run)
        yield


def in_background(call: Callable[[], Any]) -> Future[Any]:
    """Call it in a thread of its own."""
    result: Future[Any] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error.with_traceback(None))  # its frames would keep tensors

    threading.Thread(target=run, daemon=True).start()
    return result
