"""Awaiting a blocking call that may never return."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

from gpu_cache.process import OwnThread

ResultT = TypeVar("ResultT")


async def in_own_thread(work: Callable[..., ResultT], *args: Any) -> ResultT:
    """Await a blocking call on a thread of its own.

    The few threads of `asyncio.to_thread` could all be waiting for an owner that is dead. And the interpreter waits
    for those of an executor without end; for this one it waits a moment.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[ResultT] = loop.create_future()

    def settle(how: Callable[[Any], None], what: Any) -> None:
        if not future.done():  # else nobody waits any more
            how(what)

    def run() -> None:
        try:
            result = work(*args)
        except BaseException as error:
            # A future does not take the one, and the others would end the caller's loop.
            is_odd = isinstance(error, StopIteration) or not isinstance(error, Exception)
            _tell(loop, settle, future.set_exception, RuntimeError(f"{error!r} was raised") if is_odd else error)
        else:
            _tell(loop, settle, future.set_result, result)

    OwnThread(run, "areal-clear").start()
    return await future


def _tell(loop: asyncio.AbstractEventLoop, settle: Callable[..., None], *what: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(settle, *what)
