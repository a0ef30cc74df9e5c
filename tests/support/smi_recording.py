"""Made-up recordings: two trainers, a step each six seconds, one of them leaking if asked."""

from __future__ import annotations

import json
from typing import Any

MIB = 1 << 20
START = 1795349754.0
STEP_S = 6
SOURCES = ("gpu-a-021:35221", "gpu-a-022:35221", "gpu-a-023:35221")
LEAK_MIB = 90


def samples(num: int = 60, *, is_leaking: bool) -> list[dict[str, Any]]:
    return [
        {
            "schema_version": 1,
            "unix_time": START + second,
            "hostname": "gpu-a-017",
            "processes": [_process(rank, second, is_leaking and rank == 1) for rank in (0, 1)],
        }
        for second in range(num)
    ]


def as_text(found: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(sample) + "\n" for sample in found)


def _process(rank: int, second: int, is_leaking: bool) -> dict[str, Any]:
    clears, into = divmod(second + rank, STEP_S)
    filling = min(into / 2, 1.0)
    survivors = [[n, 1, LEAK_MIB * MIB] for n in range(1, clears)] if is_leaking else []
    leaked = LEAK_MIB * len(survivors)
    resident = {source: int(900 * filling * (3 - i) / 3) * MIB for i, source in enumerate(SOURCES)}
    resident[SOURCES[-1]] += leaked * MIB
    moved = int((clears + filling) * 1800 * MIB)
    return {
        "name": f"actor-{rank}-{41873 + rank}-0a1b2c",
        "gpu": str(rank),
        "pid": str(41873 + rank),
        "title": f"actor/{rank}",
        "state": "leak" if len(survivors) > 1 else "ok",
        "report_time": START + second - 0.4,
        "device_bytes": sum(resident.values()) + 40 * MIB,
        "device_capacity_bytes": 4096 * MIB,
        "num_entries": 3 * 64,
        "clears": clears,
        "cleared": clears * 190,
        "fetch_bytes": moved,
        "fetch_busy_seconds": moved / 11e9,
        "h2d_bytes": moved,
        "h2d_busy_seconds": moved / 24e9,
        "sources": resident,
        "survivors": survivors,
    }
