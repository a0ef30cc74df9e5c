"""The soak's side of an owner: start it, restore it, kill it, start it again on the same port."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from soaking import owner_process
from soaking.owner_process import RESTORE

_START_S = 60.0
_ANSWER_S = 15.0


class OwnerError(RuntimeError):
    """The owner died without being told to, or did not answer."""


class Owner:
    """One owner. A context manager: leaving it ends the process. Not started before `start`.

    Args:
        seed: Of the catalogue.
        number: Which owner of the catalogue it is.
        stopping: Set when a start need not be waited for any more.
    Attributes:
        port: Of its server; 0 before the first start.
    Thread-safety: one thread at a time.
    """

    def __init__(self, seed: int, number: int, stopping: threading.Event) -> None:
        self.port = 0
        self._seed, self._number, self._stopping = seed, number, stopping
        self._process: SpawnProcess | None = None
        self._pipe: Connection | None = None

    @property
    def pid(self) -> int:
        """Of its process; 0 while there is none."""
        return (self._process.pid or 0) if self._process else 0

    def launch(self, *, is_full: bool = True) -> None:
        """Start the process, without waiting until it serves; its store has every shard, or none."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=owner_process.main,
            args=(theirs, self._seed, self._number, self.port, is_full),
            name=f"soak-owner-{self._number}",
            daemon=True,
        )
        # Ctrl-C reaches the whole group; the soak decides what becomes of its owners. A child inherits the mask.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()  # so that the pipe ends when the owner does

    def wait(self) -> None:
        """Until it serves, or the soak is stopping.

        Raises:
            OwnerError: It did not come up.
        """
        self.port = int(self._receive(_START_S)) or self.port

    def restore(self) -> None:
        """Put every shard back into its store.

        Raises:
            OwnerError: It is dead, or did not answer.
        """
        assert self._pipe is not None
        with contextlib.suppress(OSError):  # `_receive` tells of it
            self._pipe.send(RESTORE)
        self._receive(_ANSWER_S)

    def kill(self) -> None:
        """End the process at once."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process.close()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None

    def __enter__(self) -> Owner:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def _receive(self, limit_s: float) -> int:
        assert self._pipe is not None
        try:
            for _ in range(int(limit_s * 10)):
                if self._pipe.poll(0.1):
                    return int(self._pipe.recv())
                if self._stopping.is_set():
                    return 0
        except (EOFError, OSError):
            raise OwnerError(f"owner {self._number} (pid {self.pid}) died") from None
        raise OwnerError(f"owner {self._number} (pid {self.pid}) did not answer within {limit_s} s")
