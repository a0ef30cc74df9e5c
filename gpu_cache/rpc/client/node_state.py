"""What a client has learnt of the server at one address."""

from __future__ import annotations

from typing import NamedTuple


class Restart(NamedTuple):
    """Another server took the place of one that had answered from the same address."""

    before: str  # the incarnation that answered first
    now: str


class NodeState:
    """What one node's server spoke when it last answered, and which server that was.

    A server names its incarnation, a random id that it takes when it starts. AReaL's do not, and are taken to be one.

    Attributes:
        is_binary: Whether it spoke the binary form; few shards are asked for before it did.
    Thread-safety: any thread; what two find out at once is the same.
    """

    def __init__(self) -> None:
        self.is_binary = False
        self._known = Restart("", "")

    @property
    def restart(self) -> Restart | None:
        """The latest restart that was noticed."""
        return self._known if self._known.before else None

    def note(self, incarnation: str) -> bool:
        """Note who answered.

        Returns:
            Whether it is another than before: then nothing that was learnt of that one holds any more.
        """
        known = self._known
        if not incarnation or incarnation in known:  # of the one before: an answer that was still on its way
            return False
        self._known = Restart(known.now, incarnation)  # one step: who reads it sees two that belong together
        if known.now:
            self.is_binary = False
        return bool(known.now)
