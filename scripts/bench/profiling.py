"""Where a cold fetch spends its time: cProfile of both of its threads, and py-spy if it is installed."""

from __future__ import annotations

import cProfile
import io
import os
import pstats
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bench.trainer import Trainer
from gpu_cache.rpc import RTensor

_NUM_RUNS = 10
_NUM_FUNCTIONS = 15
_SAMPLING_S = 5
_SAMPLES_PER_S = 500

CAVEAT = (
    f"cProfile, {_NUM_RUNS} cold fetches a thread. It costs about a microsecond a call: functions that are called for "
    "each shard look dearer than they are, and what runs in C inside one function counts as that function's."
)


def profiles(trainer: Trainer) -> Iterator[tuple[str, str]]:
    """Titles and texts: the caller's thread, the draining thread, and what py-spy sees of both."""
    yield "The thread that calls localize", _text([_caller_profile(trainer)])
    yield "The thread that receives", _text(_drain_profiles(trainer))
    if (py_spy := shutil.which("py-spy")) is not None:
        yield f"py-spy, {_SAMPLING_S} s of cold fetches, both threads", _sampled(py_spy, trainer)


def _caller_profile(trainer: Trainer) -> cProfile.Profile:
    profiler = cProfile.Profile()
    for _ in range(_NUM_RUNS):
        _fetch_once(trainer, partial(profiler.runcall, RTensor.localize))
    return profiler


def _drain_profiles(trainer: Trainer) -> list[cProfile.Profile]:
    """One for each thread that a fetch starts; apart from the caller's, as Python 3.12 has room for one at a time."""
    profilers: list[cProfile.Profile] = []

    def begin(frame: object, event: str, argument: object) -> None:
        sys.setprofile(None)  # the profiler is to take this function's place
        profilers.append(cProfile.Profile())
        profilers[-1].enable()

    def localize(handles: Any) -> None:
        threading.setprofile(begin)
        try:
            RTensor.localize(handles)
        finally:
            threading.setprofile(None)  # type: ignore[arg-type]

    for _ in range(_NUM_RUNS):
        _fetch_once(trainer, localize)
        for profiler in profilers:
            profiler.disable()
    return profilers


def _fetch_once(trainer: Trainer, localize: Callable[[Any], Any] = RTensor.localize) -> None:
    """A cold fetch; nothing of it is held when the next one clears the cache."""
    localize(trainer.uncached_handles())


def _text(profilers: list[cProfile.Profile]) -> str:
    """The functions in which most time was spent."""
    text = io.StringIO()
    stats = pstats.Stats(*profilers, stream=text)
    stats.strip_dirs().sort_stats("tottime").print_stats(_NUM_FUNCTIONS)
    return text.getvalue().strip()


def _sampled(py_spy: str, trainer: Trainer) -> str:
    """The innermost Python functions by samples; what py-spy says if it cannot look."""
    with tempfile.TemporaryDirectory() as folder:
        stacks = Path(folder, "stacks")
        command = [py_spy, "record", "--pid", str(os.getpid()), "--duration", str(_SAMPLING_S), "--format", "raw"]
        command += ["--rate", str(_SAMPLES_PER_S), "--output", str(stacks)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as sampler:
            _fetch_while(lambda: sampler.poll() is None, trainer)
            said = sampler.communicate()[0]
        return _innermost(stacks.read_text()) if sampler.returncode == 0 and stacks.exists() else said.strip()


def _fetch_while(goes_on: Callable[[], Any], trainer: Trainer) -> None:
    deadline = time.monotonic() + 4 * _SAMPLING_S
    while goes_on() and time.monotonic() < deadline:
        _fetch_once(trainer)


def _innermost(stacks: str) -> str:
    """Of lines "outermost;...;innermost count", the functions at the end of most samples."""
    counts: Counter[str] = Counter()
    for line in stacks.splitlines():
        frames, _, count = line.rpartition(" ")
        counts[frames.rpartition(";")[2]] += int(count)
    total = counts.total() or 1
    return "\n".join(f"{count / total:6.1%}  {frame}" for frame, count in counts.most_common(_NUM_FUNCTIONS))
