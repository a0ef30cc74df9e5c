"""Settings of a cache: a frozen dataclass, each field with a GPU_CACHE_* variable of the same name."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, cast

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
_SIZE = re.compile(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*(?:([KMGT])(iB|B|)|B|)\s*", re.IGNORECASE)

_LONGEST = sys.maxsize  # no range of memory is longer

_PREFIX = "GPU_CACHE_"
# Other variables, spelt as fields are.
_OTHER_VARIABLES = {
    "areal", "freeze_heap", "native", "native_dir", "node_cache", "require_gpu", "shard_ttl", "shm", "stats_dead_s",
    "stats_dir", "stats_group",
}  # fmt: skip

# About thirty years. No lock, socket or timer takes a longer time, which means no limit.
LONGEST_S = 1e9

# Every block starts at a multiple of this, as the CUDA allocator's blocks do.
ALIGNMENT = 512

ReadyMode = Literal["host", "stream"]
ReuseFence = Literal["all", "noted"]
Prefer = Literal["device", "host"]
OnError = Literal["raise", "none"]  # a call raises for shards that did not arrive, or returns None for them
MutationPolicy = Literal["refetch", "error", "ignore"]

YES = ("1", "true", "on", "yes")  # the words of a switch that say yes

logger = logging.getLogger(__name__)


def parse_size(text: float | str) -> int:
    """Bytes of a size given as a whole number or as text such as "4GiB", "512 MiB", "1.5KiB" or "4096".

    "4G" is 4 GiB, as for other tools' memory; "4GB" is 4 x 10^9 bytes.

    Raises:
        ValueError: Not a size, or more than any memory has.
    """
    if not isinstance(text, str | bool) and (number := _integral(text)) is not None:
        return _checked_size(number)
    match = _SIZE.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"{text!r} is not a size; write bytes, or a number with a unit, as in 4GiB, 4G or 4GB")
    power = 0 if match[2] is None else "KMGT".index(match[2].upper()) + 1
    return _checked_size(int(Fraction(match[1]) * (1000 if (match[3] or "").upper() == "B" else 1024) ** power))


def _checked_size(nbytes: int) -> int:
    if nbytes > _LONGEST:
        raise ValueError(f"no memory has more than {_LONGEST:,} bytes")
    return nbytes


def seconds(value: float | str, name: str = "", *, least: float = 0.0) -> float:
    """A time limit that every kind of wait takes. Infinity, and more than 30 years, mean no limit, and become 1e9.

    Args:
        value: A number, or its text.
        name: The argument's name, for the message; "": the caller adds it.
        least: The shortest that makes sense.
    Raises:
        ValueError: Not a number, NaN, or less than `least`.
    """
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not found >= least:
        named = f"{name}={value!r}: " if name else ""
        raise ValueError(f"{named}must be a number of seconds, at least {least:g}; math.inf means no limit")
    return min(found, LONGEST_S)


def whole(value: Any, name: str, *, least: int) -> int:
    """A whole number that an argument has to be, as 8, 8.0 or "8".

    Raises:
        ValueError: It is none, or less than `least`; names the argument.
    """
    try:
        return _at_least(_whole(value), least)
    except ValueError:
        raise ValueError(f"{name}={value!r}: must be at least {least}, and a whole number") from None


def is_off(text: str | None) -> bool:
    """Whether the text of a switch, such as a variable's, says no: 0, no, off or false."""
    return (text or "").strip().lower() in ("0", "no", "off", "false")


def says_yes(name: str, environ: Mapping[str, str] | None = None, *, default: bool) -> bool:
    """Read a switch from its variable; `default` if that is not set, or blank.

    Raises:
        ValueError: Neither yes nor no; names the variable.
    """
    text = (os.environ if environ is None else environ).get(name, "")
    try:
        return _switch(text) if text.strip() else default
    except ValueError as error:
        raise ValueError(f"{name}={text!r}: {error}") from None


SizeT = TypeVar("SizeT", int, int | None)


