"""Locks under which garbage is collected: leased tensors die inside critical sections."""

from __future__ import annotations

import ast
import collections
import gc
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parent.parent.parent
Place = tuple[str, int]  # file and line of a `with`


class Garbage:
    """Objects that are to die in dead cycles.

    Attributes:
        stock: The only aliases of blocks, or other things; the last one dies next.
        collected: How often one died in a critical section, by its place.
    """

    def __init__(self) -> None:
        self.stock: list[Any] = []
        self.collected: collections.Counter[Place] = collections.Counter()
        self._one_at_a_time = threading.Lock()

    def collect(self, place: Place) -> None:
        """Make a dead cycle of something, and have it found."""
        try:
            doomed = self.stock.pop()
        except IndexError:
            return
        with self._one_at_a_time:  # another collection under way would make this one nothing
            alive = weakref.ref(doomed)
            cycle: list[Any] = [doomed]
            cycle.append(cycle)
            del doomed, cycle
            gc.collect(1)
            self.collected[place] += alive() is None

    def threading(self) -> Any:
        """A stand-in for the module `threading`: its locks collect garbage once they are held."""
        locks = {
            "Lock": lambda: CollectingLock(threading.Lock(), self),
            "Condition": lambda lock: threading.Condition(lock._inner),  # no `with` takes one
        }
        return SimpleNamespace(**vars(threading) | locks)


class CollectingLock:
    """A lock that collects garbage after it was taken and before it is given back."""

    def __init__(self, inner: Any, garbage: Garbage) -> None:
        self._inner, self._garbage = inner, garbage

    def __enter__(self) -> None:
        self._inner.__enter__()
        self._garbage.collect(_place())

    def __exit__(self, *error: object) -> None:
        self._garbage.collect(_place())
        self._inner.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _place() -> Place:
    """The line of the `with` that takes or gives back a lock."""
    frame = sys._getframe(2)
    return str(Path(frame.f_code.co_filename).relative_to(ROOT)), frame.f_lineno


def critical_sections(folder: str, but: str | None = None) -> set[Place]:
    """Every `with` in the folder, `but` one in it, that takes a lock which is made there."""
    paths = [path for path in sorted((ROOT / folder).rglob("*.py")) if but is None or (ROOT / but) not in path.parents]
    trees = {path: ast.parse(path.read_text()) for path in paths}
    return {
        (str(path.relative_to(ROOT)), node.lineno)
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.With) and not _locks_made(tree).isdisjoint(_names_taken(node))
    }


def _locks_made(tree: ast.AST) -> set[str]:
    """Names to which a lock or condition is assigned."""
    return {
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and ast.unparse(node.value).startswith(("threading.Lock", "threading.Condition"))
        for target in node.targets
        for name in _name(target)
    }


def _names_taken(node: ast.With) -> Iterator[str]:
    for item in node.items:
        yield from _name(item.context_expr)


def _name(node: ast.expr) -> list[str]:
    if isinstance(node, ast.Attribute):
        return [node.attr]
    return [node.id] if isinstance(node, ast.Name) else []
