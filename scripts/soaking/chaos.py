"""The thread that gives owners their shards back, and kills one now and then."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Sequence

from soaking.owner import Owner
from soaking.tally import Tally

_FIRST_KILL_S = (0.5, 1.0)
_BETWEEN_KILLS_S = (15.0, 35.0)
_LONGEST_DEATH_S = 1.5
_BETWEEN_RESTORES_S = (0.2, 0.6)
_LONGEST_EMPTY_S = 1.5


class Chaos:
    """Restores all owners and kills the first one, again and again.

    Args:
        owners: Running; used by this thread alone until it has ended.
        seed: Of when it does what.
        tally: Takes what goes wrong.
        stopping: Set when it shall end.
    Attributes:
        kills: How many so far.
    """

    def __init__(self, owners: Sequence[Owner], seed: int, tally: Tally, stopping: threading.Event) -> None:
        self.kills = 0
        self._owners, self._tally, self._stopping = owners, tally, stopping
        self._chance = random.Random(f"{seed}-chaos")
        self.thread = threading.Thread(target=self._run, name="soak-chaos", daemon=True)

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        kill_at = time.monotonic() + self._chance.uniform(*_FIRST_KILL_S)
        try:
            while not self._stopping.wait(self._chance.uniform(*_BETWEEN_RESTORES_S)):
                for owner in self._owners:
                    owner.restore()
                if time.monotonic() >= kill_at:
                    self._kill_and_restart(self._owners[0])
                    kill_at = time.monotonic() + self._chance.uniform(*_BETWEEN_KILLS_S)
        except Exception as error:  # top of a thread
            self._tally.note_error(error)

    def _kill_and_restart(self, owner: Owner) -> None:
        owner.kill()
        self.kills += 1
        is_full = self._chance.random() < 0.5
        if self._stopping.wait(self._chance.uniform(0, _LONGEST_DEATH_S)):
            return
        owner.launch(is_full=is_full)
        owner.wait()
        if not is_full:
            self._stopping.wait(self._chance.uniform(0, _LONGEST_EMPTY_S))
