"""Assumptions about CUDA graph capture, each in a process of its own: a capture that breaks takes its process along."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

from gpu.findings import Assumption

ROOT = Path(__file__).resolve().parents[2]
_DEADLINE_S = 120

_BEGIN = """
import os, threading, torch
from gpu_cache.device import CudaDevice
from tests.support.cuda_devices import in_thread
from tests.support.gpu_scene import *
torch.cuda.init()
device, graph = CudaDevice(0), torch.cuda.CUDAGraph()
total, event = torch.zeros(4, device=GPU), torch.cuda.Event()
total.add_(0)
event.record()
torch.cuda.synchronize()
"""
_END = """
graph.replay()
print("allowed" if total.tolist() == [1.0] * 4 else f"replayed {total.tolist()}", flush=True)
os._exit(0)
"""
# What is done while `total.add_(1)` is being captured.
_INSIDE = (
    _BEGIN
    + """
try:
    with torch.cuda.graph(graph):
        total.add_(1)
        CALL
except BaseException as error:
    print("refused:", str(error).splitlines()[0], flush=True)
    os._exit(0)
"""
    + _END
)
_POOL = (
    _BEGIN
    + """
pool = torch.cuda.MemPool()
with torch.cuda.use_mem_pool(pool, GPU):
    held = torch.empty(MIB, dtype=torch.uint8, device=GPU)
del held
with torch.cuda.graph(graph):
    total.add_(1)
    del pool
"""
    + _END
)
# A thread has seen that nothing is being captured, and is about to record its events, when a capture begins.
_FENCE = (
    _BEGIN
    + """
cache = small_cache()
fetch(cache, "a", 5)
is_at_it, has_begun = threading.Event(), threading.Event()
record_all = CudaDevice.record_all


def late(device, streams):
    if threading.current_thread().name == "clears":
        is_at_it.set()
        has_begun.wait(30)
    return record_all(device, streams)


CudaDevice.record_all = late
thread = threading.Thread(target=cache.clear, name="clears")
thread.start()
is_at_it.wait(30)
try:
    if not is_at_it.is_set():
        raise RuntimeError("the clear recorded no fence")
    with torch.cuda.graph(graph):
        total.add_(1)
        has_begun.set()
        thread.join(30)
    graph.replay()
    cache.synchronize()
    print("both work" if is_all(fetch(cache, "b", 7), 7) else "wrong bytes", flush=True)
except BaseException as error:
    print(type(error).__name__, str(error).splitlines()[0], flush=True)
os._exit(0)
"""
)


def outcome(code: str) -> str:
    """The last line that a process prints, or how it ended."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=_DEADLINE_S, check=False
    )
    if done.returncode:
        last_words = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return f"the process ended with status {done.returncode}: {last_words}"
    return (done.stdout.strip().splitlines() or ["it printed nothing"])[-1]


def look(code: str, *fine: str) -> tuple[bool, str]:
    """Whether what the process says begins in one of the ways that are fine."""
    found = outcome(code)
    return found.startswith(fine), found


def _inside(name: str, call: str, *, is_ours: bool = False) -> Assumption:
    """What a capture says to a call: one of ours must be allowed; a raw one is avoided, so that either is fine."""
    code, expected = _INSIDE.replace("CALL", call), "allowed" if is_ours else "refused"
    return Assumption(name, expected, partial(look, code, *{expected, "allowed"}), is_separate=True)


ASSUMPTIONS = [
    _inside("query in a capture", "event.query()"),
    _inside("wait in a capture", "torch.cuda.current_stream().wait_event(event)"),
    _inside("query beside a capture", "in_thread(event.query)"),
    _inside("our query beside a capture", "in_thread(lambda: device.query(event))", is_ours=True),
    _inside("our arena beside a capture", "in_thread(lambda: device.arena(MIB))", is_ours=True),
    _inside("our buffer beside a capture", "in_thread(lambda: device.release_pinned(device.pinned(MIB)))",
            is_ours=True),
    Assumption("pool dies in a capture", "ends the process: ours wait for the capture's end",
               partial(look, _POOL, ""), is_separate=True),
    Assumption("capture begins under the fence", "both work", partial(look, _FENCE, "both work"), is_separate=True),
]  # fmt: skip
