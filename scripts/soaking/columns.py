"""The lines that a run prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from soaking.figures import Sample
from soaking.verdict import MB, Findings, growth, judge

_WIDTHS = {
    "elapsed": 7, "ops": 8, "checks": 9, "GB": 7, "faults": 6, "kills": 5, "evicted": 8, "overfl": 7, "RSS MB": 7,
    "server": 6, "dev MB": 7, "reserv": 6, "quarant": 7, "threads": 7, "fds": 4,
}  # fmt: skip
# What of `buffer_stats()` the lines and the verdict need.
SHOWN = (
    "fetch_bytes", "evictions", "overflows", "device_bytes", "device_reserved_bytes", "device_quarantined_bytes",
)  # fmt: skip


def header() -> str:
    """Names of the columns."""
    return "  ".join([*(name.rjust(width) for name, width in _WIDTHS.items()), "errors"])


def line(elapsed_s: float, counts: Mapping[str, int], errors: Mapping[str, int], samples: Sequence[Sample]) -> str:
    """One line: counters so far, gauges of the last sample, the most that was quarantined in any of them."""
    last = samples[-1]
    cells = [
        f"{int(elapsed_s // 60)}:{int(elapsed_s % 60):02}",
        str(counts["operations"]),
        str(counts["checks"]),
        f"{last.cache['fetch_bytes'] / 1e9:.2f}",
        str(counts["faults"]),
        str(counts["kills"]),
        str(last.cache["evictions"]),
        str(last.cache["overflows"]),
        f"{last.rss_bytes / MB:.1f}",
        f"{last.server_bytes / MB:.1f}",
        f"{last.cache['device_bytes'] / MB:.1f}",
        f"{last.cache['device_reserved_bytes'] / MB:.1f}",
        f"{max(sample.cache['device_quarantined_bytes'] for sample in samples) / MB:.2f}",
        str(last.threads),
        str(last.descriptors),
    ]
    told = " ".join(f"{reason}={count}" for reason, count in errors.items())
    return "  ".join([*(cell.rjust(width) for cell, width in zip(cells, _WIDTHS.values(), strict=True)), told or "-"])


def verdict_lines(findings: Findings) -> list[str]:
    """One line for each thing that must hold, and the verdict."""
    judged = judge(findings)
    lines = [
        f"  {'FAILED' if problem else 'ok':7}{name}{': ' + problem if problem else ''}" for name, problem in judged
    ]
    lines.append(f"  threads {_change(findings.threads)}, file descriptors {_change(findings.descriptors)}")
    lines.append(f"  growth of RSS {_shown(findings.rss)}, of the server's {_shown(findings.server_rss)}")
    failed = [name for name, problem in judged if problem]
    return [*lines, f"verdict: FAILED ({', '.join(failed)})" if failed else "verdict: all hold"]


def _change(counts: tuple[int, int]) -> str:
    return f"{counts[0]} -> {counts[1]}"


def _shown(samples: Sequence[int]) -> str:
    grown = growth(samples)
    return "not judged, too short a run" if grown is None else f"{grown / MB:+.1f} MB"
