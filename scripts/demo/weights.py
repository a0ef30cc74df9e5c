"""Weights on their way to the workers: shards of the trainer's own server, one version at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from demo.handles import to_text
from demo.rollouts import Workers
from gpu_cache.rpc.rtensor import RTensor, flatten_shard_ids


class ClearError(RuntimeError):
    """A clear did not reach every process that may hold the shards."""


def clear_everywhere(
    handles: Any, consumers: Sequence[Callable[[list[Any]], object]] = (), *, is_strict: bool = True
) -> None:
    """Clear shards in this process, at their owners and at the consumers.

    Args:
        handles: Of the shards.
        consumers: Of these, further ones.
        is_strict: False: a party that could not be reached is left to the next clear, which asks once more.
    Raises:
        ClearError: An owner or consumer could not be reached; the others have cleared.
    """
    report = asyncio.run(RTensor.clear_everywhere(handles, consumers))
    if is_strict and not report.is_complete:
        raise ClearError(f"clearing {len(flatten_shard_ids(handles)):,} shards: {report}")


class WeightPublisher:
    """Keeps the newest weights in this process's shard store. One thread.

    Args:
        address: Of this process's shard server.
        workers: Who fetches the weights, and forgets them when they are old.
        is_strict: As for `clear_everywhere`.
    """

    def __init__(self, address: str, workers: Workers, *, is_strict: bool = True) -> None:
        self._address = address
        self._workers = workers
        self._is_strict = is_strict
        self._handles: dict[str, RTensor] = {}

    def publish(self, module: nn.Module) -> str:
        """Replace the published weights by a copy of the module's.

        The workers must be idle: they are asked to forget the old ones.

        Returns:
            The handles, as text.
        """
        self.clear()
        # `remotize` copies, so the optimiser may go on writing while the workers fetch.
        self._handles = RTensor.remotize(dict(module.state_dict()), node_addr=self._address)
        return to_text(self._handles)

    def clear(self) -> None:
        """Clear what is published, everywhere."""
        if self._handles:
            clear_everywhere(self._handles, [self._workers.clear], is_strict=self._is_strict)
            self._handles = {}
