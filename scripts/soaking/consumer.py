"""A consumer: a thread that uses RTensors as trainers do, and compares every byte that it is handed."""

from __future__ import annotations

import asyncio
import collections
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from gpu_cache.config import Prefer
from gpu_cache.rpc.rtensor import RTensor, TensorShardInfo, clear_fetch_buffer
from gpu_cache.rpc.shard import collect_leaves
from soaking.catalogue import Catalogue, Shard
from soaking.tally import EXPECTED_OF_PREFETCH, Tally

FETCH_TIMEOUT_S = 5.0
# Beyond the library's own deadlines: two cores, a dozen busy threads, a collection of garbage.
MARGIN_S = 6.0
_DELETE_TIMEOUT_S = 10.0  # `HttpSettings.delete_timeout_s`
# Of one consumer. Eight hold less than the pool has, but not much less: with their batches it is too small.
_MOST_HELD_BYTES = 4 << 20
_MOST_HELD = 24
_LONGEST_PAUSE_S = 0.03


@dataclass(frozen=True, slots=True)
class World:
    """What all consumers share.

    Attributes:
        catalogue: Of what there is.
        addresses: Of the owners, by number.
        tally: Of what happens.
        stopping: Set when they shall end.
    """

    catalogue: Catalogue
    addresses: Sequence[str]
    tally: Tally
    stopping: threading.Event

    def handle(self, shard: Shard) -> RTensor:
        """A handle that no owner sent."""
        meta = torch.empty(shard.shape, dtype=shard.dtype, device="meta")
        return RTensor(TensorShardInfo(shard.shard_id, self.addresses[shard.owner]), meta)


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor, or the end of one, that is kept.

    Attributes:
        shard: Whose bytes they are.
        tensor: The alias.
        first: Number of its first byte in the shard.
    """

    shard: Shard
    tensor: torch.Tensor
    first: int


class Consumer:
    """One consumer on a thread of its own.

    Args:
        world: What it shares with the others.
        seed: Of what it does.
        number: Of the consumer.
    """

    def __init__(self, world: World, seed: int, number: int) -> None:
        self._world, self._chance = world, random.Random(f"{seed}-{number}")
        self._held: collections.deque[Held] = collections.deque()
        self._futures: collections.deque[Future[int]] = collections.deque(maxlen=4)
        self.thread = threading.Thread(target=self._run, name=f"soak-consumer-{number}", daemon=True)

    def _run(self) -> None:
        works: list[tuple[int, float, Callable[[], None]]] = [
            (30, FETCH_TIMEOUT_S, self._localize),
            (10, FETCH_TIMEOUT_S, self._localize_on_host),
            (15, FETCH_TIMEOUT_S, self._prefetch_and_localize),
            (5, 0, self._prefetch),
            (15, FETCH_TIMEOUT_S, self._to_local),
            (12, 0, self._look_again),
            (9, 0, self._clear_here),
            (1, 0, self._clear_all),
            (3, _DELETE_TIMEOUT_S, self._clear_at_owner),
        ]
        weights = [weight for weight, _, _ in works]
        while not self._world.stopping.wait(self._chance.uniform(0, _LONGEST_PAUSE_S)):
            _, limit_s, work = self._chance.choices(works, weights)[0]
            with self._world.tally.operation(work.__name__.removeprefix("_"), limit_s + MARGIN_S):
                work()
        with self._world.tally.operation("drop", MARGIN_S):
            self._drop()

    def _localize(self) -> None:
        self._localize_and_check(self._batch())

    def _localize_on_host(self) -> None:
        self._localize_and_check(self._batch(), prefer="host")

    def _prefetch_and_localize(self) -> None:
        batch = self._batch()
        RTensor.prefetch(batch)
        self._localize_and_check(batch)

    def _prefetch(self) -> None:
        """Their outcome is looked at later, or never."""
        self._futures.append(RTensor.prefetch(self._batch()))
        oldest = self._futures[0]
        if oldest.done() and (error := self._futures.popleft().exception()) is not None:
            self._world.tally.note_error(error, EXPECTED_OF_PREFETCH)

    def _to_local(self) -> None:
        shard = self._chance.choice(self._world.catalogue.shards)
        self._check_and_keep(shard, self._world.handle(shard).to_local())

    def _look_again(self) -> None:
        """Some of what is held, long after it was cleared or evicted; and let go of some."""
        for held in self._chance.sample(self._held, min(5, len(self._held))):
            self._check(held)
        if self._held and self._chance.random() < 0.3:
            self._check(self._held.popleft())

    def _clear_here(self) -> None:
        clear_fetch_buffer([shard.shard_id for shard in self._draw(12)])

    def _clear_all(self) -> None:
        clear_fetch_buffer()

    def _clear_at_owner(self) -> None:
        shards = self._draw(4)
        ids = [shard.shard_id for shard in shards if shard.owner == shards[0].owner]
        asyncio.run(RTensor.clear_node(self._world.addresses[shards[0].owner], ids))

    def _draw(self, most: int) -> list[Shard]:
        """Some shards; one may be among them twice."""
        return self._chance.choices(self._world.catalogue.shards, k=self._chance.randint(1, most))

    def _batch(self) -> dict[str, Any]:
        """A nest of containers with handles, and other things that pass through."""
        handles = [(shard, self._world.handle(shard)) for shard in self._draw(12)]
        cut = self._chance.randint(0, len(handles))
        return {"step": 7, "rows": handles[:cut], "rest": [{"pair": pair} for pair in handles[cut:]]}

    def _localize_and_check(self, batch: dict[str, Any], prefer: Prefer = "device") -> None:
        shards = collect_leaves(batch, Shard)
        tensors = collect_leaves(RTensor.localize(batch, prefer=prefer), torch.Tensor)
        for shard, tensor in zip(shards, tensors, strict=True):
            self._check_and_keep(shard, tensor)

    def _check_and_keep(self, shard: Shard, tensor: torch.Tensor) -> None:
        self._check(Held(shard, tensor, 0))
        if self._chance.random() < 0.3:
            skipped = self._chance.randrange(tensor.numel()) if self._chance.random() < 0.5 else 0
            kept = tensor.view(-1)[skipped:] if skipped else tensor
            self._held.append(Held(shard, kept, skipped * tensor.itemsize))
        while len(self._held) > _MOST_HELD or sum(held.shard.nbytes for held in self._held) > _MOST_HELD_BYTES:
            self._check(self._held.popleft())

    def _check(self, held: Held) -> None:
        self._world.tally.note_check(self._world.catalogue.fault_in(held.shard, held.tensor, held.first))

    def _drop(self) -> None:
        while self._held:
            self._check(self._held.popleft())
        self._futures.clear()
