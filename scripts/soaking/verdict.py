"""What a run came to: which of the things that must hold did not."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

MB = 1_000_000
# How much the median RSS may grow from the second quarter of a run to the last. With malloc kept from hoarding it stays
# within 3 MB (tensors outside the pool come and go). In ten minutes 300 s lie between the two, with 160 operations a
# second: a leak of 200 bytes an operation, or of one shard of average length (240 kB) every 7 s, is found.
RSS_LIMIT_BYTES = 10 * MB
# Fewer samples say nothing: the pool is still being filled.
LEAST_SAMPLES = 60


@dataclass(frozen=True, slots=True)
class Findings:
    """What is known at the end.

    Attributes:
        wrong: Tensors with wrong contents.
        stuck: Operations that took too long, or never ended.
        unexpected: Errors that no fault explains.
        left: Bytes and entries by name that should be 0 after everything was dropped and cleared.
        threads: At the start of the steady state, and at the end.
        descriptors: Likewise.
        rss: Of the soak process, each second.
        server_rss: Of the server that is never killed, each second.
        missing_events: What the run should have met and did not: it would prove less than it says.
    """

    wrong: Sequence[str] = ()
    stuck: Sequence[str] = ()
    unexpected: Sequence[str] = ()
    left: Mapping[str, float] = field(default_factory=dict)
    threads: tuple[int, int] = (0, 0)
    descriptors: tuple[int, int] = (0, 0)
    rss: Sequence[int] = ()
    server_rss: Sequence[int] = ()
    missing_events: Sequence[str] = ()


def judge(findings: Findings) -> list[tuple[str, str]]:
    """Each thing that must hold, with what is wrong with it, or ""."""
    return [
        ("contents", _listed("tensors with wrong bytes", findings.wrong)),
        ("no operation stuck", _listed("operations stuck", findings.stuck)),
        ("no unexplained error", _listed("errors that no fault explains", findings.unexpected)),
        ("cache empty", ", ".join(f"{name} = {value:,}" for name, value in findings.left.items() if value)),
        ("threads", _grown("threads", findings.threads)),
        ("file descriptors", _grown("file descriptors", findings.descriptors)),
        ("RSS flat", _rising("RSS", findings.rss)),
        ("server's RSS flat", _rising("the server's RSS", findings.server_rss)),
        ("run met faults", ", ".join(findings.missing_events)),
    ]


def growth(samples: Sequence[int]) -> float | None:
    """From the median of the second quarter to that of the last; None if there are too few to tell."""
    if len(samples) < LEAST_SAMPLES:
        return None
    quarter = len(samples) // 4
    return statistics.median(samples[-quarter:]) - statistics.median(samples[quarter : 2 * quarter])


def _listed(what: str, texts: Sequence[str]) -> str:
    return f"{len(texts)} {what}, the first: {texts[0]}" if texts else ""


def _grown(what: str, counts: tuple[int, int]) -> str:
    before, after = counts
    return f"{before} {what} at the start, {after} at the end" if after > before else ""


def _rising(what: str, samples: Sequence[int]) -> str:
    grown = growth(samples)
    if grown is None or grown <= RSS_LIMIT_BYTES:
        return ""
    return f"{what} grew by {grown / MB:.1f} MB from second to last quarter, limit {RSS_LIMIT_BYTES / MB:.0f}"
