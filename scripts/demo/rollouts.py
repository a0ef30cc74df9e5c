"""The trainer's side of the rollout workers: start them, order samples, notice their deaths, stop them."""

from __future__ import annotations

import contextlib
import http.client
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any

from demo import worker
from demo.worker import ClearOrder, Failure, SampleOrder, StopOrder

_STOP_WAIT_S = 5.0
_HEALTH_TIMEOUT_S = 10.0
# A killed process closes its sockets a moment before it can be reaped.
_REAP_WAIT_S = 1.0


class WorkerError(RuntimeError):
    """A worker died, or could not do what it was told."""


class WorkerDiedError(WorkerError):
    """A worker's process has ended."""


@dataclass(frozen=True, slots=True)
class Death:
    """A worker that died and was started again.

    Attributes:
        number: Its place among the workers.
        what: How it died.
        address: Of the dead one's shard server.
        new_address: Of the new one's.
    """

    number: int
    what: str
    address: str
    new_address: str


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Let processes that are started meanwhile, and this one, see these variables."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Child:
    """One process and the pipe to it. Orders are sent one at a time, from a thread of its own.

    Args:
        main: Runs there, with its end of the pipe, `port` and `number`; sends a text first.
        number: Its place among its kind, from 0.
        title: What messages call it.
        port: For `main`.
        variables: Of its environment, beside this process's.
    """

    def __init__(
        self,
        main: Callable[[connection.Connection, int, int], None],
        number: int,
        title: str,
        port: int = 0,
        **variables: str,
    ) -> None:
        self._title = title
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=main, args=(theirs, port, number), name=title.replace(" ", "-"), daemon=True
        )
        with environment(**variables):
            self._process.start()
        # With our copy of its end closed, the pipe ends when the process does.
        theirs.close()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=title.replace(" ", "-"))
        self._greeting = self._thread.submit(self._receive)

    @property
    def sentinel(self) -> int:
        """Becomes readable when the process ends."""
        return self._process.sentinel

    def order(self, order: object) -> Future[Any]:
        """Send an order; the future is its result, or fails with `WorkerError`."""
        return self._thread.submit(self._exchange, order)

    def check(self) -> None:
        """Raise `WorkerDiedError` if the process has ended."""
        if not self._process.is_alive():
            raise self._death()

    def kill(self) -> None:
        """End the process as a fault of the machine would."""
        self._process.kill()
        self._process.join(_STOP_WAIT_S)

    def request_stop(self) -> None:
        """Tell the process to end once it has done what it is at; it may be dead already."""
        with contextlib.suppress(OSError):
            self._pipe.send(StopOrder())

    def stop(self) -> None:
        """Wait for the end of the process, and bring it about if it does not come by itself."""
        self._process.join(_STOP_WAIT_S)
        for end in (self._process.terminate, self._process.kill):
            if self._process.is_alive():
                end()
                self._process.join(_STOP_WAIT_S)
        self._thread.shutdown(cancel_futures=True)
        self._pipe.close()

    def _exchange(self, order: object) -> Any:
        try:
            self._pipe.send(order)
        except OSError:
            raise self._death() from None
        return self._receive()

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError):
            raise self._death() from None
        if isinstance(answer, Failure):
            raise WorkerError(f"{self._title} (pid {self._process.pid}) failed:\n{answer.text}")
        return answer

    def _death(self) -> WorkerDiedError:
        self._process.join(_REAP_WAIT_S)
        return WorkerDiedError(f"{self._title} (pid {self._process.pid}) died with exit code {self._process.exitcode}")


class Worker(Child):
    """One rollout worker.

    Args:
        number: Its place among the workers, from 0.
        port: Of its shard server, if it can be had.
        variables: Of its environment, beside this process's.
    """

    def __init__(self, number: int, port: int = 0, **variables: str) -> None:
        super().__init__(worker.main, number, f"rollout worker {number}", port, **variables)

    @property
    def address(self) -> str:
        """Of its shard server; waits until the worker is up."""
        return str(self._greeting.result())

    @property
    def port(self) -> int:
        """Of its shard server."""
        return int(self.address.rpartition(":")[2])

    def health(self) -> dict[str, Any]:
        """What its shard server says about itself."""
        with contextlib.closing(http.client.HTTPConnection(self.address, timeout=_HEALTH_TIMEOUT_S)) as server:
            server.request("GET", "/health")
            return dict(json.load(server.getresponse()))


class Workers:
    """All rollout workers. A context manager: leaving it leaves no process behind.

    Args:
        num_workers: Processes to start. They also end by themselves when this process does, however it ends.
        variables: Of their environment, beside this process's.
    """

    def __init__(self, num_workers: int, **variables: str) -> None:
        self._variables = variables
        self._workers = [Worker(number, **variables) for number in range(num_workers)]
        self._sent_by_dead = 0  # bytes of tensors, as far as is known

    def __len__(self) -> int:
        return len(self._workers)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        for one in self._workers:
            one.request_stop()
        for one in self._workers:
            one.stop()

    def sample(self, orders: Sequence[SampleOrder]) -> list[Future[str]]:
        """Give each worker its order; the results are handles of trajectories, as text."""
        return [one.order(order) for one, order in zip(self._workers, orders, strict=True)]

    def clear(self, shard_ids: Sequence[Any]) -> None:
        """Make every worker forget shards, and wait until they have."""
        for done in [one.order(ClearOrder(list(shard_ids))) for one in self._workers]:
            done.result()

    def health_total(self, key: str) -> int:
        """A figure of `GET /health`, summed over the workers' servers."""
        return sum(int(one.health()[key]) for one in self._workers)

    @property
    def served_bytes(self) -> int:
        """Bytes of tensors that the workers' servers say they sent; of dead ones, those that `kill` killed only."""
        return self._sent_by_dead + sum(_sent_bytes(one.health()) for one in self._workers)

    def kill(self, number: int) -> None:
        """Kill one, with all the shards that it keeps."""
        self._sent_by_dead += _sent_bytes(self._workers[number].health())
        self._workers[number].kill()

    def restart_dead(self) -> list[Death]:
        """Start dead workers again, each at its old address if that is free."""
        dead: dict[int, tuple[Worker, WorkerDiedError]] = {}
        for number, one in enumerate(self._workers):
            try:
                one.check()
            except WorkerDiedError as error:
                one.stop()
                dead[number] = one, error
                self._workers[number] = Worker(number, one.port, **self._variables)
        return [
            Death(number, str(error), one.address, self._workers[number].address)
            for number, (one, error) in dead.items()
        ]

    def wait_for_death(self) -> None:
        """Give one that was just killed the time to be seen dead."""
        connection.wait([one.sentinel for one in self._workers], _REAP_WAIT_S)

    def check(self) -> None:
        """Raise `WorkerDiedError` if one has died; to be asked when a fetch or a clear failed."""
        self.wait_for_death()
        for one in self._workers:
            one.check()


def _sent_bytes(health: dict[str, Any]) -> int:
    """Bytes of tensors that a server sent over HTTP, or that others read in its memory."""
    return int(health["sent_payload_bytes"]) + int(health["same_host"].get("bytes", 0))
