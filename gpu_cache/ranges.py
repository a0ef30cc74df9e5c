"""Named ranges in a profiler's trace; nothing while no profiler runs.

Torch's profiler records the thread that started it. Work of fetch threads is in a trace only if it was made with
`experimental_config=torch._C._profiler._ExperimentalConfig(profile_all_threads=True)`.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
import torch.autograd.profiler as torch_profiler

WAIT = "gpu_cache.wait"  # a call, for shards that are on their way
HANDOUT = "gpu_cache.handout"
FETCH = "gpu_cache.fetch"  # a fetching thread, for the network; so the following
STAGE = "gpu_cache.stage"  # for a staging buffer
COPY = "gpu_cache.copy"

_NOTHING: AbstractContextManager[object] = contextlib.nullcontext()


def profiled(name: str) -> AbstractContextManager[object]:
    """A range of that name around what the caller does next."""
    # Torch's flag for the whole process: `_profiler_enabled()` speaks of the calling thread, and takes twice as long.
    return torch.profiler.record_function(name) if torch_profiler._is_profiler_enabled else _NOTHING
