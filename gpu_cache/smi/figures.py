"""Reading what another process wrote: nothing about its content is taken on trust, and what is odd is unknown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_MAX_TEXT = 200
_MAX_NUMBER = 1 << 63  # no count of bytes, of entries or of seconds is as large


def number(of: Mapping[str, Any], key: str) -> float | None:
    """A number that a figure can have; an int stays one."""
    value = of.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if -_MAX_NUMBER < value < _MAX_NUMBER else None


def integer(of: Mapping[str, Any], key: str) -> int | None:
    """A whole number."""
    value = number(of, key)
    return None if value is None else int(value)


def text(of: Mapping[str, Any], key: str) -> str:
    """Without what a terminal would take for a command; "" if it is no text."""
    value = of.get(key)
    return printable(value) if isinstance(value, str) else ""


def mapping(of: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An empty one if it is none."""
    value = of.get(key)
    return value if isinstance(value, dict) else {}


def numbers(of: Mapping[str, Any], key: str) -> list[float]:
    """A list of finite numbers, or an empty one."""
    value = of.get(key)
    if not isinstance(value, list):
        return []
    found = [number({"": item}, "") for item in value]
    return [item for item in found if item is not None] if None not in found else []


def printable(value: str) -> str:
    """With a question mark for each control character, so that a name cannot paint the reader's terminal."""
    return "".join(char if char.isprintable() else "?" for char in value[:_MAX_TEXT])


def total(values: Iterable[float | None]) -> float | None:
    """The sum of what is known; None if nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def largest(values: Iterable[float | None]) -> float | None:
    """The largest of what is known; None if nothing is."""
    return max((value for value in values if value is not None), default=None)
