"""Processes that use a GPU: first use, several caches, fork, exit."""

from __future__ import annotations

import pytest
import torch

from tests.support.cuda_devices import in_thread
from tests.support.gpu_process import run_python
from tests.support.gpu_scene import GPU, MIB, fetch, is_all, small_cache

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("failures_stay_alone")]

FIRST_USE = """
import os
import torch
from gpu_cache import TensorCache
from tests.support.sources import DictSource


def driver_files():
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return sum("nvidia" in os.readlink(link) for link in links if os.path.islink(link))


cache, source = TensorCache(), DictSource({"a": torch.arange(3)})
(tensor,) = cache.get_many(["a"], source)
print(cache.device_name, tensor.device, torch.cuda.is_initialized(), driver_files())
cache.clear()
torch.ones(1, device="cuda:0")
(tensor,) = cache.get_many(["a"], source)
print(cache.device_name, tensor.device, torch.cuda.is_initialized(), tensor.tolist())
"""


def test_a_first_use_makes_no_context_and_follows_the_process_once_it_has_one() -> None:
    printed = run_python("-c", FIRST_USE, GPU_CACHE_SLAB_BYTES="16MiB", GPU_CACHE_PREALLOC_BYTES="0")
    assert printed.splitlines() == ["cpu cpu False 0", "cuda:0 cuda:0 True [0, 1, 2]"]


FORK = """
import gc, os, sys
import torch
from gpu_cache import CacheClosedError, TensorCache
from tests.support.gpu_scene import *

cache = small_cache(pool_bytes="64MiB")
kept = [fetch(cache, number, number) for number in range(4)]
cache.clear([3])
child = os.fork()
if child == 0:
    try:
        cache.get(0)
    except CacheClosedError:
        own = TensorCache()
        own.put("a", torch.arange(3))
        print("child", own.device_name, own.get("a").tolist(), flush=True)
    del kept, cache
    gc.collect()
    {ending}
print("child ended with", os.waitpid(child, 0)[1])
print([is_all(tensor, number) for number, tensor in enumerate(kept)], is_all(fetch(cache, "new", 7), 7))
"""


@pytest.mark.parametrize("ending", ["os._exit(0)", "sys.exit(0)"])
def test_a_forked_child_leaves_its_parents_device_alone(ending: str) -> None:
    assert run_python("-c", FORK.format(ending=ending)).splitlines() == [
        "child cpu [0, 1, 2]",
        "child ended with 0",
        "[True, True, True, True] True",
    ]


EXIT = """
import threading
import torch
from gpu_cache import TensorReader
from tests.support.gpu_scene import *

cache = small_cache(pool_bytes="64MiB")
held = fetch(cache, "held", 5)
engine = cache._lazy.open()
load_kernels(engine.transfer.stream)
keep_busy(engine.transfer.stream)
late = fetch(cache, "late", 6, ready="stream")
cut = threading.Event()


class Stuck:
    def open(self, keys, timeout_s):
        def load():
            cut.wait(100)
            raise ConnectionAbortedError

        return [TensorReader("node", keys, load, cut.set)]


cache.prefetch(["never"], Stuck())
print("end")
"""


def test_exit_with_tensors_copies_and_a_fetch_under_way_is_clean() -> None:
    assert run_python("-c", EXIT) == "end\n"


def test_two_caches_on_one_device_share_nothing_and_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    first, second = small_cache(), small_cache()
    one, other = fetch(first, "a", 1), fetch(second, "a", 2)
    assert (is_all(one, 1), is_all(other, 2)) == (True, True)
    assert caplog.text.count("2 caches on cuda:0 in one process") == 1
    first.close()
    assert is_all(fetch(second, "b", 3, MIB), 3)


def test_a_cache_on_a_second_device_never_touches_the_first() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    cache = small_cache(device="cuda:1")
    current = torch.cuda.current_device()
    allocated = torch.cuda.memory_allocated(GPU)
    tensor = in_thread(lambda: fetch(cache, "a", 5))
    assert tensor.device == torch.device("cuda:1")
    assert is_all(tensor.cpu(), 5)
    assert (torch.cuda.current_device(), torch.cuda.memory_allocated(GPU)) == (current, allocated)
