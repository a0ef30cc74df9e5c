"""Bars and sparklines, of block characters or of ASCII."""

from __future__ import annotations

from collections.abc import Sequence

BLOCKS, ASCII = "▁▂▃▄▅▆▇█", "_.:-=+*#"


def bar(share: float, width: int, is_ascii: bool) -> str:
    """A share of 1 fills it."""
    full = min(max(round(share * width), 0), width)
    fill, empty = ("#", ".") if is_ascii else ("█", "░")
    return fill * full + empty * (width - full)


def sparkline(values: Sequence[float | None], levels: str) -> str:
    """As high as the largest of them; a blank where nothing is known."""
    largest = max((value for value in values if value is not None), default=0) or 1
    return "".join(" " if value is None else levels[round(value / largest * (len(levels) - 1))] for value in values)
