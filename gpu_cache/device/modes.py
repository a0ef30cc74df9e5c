"""Torch's state around our code: keeps modes and transforms away from it, and shows it to the profiler."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
import torch.autograd.profiler as torch_profiler
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._ops import mode_stack_state_for_pre_dispatch
from torch.utils._python_dispatch import _disable_current_modes

_Method = TypeVar("_Method", bound=Callable[..., object])
_NO_CHANGE = contextlib.nullcontext()
_PRE_DISPATCH: Any = mode_stack_state_for_pre_dispatch()  # type: ignore[no-untyped-call]  # of modes that `torch.export` traces with


def eager(method: _Method) -> _Method:
    """Keep `torch.compile`, which would trace threads and locks, and every mode of the caller out of a method."""

    @functools.wraps(method)
    def plain(*args: Any, **options: Any) -> object:
        with plain_tensors():
            return method(*args, **options)

    return cast(_Method, _untraced(plain))


def _untraced(function: Callable[..., object]) -> Callable[..., object]:
    """`torch.compiler.disable`, without its import of the compiler, which takes 1.8 s of every process.

    Source: our measurement, torch 2.13: 3.8 s of processor time to import a cache with it, 2.0 without.
    """
    frames: Any = torch._C._dynamo.eval_frame
    try:
        skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.SKIP)
        frames.set_code_exec_strategy(function.__code__, skip)
    except AttributeError:  # a torch that has other names for it
        return torch.compiler.disable(function)  # type: ignore[no-untyped-call, no-any-return]
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function


def plain_tensors() -> contextlib.AbstractContextManager[object]:
    """Build tensors as if no inference mode, function mode, dispatch mode or transform (`torch.func`) were active here.

    A later training step could not save a tensor born in inference mode for backward. A fake-tensor mode would refuse
    to carve. A tensor born inside a transform is dead after it. A function mode, such as that of a default device, is a
    caller's code: a look at a tensor under a lock would run it. A call costs under 1 us, with function modes too.
    """
    is_plain = not (torch.is_inference_mode_enabled() or torch._C._len_torch_dispatch_stack())
    if is_plain and torch._C._functorch.peek_interpreter_stack() is None and not _PRE_DISPATCH.count():
        return torch._C.DisableTorchFunction() if torch._C._len_torch_function_stack() else _NO_CHANGE
    return _without_modes()


@contextlib.contextmanager
def _without_modes() -> Iterator[None]:
    with (
        torch._C.DisableTorchFunction(),
        torch.inference_mode(False),
        _disable_current_modes(),
        temporarily_clear_interpreter_stack(),
    ):
        yield


WAIT = "gpu_cache.wait"  # a call waits for shards that are on their way
HANDOUT = "gpu_cache.handout"
FETCH = "gpu_cache.fetch"  # a fetch thread waits for the network
STAGE = "gpu_cache.stage"  # a fetch thread waits for a staging buffer
COPY = "gpu_cache.copy"  # a thread enqueues copies


def profiled(name: str) -> contextlib.AbstractContextManager[object]:
    """A `with` that a profiler's trace shows as a range of that name; nothing while no profiler runs.

    Torch's profiler records the thread that started it. Work of fetch threads is in a trace only if it was made with
    `experimental_config=torch._C._profiler._ExperimentalConfig(profile_all_threads=True)`.
    """
    # Torch's flag for the whole process: `_profiler_enabled()` speaks of the calling thread, and takes twice as long.
    return torch.profiler.record_function(name) if torch_profiler._is_profiler_enabled else _NO_CHANGE
