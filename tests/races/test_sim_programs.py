"""Random programs on the simulated device: no race, no wrong byte, no lost byte."""

from __future__ import annotations

import collections
import dataclasses

import pytest
import torch

from gpu_cache import TensorCache, reaper
from gpu_cache.config import ReadyMode
from gpu_cache.pool import slab
from tests.support.sim_accounts import check_accounts
from tests.support.sim_device import SimDevice
from tests.support.sim_observer import observe
from tests.support.sim_program import Program, SimFaultError, run_script, run_seed
from tests.support.sim_script import Script, random_script
from tests.support.sim_shards import contents
from tests.support.sim_steps import WEIGHTS
from tests.support.sim_world import CONFIG, SMALL_SLOTS, TIERED
from tests.support.sources import DictSource
from tests.support.threads import run_threads

pytestmark = pytest.mark.usefixtures("quiet_simulation")

BLOCK = 25  # programs a test
NUM_BLOCKS = 4  # of each configuration
BLOCKS = [0, 1, *(pytest.param(block, marks=pytest.mark.slow) for block in range(2, NUM_BLOCKS))]
PARTS, PART = 20, 1_000  # of the long test: 20,000 programs

CONFIGS = {
    "small pool": CONFIG,
    "noted fence": dataclasses.replace(CONFIG, reuse_fence="noted"),
    "roomy": dataclasses.replace(CONFIG, pool_bytes=512 << 10, slab_bytes=128 << 10, staging_slots=4),
    "tiny pool": dataclasses.replace(CONFIG, pool_bytes=24 << 10, prealloc_bytes=0, slab_bytes=8 << 10),
    "host tier": TIERED,
    "small host tier": dataclasses.replace(TIERED, host_tier_bytes=24 << 10, reuse_fence="noted"),
    "one run a slot": SMALL_SLOTS,
}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", CONFIGS)
def test_programs_raise_no_alarm(name: str, block: int) -> None:
    first = (list(CONFIGS).index(name) * NUM_BLOCKS + block) * BLOCK
    for seed in range(first, first + BLOCK):
        run_seed(seed, CONFIGS[name])


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS), ids=lambda part: f"part-{part:02}")
def test_many_programs_raise_no_alarm(part: int) -> None:
    name = list(CONFIGS)[part % len(CONFIGS)]
    steps: list[int] = []
    for seed in range(100_000 + part * PART, 100_000 + (part + 1) * PART):
        run_seed(seed, CONFIGS[name], lambda program: steps.append(len(program.trace)))
    print(f"part {part}, {name}: {len(steps):,} programs, {sum(steps):,} steps")


def test_tensors_outlive_their_cache() -> None:
    for seed in range(2 * BLOCK):
        program = Program()
        try:
            program.run_on_after_close(random_script(seed, WEIGHTS))
        finally:
            program.world.close()


def test_programs_get_about() -> None:
    counts: collections.Counter[str] = collections.Counter()

    def count(program: Program) -> None:
        stats = program.world.cache.buffer_stats()
        assert stats["joined"] == 0, "a join would depend on which thread is quicker"
        counts.update({name: int(value) for name, value in stats.items() if isinstance(value, int)})
        counts.update(f"step {line.split()[0]}" for line in program.trace)
        counts.update(f"{line.split()[0]} refused" for line in program.trace if line.endswith("refused"))

    for seed in range(2 * BLOCK):
        run_seed(seed, watch=count)
    for name in ("hits", "misses", "evictions", "overflows", "fetch_errors", "cleared", "copies", "alloc_failures"):
        assert counts[name] >= BLOCK, (name, counts)
    for name in WEIGHTS:
        assert counts[f"step {name}"] >= BLOCK, (name, counts)
    assert counts["get refused"] >= 5


def test_a_program_runs_the_same_way_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reaper, "PERIOD_S", 3600.0)  # which would look when the clock says so, as would the pool
    monkeypatch.setattr(slab, "LOOK_S", 3600.0)

    def story(seed: int) -> tuple[list[str], list[str], float]:
        programs: list[Program] = []
        run_seed(seed, watch=programs.append)
        (program,) = programs
        device = program.world.device
        streams = [f"{stream} {stream.clock}" for stream in device._streams]
        return program.trace, streams, device.adversary._random.random()

    for seed in range(20):
        assert story(seed) == story(seed)


def test_a_fault_comes_with_the_steps_that_led_there() -> None:
    def plant(program: Program) -> None:
        program.world.device.faults.append("race at arena0+0: planted")
        program.run(Script.of("get 0 0 1 3; drop"))

    with pytest.raises(SimFaultError, match=r"^step 8\nrace at arena0\+0: planted\nland; .*; collect; get \[shard-3 "):
        run_script(Script(), watch=plant)


class Consumer:
    """A thread with a stream of its own that fetches, reads, drops and clears."""

    def __init__(self, cache: TensorCache, device: SimDevice, number: int) -> None:
        self._cache, self._device, self._number = cache, device, number
        self._stream = device.pooled[number]
        self._source = DictSource(contents(), f"node-{number}:1")

    def run(self) -> None:
        keys, held = list(contents()), collections.deque[torch.Tensor](maxlen=6)
        for step in range(40):
            chosen = [keys[(step * 7 + self._number + i * 5) % len(keys)] for i in range(3)]
            ready: ReadyMode = "stream" if step % 3 else "host"
            with self._device.stream(self._stream):
                tensors = self._cache.get_many(chosen, self._source, ready=ready)
            for key, tensor in zip(chosen, tensors, strict=True):
                self._device.kernel(self._stream, tensor, contents()[key].numpy())
            held.extend(tensors)
            del tensors, tensor
            if step % 4 == 3:
                self._cache.clear(chosen)


@pytest.mark.parametrize("seed", range(4))
def test_consumers_in_threads_raise_no_alarm(seed: int) -> None:
    device = SimDevice(seed)
    cache = TensorCache(dataclasses.replace(CONFIG, staging_slots=4), device=device)
    observe(cache, device)
    run_threads([Consumer(cache, device, number).run for number in range(3)])
    cache.clear()
    device.finish()
    cache.synchronize()
    assert device.faults == []
    check_accounts(cache, is_fetching=False, is_over=True)
