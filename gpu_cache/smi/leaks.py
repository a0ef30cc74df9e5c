"""`--leaks PID`: entries that outlived two clears. Reports only count them, so the process is asked for the list."""

from __future__ import annotations

import contextlib
import json
import os
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import RenderableType

from gpu_cache import units
from gpu_cache.report import schema as report
from gpu_cache.smi import figures
from gpu_cache.smi.folder import READ
from gpu_cache.smi.node import host_of
from gpu_cache.smi.problems import GLUE
from gpu_cache.smi.process import Process
from gpu_cache.smi.tables import WIDE, Column, table

ANSWER_TIMEOUT_S = 3.0
SHOWN = 10
_POLL_S = 0.05
_SHAPE = 60  # more characters for a long shape
_SHORT_DTYPES = {"bfloat16": "bf16", "float": "f", "uint": "u", "int": "i", "complex": "c"}

Answer = Mapping[str, Any]


def ask(process: Process, sleep: Callable[[float], None] = time.sleep) -> Answer | None:
    """The entries behind a leak; None if there is no answer in time.

    Raises:
        OSError: The process may not be asked.
    """
    wanted = process.file.beside(report.WANT)
    descriptor = os.open(wanted, os.O_CREAT | READ, 0o600)
    # Not touched again: its time must be before the process can have seen it. An old one has had no answer yet.
    asked_at = os.fstat(descriptor).st_mtime_ns
    os.close(descriptor)
    for _ in range(round(ANSWER_TIMEOUT_S / _POLL_S)):
        answer = _answer(process, asked_at)
        if answer is not None:
            return answer
        sleep(_POLL_S)
    with contextlib.suppress(OSError):
        wanted.unlink()
    return None


def _answer(process: Process, asked_at: int) -> Answer | None:
    try:
        with open(os.open(process.file.beside(report.LEAKS), READ), "rb") as file:
            if os.fstat(file.fileno()).st_mtime_ns < asked_at:
                return None
            found = json.loads(file.read(1 << 20) or b"")
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


_COLUMNS = (
    Column("Age", lambda leak: units.age(figures.number(leak, "age_seconds")), 7),
    Column("Bytes", lambda leak: units.size(figures.number(leak, "nbytes")), 8),
    Column("Clears", lambda leak: units.count(figures.number(leak, "clears_survived"))),
    Column(" Source node", lambda leak: f" {figures.text(leak, 'source')}", 22, justify="left"),
    Column("Shard id", lambda leak: short_key(figures.text(leak, "key")), 24, justify="left"),
    Column("dtype", lambda leak: short_dtype(figures.text(leak, "dtype")), 7, WIDE, justify="left"),
    Column("shape", lambda leak: str([round(n) for n in figures.numbers(leak, "shape")]), 0, WIDE, justify="left"),
)


def screen(process: Process, answer: Answer, width: int, *, shows_all: bool) -> list[RenderableType]:
    """The process, its oldest entries, and where they come from."""
    listed = answer.get("leaks")
    leaks = [leak for leak in listed if isinstance(leak, dict)] if isinstance(listed, list) else []
    num = figures.integer(answer, "outlived_entries") or len(leaks)
    nbytes = units.size(figures.number(answer, "outlived_bytes"))
    where = f"GPU {process.seat}  pid {process.pid}  {process.title:<12}"
    survived = "survived 2 or more clears" if width >= WIDE else "survived 2+ clears"
    parts: list[RenderableType] = [f"{where} {num} entries, {nbytes} {survived}"]
    if not leaks:
        return parts
    shown = leaks if shows_all else leaks[:SHOWN]
    parts.append(table(_COLUMNS, shown, width + _SHAPE * (width >= WIDE), None))
    if num > len(shown):
        parts.append(f"      ... {num - len(shown)} more{' (--all)' if len(shown) < len(leaks) else ''}")
    hint = textwrap.wrap(_hint(process, leaks, num), min(width, WIDE + 1), subsequent_indent=" " * 6)
    return [*parts, *(line.replace(GLUE, " ") for line in hint)]


def _hint(process: Process, leaks: Sequence[Answer], num: int) -> str:
    """Where most of them came from."""
    host, count = Counter(host_of(figures.text(leak, "source")) for leak in leaks).most_common(1)[0]
    failed = figures.total(
        figures.number(one, "fetch_errors") for address, one in process.sources.items() if host_of(address) == host
    )
    whence = f"all {num} came from {host}" if count == num else f"{count} of the {len(leaks)} oldest came from {host}"
    errors = f"; fetches from it failed {failed:.0f} times" if failed else ""
    return (
        f"Hint: {whence}{errors}. 'Clears' = clears{GLUE}survived: 0 or 1 is normal"
        " (the next step's data may arrive early), 2 or more is a leak."
    )


def short_key(key: str) -> str:
    """A long id by its ends."""
    return key if len(key) <= 24 else f"{key[:8]}-...-{key[-4:]}"


def short_dtype(dtype: str) -> str:
    """torch.bfloat16 as bf16, torch.float32 as f32."""
    name = dtype.removeprefix("torch.")
    for long, short in _SHORT_DTYPES.items():
        if name.startswith(long):
            return short + name.removeprefix(long)
    return name
