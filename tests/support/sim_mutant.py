"""Mutants: a cache with one method written wrongly, which the simulated device has to see."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Mutant:
    """`owner.name` replaced by what `make` makes of it; `torch` begins the versions that it harms ("": all)."""

    title: str
    owner: Any
    name: str
    make: Callable[[Any], Callable[..., Any]]
    torch: str = ""

    def replacement(self, calls: list[None]) -> Callable[..., Any]:
        """The broken method; each call of it is noted."""
        broken = self.make(getattr(self.owner, self.name))

        def method(*args: Any, **kwargs: Any) -> Any:
            calls.append(None)
            return broken(*args, **kwargs)

        return method


class Mutants(list[Mutant]):
    """Those of one kind."""

    def enter(
        self, title: str, owner: Any, name: str, torch: str = ""
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Enter a function of the original method, and what that is called with."""

        def enter(broken: Callable[..., Any]) -> Callable[..., Any]:
            def make(original: Any) -> Callable[..., Any]:
                return lambda *args, **kwargs: broken(original, *args, **kwargs)

            self.append(Mutant(title, owner, name, make, torch))
            return broken

        return enter
