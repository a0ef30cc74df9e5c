"""What becomes of the run when a rollout worker dies: it ends, or it goes on without what was lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from demo.handles import RemoteBatch
from demo.rollouts import Workers
from gpu_cache import FetchError

OnDeath = Literal["fail", "restart"]


class Recovery:
    """Restarts workers and drops lost trajectories, if that is wanted; else every death ends the run. One thread.

    Args:
        workers: Who may die.
        on_death: What to do about it.
        tell: Takes lines for the user.
    Attributes:
        num_lost_shards: Shards that were to be read and died with their workers.
        num_restarts: Workers that were started again.
    """

    def __init__(self, workers: Workers, on_death: OnDeath, tell: Callable[[str], None]) -> None:
        self._workers, self._tell = workers, tell
        self.is_on = on_death == "restart"
        self.num_lost_shards = self.num_restarts = 0
        self._dead_addresses: dict[str, int] = {}  # that died, by the number of the worker

    def revive(self, step: int) -> None:
        """Start dead workers again."""
        for death in self._workers.restart_dead() if self.is_on else ():
            self.num_restarts += 1
            self._dead_addresses[death.address] = death.number
            where = "the same address" if death.address == death.new_address else f"instead of {death.address}"
            self._tell(f"step {step}: {death.what}; restarted at {death.new_address}, {where}")

    def drop_lost(self, step: int, batch: RemoteBatch, error: FetchError) -> None:
        """Take out of a batch what a failed read says is lost, for the rest to be read again.

        Raises:
            FetchError: `error` again, if no worker's death explains it.
        """
        if not self.is_on:
            raise error
        self._workers.wait_for_death()
        self.revive(step)
        lost = batch.owners_of(error.failures)
        if not lost or not lost.keys() <= self._dead_addresses.keys():
            raise error
        for address, num_shards in lost.items():
            num_trajectories = batch.drop_owner(address)
            self.num_lost_shards += num_shards
            self._tell(
                f"step {step}: {num_shards:,} shards of rollout worker {self._dead_addresses[address]} ({address}) are "
                f"lost; goes on without their {num_trajectories:,} trajectories"
            )