class Size(Generic[SizeT]):
    """A field of a dataclass that takes an int or text such as "4GiB"; once checked, it reads as bytes."""

    def __init__(self, default: SizeT) -> None:
        self._default: SizeT = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object | None, owner: type) -> SizeT:
        return self._default if instance is None else instance.__dict__[self._name]

    def __set__(self, instance: object, value: SizeT | str) -> None:
        instance.__dict__[self._name] = value


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """Settings of one `TensorCache`. Sizes are ints or text ("4GiB"); None means: decided when the device is known.

    Attributes:
        device: "auto" (the CUDA device if this process has initialised CUDA, else the host), "cpu", "cuda", "cuda:N".
        slab_bytes: Bytes of one slab; a larger shard gets a slab of its own.
        prealloc_bytes: Slabs taken at first use and kept while empty. Default 1 GiB on CUDA, 0 on the host. The
            cache also keeps as many slabs as the latest 16 steps had in use. A clear ends a step, and so does a minute
            without a fetch. `trim`, `offload`, and a device that is short of memory take these slabs back.
        pool_bytes: The most all slabs may take, the empty ones that are kept included. Default the smaller of 8 GiB
            and a tenth of the device; 2 GiB on the host.
        staging_slots: Pinned buffers that bytes pass through on their way to the device. The cache takes them one by
            one when needed; one owner's bytes take two or three.
        staging_slot_bytes: Bytes of one such buffer.
        run_bytes: The most bytes of consecutive shards that are placed and copied together.
        fetch_timeout_s: Longest wait of one call for its shards, in seconds; "inf" means no limit.
        max_inflight_bytes: The most bytes that are being received at once, over all nodes and calls; later readers wait
            for their turn. A larger window (a staging buffer's bytes; without staging, two) is received alone.
        ready: "host": tensors are handed out once the host has seen their copies done, safe on every stream and
            thread. "stream": they are handed out at once, and the caller's current stream waits instead.
        reuse_fence: "all": freed bytes are reused after all work enqueued before on any stream of torch's. "noted":
            after that on the default stream, on streams that asked for a shard, and on those named to `record_stream`.
        stats: Whether to write reports for `gpu-cache-smi`. None: yes, unless GPU_CACHE_STATS says no.
        role: The process's role in those reports. None: GPU_CACHE_ROLE, else the program's name.
        rank: Its number among processes of that role. None: GPU_CACHE_RANK, else RANK, else LOCAL_RANK, else 0.
        on_mutation: The cache's answer to the next call for a shard that a reader wrote into. "refetch": the cache
            drops it, and it is an ordinary miss; "error": `MutatedError`; "ignore": nothing.
        debug_checksum: Whether to look at every byte at each hand-out, for writes that torch does not count. Slow.
        host_tier_bytes: The most pinned host memory for evicted shards, and for shards that calls with `prefer="host"`
            ask for. 0: evicted shards are fetched again.
    Raises:
        ValueError: A value is out of range; names the field and the value.
    """

    device: str = "auto"
    slab_bytes: Size[int] = Size(256 * MIB)
    prealloc_bytes: Size[int | None] = Size(None)
    pool_bytes: Size[int | None] = Size(None)
    # Each owner that sends fills a buffer of its own: fewer buffers let fewer owners send at once. Measured on an H200:
    # buffers of 32 MiB gave 0.91 to 0.95 of the link's speed with runs of 4 to 32 MiB, buffers of 16 MiB 0.93 (of many
    # shards of 5.6 MiB 0.55 instead of 0.87), buffers of 64 MiB 0.38 to 0.50. Long runs fragment the pool. When 1 % of
    # the shards outlive their batch, a run of 16 MiB finds no place in a pool that is 54 % full, and one of 4 MiB first
    # at 94 %. So runs have 4 MiB; one call copies all neighbours in a buffer anyway. On the host no size was faster.
    staging_slots: int = 8
    staging_slot_bytes: Size[int] = Size(32 * MIB)
    run_bytes: Size[int] = Size(4 * MIB)
    fetch_timeout_s: float = 60.0
    max_inflight_bytes: Size[int] = Size(GIB)
    ready: ReadyMode = "host"
    reuse_fence: ReuseFence = "all"
    stats: bool | None = None
    role: str | None = None
    rank: int | None = None
    on_mutation: MutationPolicy = "refetch"
    debug_checksum: bool = False
    host_tier_bytes: Size[int] = Size(0)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = _named_check(field.name, getattr(self, field.name), f"CacheConfig.{field.name}")
            object.__setattr__(self, field.name, value)
        self._check_together()

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, **overrides: Any) -> CacheConfig:
        """Settings from the GPU_CACHE_* variables; `overrides` win.

        Raises:
            ValueError: A variable or an override is out of range; names it and its value.
        """
        source = os.environ if environ is None else environ
        for name in source:
            if name.startswith(_PREFIX):
                _check_variable(name)
        fields = [field.name for field in dataclasses.fields(cls) if field.name not in overrides]
        found: dict[str, Any] = {name: source[variable(name)] for name in fields if source.get(variable(name))}
        for name, text in found.items():
            _named_check(name, text, variable(name))
        return cls(**found, **overrides)

    def resolved(self, *, is_cuda: bool, device_bytes: int, environ: Mapping[str, str] | None = None) -> CacheConfig:
        """The same settings with every None replaced: by what `environ` says, or by what suits the device.

        Raises:
            ValueError: A variable that it looks at is out of range; names it.
        """
        known = os.environ if environ is None else environ
        default_pool = min(8 * GIB, device_bytes // 10) if is_cuda else 2 * GIB
        pool = default_pool if self.pool_bytes is None else self.pool_bytes
        default_prealloc = min(GIB, pool) if is_cuda else 0
        prealloc = default_prealloc if self.prealloc_bytes is None else self.prealloc_bytes
        return dataclasses.replace(
            self,
            pool_bytes=pool,
            prealloc_bytes=prealloc,
            stats=says_yes(variable("stats"), known, default=True) if self.stats is None else self.stats,
            role=self.role or known.get(variable("role")) or _program(),
            rank=_rank_of(known) if self.rank is None else self.rank,
        )

    def _check_together(self) -> None:
        if self.run_bytes > self.staging_slot_bytes:
            raise ValueError(
                f"CacheConfig.run_bytes={self.run_bytes:,}: must fit a staging slot of {self.staging_slot_bytes:,}"
            )
        if None not in (self.pool_bytes, self.prealloc_bytes) and cast(int, self.prealloc_bytes) > cast(
            int, self.pool_bytes
        ):
            raise ValueError(
                f"CacheConfig.prealloc_bytes={self.prealloc_bytes:,}: must not exceed pool_bytes {self.pool_bytes:,}"
            )
        if self.debug_checksum and self.on_mutation == "ignore":
            raise ValueError("CacheConfig.debug_checksum=True: on_mutation='ignore' does nothing about what it finds")


def settings_of(config: object) -> CacheConfig:
    """The settings that a caller gave; None reads the GPU_CACHE_* variables.

    Raises:
        TypeError: They are no `CacheConfig`.
        ValueError: A variable is out of range.
    """
    if config is None:
        return CacheConfig.from_env()
    if not isinstance(config, CacheConfig):
        kind = type(config).__name__
        raise TypeError(f"config is a {kind}: a CacheConfig is expected, as in CacheConfig(**settings)")
    return config


def variable(field: str) -> str:
    """Name of the environment variable of a field."""
    return f"{_PREFIX}{field.upper()}"


@functools.cache  # each name is warned of once
def _check_variable(name: str) -> None:
    known = {field.name for field in dataclasses.fields(CacheConfig)} | _OTHER_VARIABLES
    if name not in map(variable, known):
        hint = near(name.removeprefix(_PREFIX), known, variable)
        logger.warning("%s is no setting of gpu_cache, and is ignored%s", name, hint)


def described(config: CacheConfig, resolved: CacheConfig, environ: Mapping[str, str] | None = None) -> str:
    """Every setting on one line, each with where it came from: argument, variable, default or computed.

    Args:
        config: As given. An argument that repeats its variable or the default counts as that.
        resolved: The same settings for a device.
        environ: Has the variables; None: `os.environ`.
    """
    known = os.environ if environ is None else environ

    def described_one(field: dataclasses.Field[Any]) -> str:
        given, value = getattr(config, field.name), getattr(resolved, field.name)
        if _says(known.get(variable(field.name)), field.name, value):
            origin = "variable"
        elif given != value:
            origin = "computed"
        else:
            origin = "default" if given == field.default else "argument"
        return f"{field.name}={f'{value:,}' if type(value) is int else value} ({origin})"

    return ", ".join(map(described_one, dataclasses.fields(config)))


def _says(text: str | None, field: str, value: Any) -> bool:
    """Whether a variable's text means this value."""
    try:
        return bool(text) and _checked(field, text) == value
    except ValueError:
        return False


def _rank_of(environ: Mapping[str, str]) -> int:
    if said := environ.get(name := variable("rank")):
        rank: int = _named_check("rank", said, name)
        return rank
    launchers = [environ.get(name, "") for name in ("RANK", "LOCAL_RANK")]
    return next((int(text) for text in launchers if text.isdecimal()), 0)


def _program() -> str:
    """Name of the script or module that was started."""
    path = Path(sys.argv[0] if sys.argv else "")
    return (path.parent.name if path.stem == "__main__" else path.stem.removeprefix("-c")) or "python"


def _switch(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if not is_off(text) and text not in YES:
        raise ValueError("must be 0 or 1")
    return not is_off(text)


def _named(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("must be a name")
    return value


def _one_of(pattern: str, words: str = "") -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise ValueError(f"must be {words or ' or '.join(map(repr, pattern.split('|')))}")
        return value

    return check


def _number(least: int) -> Callable[[Any], int]:
    return lambda value: _at_least(_whole(value), least)


def _whole(value: Any) -> int:
    if (found := _integral(value)) is None:
        raise ValueError("must be a whole number")
    return found


def _integral(value: Any) -> int | None:
    """The number that a value, or its text, is, if it is whole."""
    try:
        found = int(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if isinstance(value, str) or found == value else None


def _size(least: int) -> Callable[[Any], int]:
    return lambda value: _at_least(parse_size(value), least)


def _at_least(value: int, least: int) -> int:
    if not value >= least:
        raise ValueError(f"must be at least {least}")
    return value


# Each returns a field's value in its type, or raises. The other fields are sizes, of at least one block.
_CHECKS: dict[str, Callable[[Any], Any]] = {
    "device": _one_of(r"auto|cpu|cuda|cuda:\d+", "auto, cpu, cuda or cuda:N, such as cuda:0"),
    "prealloc_bytes": _size(0),
    "staging_slots": _number(1),
    "fetch_timeout_s": functools.partial(seconds, least=1e-3),
    "ready": _one_of("host|stream"),
    "reuse_fence": _one_of("all|noted"),
    "stats": _switch,
    "role": _named,
    "rank": _number(0),
    "on_mutation": _one_of("refetch|error|ignore"),
    "debug_checksum": _switch,
    "host_tier_bytes": _size(0),
}
_OPTIONAL = {"prealloc_bytes", "pool_bytes", "stats", "role", "rank"}  # None: decided later


def _checked(field: str, value: Any) -> Any:
    """The value in its field's type, in range."""
    if value is None and field in _OPTIONAL:
        return None
    check: Callable[[Any], Any] = _CHECKS.get(field, _size(ALIGNMENT))
    return check(value)


def _named_check(field: str, value: Any, name: str) -> Any:
    """The same; the error names what has the value."""
    try:
        return _checked(field, value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={value!r}: {error}") from None


def near(name: str, known: Iterable[str], spell: Callable[[str], str] = str) -> str:
    """The question whether a misspelt name means a known one, for the end of a message; "" if none is near."""
    found = difflib.get_close_matches(name.lower(), known, 1)
    return f"; did you mean {spell(found[0])}?" if found else ""
