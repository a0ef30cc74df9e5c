"""Scripts: what a program does, step by step, as data. Drawn by a seed or by Hypothesis, and made shorter by either."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from hypothesis import strategies as st

NUM_STEPS = 60  # default-length programs missed two of ten planted bugs (design.md)
REST = "rest"  # is left out when played: what shrinking leaves of a step that does not matter
_NUM_NUMBERS = 14  # numbers of a step; the first two are the adversary's

_Option = TypeVar("_Option")


class Choices:
    """Choices made by given numbers: by 0, and when they run out, the simplest one there is."""

    def __init__(self, numbers: bytes = b"") -> None:
        self._numbers = iter(numbers)

    def below(self, limit: int) -> int:
        """A number below a limit of at most 256."""
        return next(self._numbers, 0) % limit

    def happens(self, percent: int) -> bool:
        return self.below(100) >= 100 - percent

    def choice(self, options: Sequence[_Option]) -> _Option:
        return options[self.below(len(options))]

    def sample(self, options: Sequence[_Option], count: int) -> list[_Option]:
        left = list(options)
        return [left.pop(self.below(len(left))) for _ in range(count)]


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One step: its name, and the numbers that its choices are made by."""

    name: str
    numbers: bytes = b""

    def __str__(self) -> str:
        return " ".join([self.name, *map(str, self.numbers.rstrip(bytes(1)))])


class Script(tuple[Step, ...]):
    """The steps of a program, in order. Its repr makes a script that does the same."""

    def __repr__(self) -> str:
        return f"Script.of({'; '.join(map(str, self.effective))!r})"

    @classmethod
    def of(cls, text: str) -> Script:
        """A script from names and numbers, steps divided by semicolons."""
        words = [step.split() for step in text.split(";") if step.strip()]
        return cls(Step(name, bytes(map(int, numbers))) for name, *numbers in words)

    @property
    def effective(self) -> list[Step]:
        """The steps that do something."""
        return [step for step in self if step.name != REST]


def random_script(seed: int, weights: Mapping[str, int]) -> Script:
    """Steps with their numbers, by a seed."""
    chance = random.Random(seed)
    names = chance.choices(list(weights), list(weights.values()), k=NUM_STEPS)
    return Script(Step(name, chance.randbytes(_NUM_NUMBERS)) for name in names)


def scripts(weights: Mapping[str, int]) -> st.SearchStrategy[Script]:
    """Scripts of the same length and kind. They shrink to few steps among rests, with small numbers."""
    names = [REST, *(name for name, weight in weights.items() for _ in range(weight))]
    numbers = st.binary(min_size=_NUM_NUMBERS // 2, max_size=_NUM_NUMBERS)  # from 0 on they would mostly be few
    step = st.tuples(st.sampled_from(names), numbers)
    return st.tuples(*[step] * NUM_STEPS).map(lambda drawn: Script(Step(*each) for each in drawn))


def shortened(script: Script, fails: Callable[[Script], bool]) -> Script:
    """A script that still fails, without the steps that it fails without, taken out one by one from the end."""
    for at in reversed(range(len(script))):
        shorter = Script((*script[:at], Step(REST), *script[at + 1 :]))
        if script[at].name != REST and fails(shorter):
            script = shorter
    return script
