"""Assumptions about CUDA graph capture, each in a process of its own: a capture that breaks takes its process along.

Run with the name of one, as `python -m gpu.captures NAME`; prints how it ended.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from gpu.findings import Assumption, Bound, Figures, begins
from gpu_cache.device.cuda import CudaDevice
from tests.support.cuda_devices import in_thread
from tests.support.gpu_scene import MIB, REAL, Rig, fetch, is_all

ROOT = Path(__file__).resolve().parents[2]
_DEADLINE_S = 120
_WAIT_S = 30
_OUTCOME = "outcome"


def look(program: str, rig: Rig) -> Figures:
    """How a program ends."""
    return {_OUTCOME: rig.apart(partial(in_process, program), partial(PROGRAMS[program], rig))}


def in_process(program: str) -> str:
    """How a program ends in a process of its own."""
    paths = [str(ROOT), str(ROOT / "scripts"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return outcome(["-m", "gpu.captures", program], {**os.environ, "PYTHONPATH": os.pathsep.join(paths)})


def outcome(arguments: list[str], environ: dict[str, str] | None = None) -> str:
    """The last line that a Python process prints, or how it ended."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=_DEADLINE_S,
        check=False,
    )  # fmt: skip
    if done.returncode:
        last_words = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return f"the process ended with status {done.returncode}: {last_words}"
    return (done.stdout.strip().splitlines() or ["it printed nothing"])[-1]


class Scene:
    """What is there when a capture begins: an event that is done, ours and torch's, and a sum to add to."""

    def __init__(self, rig: Rig) -> None:
        self.rig, self.device = rig, rig.device
        self.stream = rig.cuda.current_stream(rig.device.torch_device)
        self.total = torch.zeros(4, device=rig.where)
        self.total.add_(0)
        self.event, self.ours = rig.cuda.Event(enable_timing=False), rig.device.record(self.stream)
        self.event.record(self.stream)
        rig.synchronize()

    def captured(self, *calls: Callable[[], object]) -> str:
        """Capture an addition, make the calls meanwhile, and replay it."""
        try:
            with self.rig.capturing() as graph:
                self.total.add_(1)
                for call in calls:
                    call()
        except Exception as error:
            return f"refused: {_first_line(error)}"
        graph.replay()
        found = self.total.tolist()
        return "allowed" if found == [1.0] * 4 else f"replayed {found}"


def _query(rig: Rig) -> str:
    scene = Scene(rig)
    return scene.captured(scene.event.query)


def _wait(rig: Rig) -> str:
    scene = Scene(rig)
    return scene.captured(lambda: rig.cuda.current_stream(rig.device.torch_device).wait_event(scene.event))


def _query_beside(rig: Rig) -> str:
    scene = Scene(rig)
    return scene.captured(lambda: in_thread(scene.event.query))


def _our_query(rig: Rig) -> str:
    scene = Scene(rig)
    return scene.captured(lambda: in_thread(lambda: rig.device.query(scene.ours)))


def _our_arena(rig: Rig) -> str:
    return Scene(rig).captured(lambda: in_thread(lambda: rig.device.arena(MIB)))


def _our_buffer(rig: Rig) -> str:
    return Scene(rig).captured(lambda: in_thread(lambda: rig.device.release_pinned(rig.device.pinned(MIB))))


def _pool_dies(rig: Rig) -> str:
    scene, device = Scene(rig), rig.device.torch_device
    pools = [rig.cuda.MemPool()]
    with rig.cuda.use_mem_pool(pools[0], device):
        held = rig.empty(MIB)
    del held
    return scene.captured(pools.clear)


def _capture_under_the_fence(rig: Rig) -> str:
    """A thread has seen that nothing is being captured, and is about to record its events, when a capture begins."""
    scene, cache = Scene(rig), rig.small_cache()
    fetch(cache, "a", 5)
    is_at_it, has_begun = threading.Event(), threading.Event()
    record_all = CudaDevice.record_all

    def late(device: CudaDevice, streams: Any) -> list[Any]:
        if threading.current_thread() is thread:
            is_at_it.set()
            has_begun.wait(_WAIT_S)
        return record_all(device, streams)

    def finish() -> None:
        has_begun.set()
        thread.join(_WAIT_S)

    thread = threading.Thread(target=cache.clear)
    with mock.patch.object(CudaDevice, "record_all", late):
        thread.start()
        if not is_at_it.wait(_WAIT_S):
            return "the clear recorded no fence"
        captured = scene.captured(finish)
    try:
        cache.synchronize()
        is_right = is_all(fetch(cache, "b", 7), 7)
    except Exception as error:
        return f"{captured}, then the cache fails: {_first_line(error)}"
    cache.close()
    return f"{captured}, then {'the right' if is_right else 'wrong'} bytes"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


PROGRAMS: dict[str, Callable[[Rig], str]] = {
    "query in a capture": _query,
    "wait in a capture": _wait,
    "query beside a capture": _query_beside,
    "our query beside a capture": _our_query,
    "our arena beside a capture": _our_arena,
    "our buffer beside a capture": _our_buffer,
    "pool dies in a capture": _pool_dies,
    "capture begins under the fence": _capture_under_the_fence,
}


def _assumption(name: str, claim: str, bound: Bound) -> Assumption:
    return Assumption(name, claim, partial(look, name), {_OUTCOME: bound}, is_separate=True)


# Torch raises one of these for what CUDA refuses; any other error is the check's own.
_REFUSED = ("refused: RuntimeError", "refused: AcceleratorError")
_AVOIDED, _OURS = begins(*_REFUSED, "allowed"), begins("allowed")

ASSUMPTIONS = [
    *(_assumption(name, "breaks it, so that ours avoid it; either is fine", _AVOIDED)
      for name in ("query in a capture", "wait in a capture", "query beside a capture")),
    *(_assumption(name, "leaves it intact", _OURS)
      for name in ("our query beside a capture", "our arena beside a capture", "our buffer beside a capture")),
    _assumption("pool dies in a capture", "ends the process: ours wait for the capture's end; either is fine",
                begins("the process ended with status -", *_REFUSED, "allowed")),
    _assumption("capture begins under the fence", "both work", begins("allowed, then the right bytes")),
]  # fmt: skip

if __name__ == "__main__":
    torch.cuda.init()
    print(PROGRAMS[sys.argv[1]](REAL), flush=True)
    os._exit(0)
