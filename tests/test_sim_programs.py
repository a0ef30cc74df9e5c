"""Random programs on the simulated device: no race, no wrong byte, no lost byte."""

from __future__ import annotations

import collections
import dataclasses
import logging
from collections.abc import Iterator

import pytest
import torch

from gpu_cache import CacheConfig, TensorCache
from gpu_cache.config import ReadyMode
from tests.support.sim_device import SimDevice
from tests.support.sim_observer import check_accounts, observe
from tests.support.sim_program import CONFIG, Program, SimFaultError, few_objects, run_program
from tests.support.sim_shards import contents
from tests.support.sources import DictSource
from tests.support.threads import run_threads

BLOCK = 40  # programs a test

CONFIGS = {
    "small pool": CONFIG,
    "noted fence": dataclasses.replace(CONFIG, reuse_fence="noted"),
    "roomy": dataclasses.replace(CONFIG, pool_bytes=512 << 10, slab_bytes=128 << 10, staging_slots=4),
    "tiny pool": dataclasses.replace(CONFIG, pool_bytes=24 << 10, prealloc_bytes=0, slab_bytes=8 << 10),
    "one run a slot": dataclasses.replace(CONFIG, run_bytes=4 << 10, staging_slot_bytes=4 << 10),
}


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """Small pools overflow, and each cache says so once."""
    logging.disable(logging.WARNING)
    with few_objects():
        yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("block", range(6))
def test_programs_raise_no_alarm(block: int) -> None:
    for seed in range(block * BLOCK, (block + 1) * BLOCK):
        run_program(seed)


@pytest.mark.parametrize("config", list(CONFIGS.values())[1:], ids=list(CONFIGS)[1:])
def test_programs_raise_no_alarm_with_other_settings(config: CacheConfig) -> None:
    for seed in range(BLOCK):
        run_program(seed, config)


@pytest.mark.stress
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_many_programs_raise_no_alarm(config: CacheConfig) -> None:
    for seed in range(10_000, 10_400):
        run_program(seed, config)


def test_tensors_outlive_their_cache() -> None:
    for seed in range(BLOCK):
        program = Program(seed)
        try:
            program.run_on_after_close()
        finally:
            program.close()


def test_programs_get_about() -> None:
    counts: collections.Counter[str] = collections.Counter()

    def count(program: Program) -> None:
        stats = program.cache.buffer_stats()
        assert stats["joined"] == 0, "a join would depend on which thread is quicker"
        counts.update({name: int(value) for name, value in stats.items() if isinstance(value, int)})
        counts.update(f"step {line.split()[0]}" for line in program.trace)

    for seed in range(BLOCK):
        run_program(seed, watch=count)
    for name in ("hits", "misses", "evictions", "overflows", "fetch_errors", "cleared", "copies"):
        assert counts[name] >= BLOCK / 2, (name, counts)
    assert counts["step read"] >= 5 * BLOCK


def test_a_program_runs_the_same_way_twice() -> None:
    def story(seed: int) -> tuple[list[str], list[str], float]:
        programs: list[Program] = []
        run_program(seed, watch=programs.append)
        (program,) = programs
        streams = [f"{stream} {stream.clock}" for stream in program.device._streams]
        return program.trace, streams, program.device._adversary._random.random()

    for seed in range(5):
        assert story(seed) == story(seed)


def test_a_fault_comes_with_the_steps_that_led_there() -> None:
    program = Program(0)
    program.device.faults.append("race at arena0+0: planted")
    with pytest.raises(SimFaultError, match=r"step 1\nrace at arena0\+0: planted\n"):
        program.run()
    program.close()


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
