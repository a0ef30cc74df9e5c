"""Figures as people read them. None, which means "not measured", is a dash."""

from __future__ import annotations

from gpu_cache.config import MIB

DASH = "-"


def mib(nbytes: float | None) -> str:
    """Whole MiB, for programs. Less than one MiB shows its first decimal, so that it does not look like nothing."""
    if nbytes is None:
        return DASH
    if 0 < nbytes < 0.95 * MIB:
        return f"{max(nbytes / MIB, 0.1):.1f}"
    return str(round(nbytes / MIB))


def size(nbytes: float | None) -> str:
    """Bytes in the unit that fits: 72B, 1.4KiB, 293KiB, 12GiB."""
    return DASH if nbytes is None else _scaled(nbytes, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def speed(bytes_per_second: float | None) -> str:
    """Bytes per second, by powers of 1000, in the unit that fits: 950kB/s, 38MB/s, 11.4GB/s."""
    if bytes_per_second is None:
        return DASH
    return _scaled(bytes_per_second, 1000, ("B/s", "kB/s", "MB/s", "GB/s"))


def _scaled(number: float, base: int, names: tuple[str, ...]) -> str:
    """With one decimal under 100, unless that is zero or the unit is a byte."""
    power = 0
    while power < len(names) - 1 and round(number) >= base:
        number /= base
        power += 1
    text = f"{number:.1f}" if power and number < 99.95 else f"{number:.0f}"
    return text.removesuffix(".0") + names[power]


def gigabytes(bytes_per_second: float | None) -> str:
    """GB/s, of 10^9 bytes, for programs; under 0.1 with two decimals."""
    if bytes_per_second is None:
        return DASH
    return f"{bytes_per_second / 1e9:.{2 if 0 < bytes_per_second < 1e8 else 1}f}"


def percent(ratio: float | None, decimals: int = 1) -> str:
    """A ratio as a number of percent, without the sign."""
    return DASH if ratio is None else f"{100 * ratio:.{decimals}f}"


def milliseconds(seconds: float | None) -> str:
    """With one decimal."""
    return DASH if seconds is None else f"{1000 * seconds:.1f}"


def count(number: float | None) -> str:
    """Without decimals."""
    return DASH if number is None else f"{number:.0f}"


def decimal(number: float | None) -> str:
    """With one decimal."""
    return DASH if number is None else f"{number:.1f}"


def age(seconds: float | None) -> str:
    """Its two largest units: 38s, 2m7s, 1h12m, 3d4h."""
    if seconds is None:
        return DASH
    whole = max(int(seconds), 0)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60}m"
    return f"{whole // 86400}d{whole % 86400 // 3600}h"


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th, 11th, 21st."""
    last = 0 if number % 100 in (11, 12, 13) else number % 10
    return f"{number}{('th', 'st', 'nd', 'rd')[last] if last < 4 else 'th'}"


def ratio(part: float | None, whole: float | None) -> float | None:
    """None where nothing can be divided."""
    return part / whole if part is not None and whole else None
