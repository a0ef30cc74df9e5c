"""Readers that lend memory: the cache copies it once, and hands out confirmed bytes only."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from gpu_cache import CacheConfig, FetchError, ShardReader, ShardSpec, TensorCache, TensorReader
from gpu_cache.device.host import HostDevice
from gpu_cache.pool.block import aligned
from gpu_cache.source import LentMemory, Stretch
from gpu_cache.transfer import tensor_reader, transfer
from tests.support.sim_device import SimDevice
from tests.support.sources import DictSource
from tests.support.wire_tensors import WIRE_DTYPES, patterned, same_bits

KIB = 1 << 10
CONFIG = CacheConfig(
    slab_bytes=32 * KIB, pool_bytes=256 * KIB, prealloc_bytes=0, staging_slots=2, staging_slot_bytes=16 * KIB,
    run_bytes=8 * KIB, fetch_timeout_s=5,
)  # fmt: skip
JUNK = 0xEE


class Lender:
    """Lends its shards from one array, side by side as an owner keeps them. `close` takes the memory back.

    Args:
        tensors: Its shards.
        lost_after: Confirmations that succeed; then the owner takes the memory back, and the rest comes by `read_into`.
    """

    def __init__(self, tensors: Mapping[Hashable, torch.Tensor], lost_after: float = float("inf")) -> None:
        self.node, self.keys = "node-a:1", list(tensors)
        self.failures: Mapping[Hashable, Exception] = {}
        self._tensors, self._lost_after = dict(tensors), lost_after
        self.transport, self.is_lending = "", False
        self._memory = np.full(sum(aligned(t.nbytes) for t in tensors.values()) + 1, JUNK, dtype=np.uint8)
        self._places: list[tuple[int, int]] = []
        self._left: list[ShardSpec] = []  # the part's shards that are not read yet
        self._unconfirmed: list[ShardSpec] = []
        self._read = 0  # bytes of the first of the left
        self._plain: TensorReader | None = None
        self.lent = LentMemory(torch.from_numpy(self._memory))
        self.num_stretches = self.num_confirmed = 0

    def next_specs(self) -> Sequence[ShardSpec] | None:
        if self._plain is not None:
            return self._plain.next_specs()
        if self.transport:
            return None
        self.transport, self.is_lending = "lent", True
        at, specs = 0, []
        for key, tensor in self._tensors.items():
            flat = tensor.contiguous().reshape(-1).view(torch.uint8)
            self._memory[at : at + tensor.nbytes] = flat.numpy()
            specs.append(ShardSpec(key, tensor.dtype, tuple(tensor.shape)))
            if tensor.nbytes:
                self._places.append((at, tensor.nbytes))
                self._left.append(specs[-1])
            at += aligned(tensor.nbytes)
        return specs

    def read_run(self, places: Sequence[tuple[int, int]]) -> Sequence[Stretch]:
        found = []
        for at, nbytes in places:
            begin, whole = self._places[0]
            found.append(Stretch(at, self.lent, begin + self._read, nbytes))
            self._read += nbytes
            if self._read == whole:
                self._read = 0
                del self._places[0]
                self._unconfirmed.append(self._left.pop(0))
        self.num_stretches += len(found)
        return found

    def confirm(self) -> None:
        if self.num_confirmed >= self._lost_after:
            self._memory[:] = JUNK
            self.is_lending = False
            again = {spec.key: self._tensors[spec.key] for spec in (*self._unconfirmed, *self._left)}
            self._plain = TensorReader(self.node, list(again), lambda: list(again.values()))
            lost = FetchError("the owner took its memory back")
            lost.may_go_on = True
            raise lost
        self.num_confirmed += 1
        self._unconfirmed.clear()

    def read_into(self, buffers: Sequence[memoryview]) -> None:
        assert self._plain is not None
        self._plain.read_into(buffers)

    def cancel(self) -> None:
        pass

    def close(self) -> None:
        self._memory[:] = JUNK


class LenderSource:
    def __init__(self, tensors: Mapping[Hashable, torch.Tensor], lost_after: float = float("inf")) -> None:
        self.tensors, self.lost_after = tensors, lost_after
        self.readers: list[Lender] = []

    def open(self, keys: Sequence[Hashable], timeout_s: float) -> list[ShardReader]:
        self.readers.append(Lender({key: self.tensors[key] for key in keys}, self.lost_after))
        return [self.readers[-1]]


class Refusing(SimDevice):
    """Cannot read memory of other processes."""

    def reads(self, memory: LentMemory) -> bool:
        return False


DEVICES: dict[str, Callable[[], Any]] = {
    "host": HostDevice,
    "staging host": lambda: HostDevice(stages=True),
    "simulated": SimDevice,
    "refusing": Refusing,
}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Any:
    return DEVICES[request.param]()


@pytest.fixture
def cache(device: Any) -> Iterator[TensorCache]:
    made = TensorCache(CONFIG, device=device)
    yield made
    made.clear()
    assert getattr(device, "faults", []) == []


def batch(*sizes: int) -> dict[Hashable, torch.Tensor]:
    return {f"s{number}": patterned(torch.uint8, size, seed=number) for number, size in enumerate(sizes)}


MIXED = batch(1, 511, 512, 513, 0, 7 * KIB, 40 * KIB, 3, 16 * KIB, 30 * KIB + 1, 100)


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
def test_every_dtype_arrives_bit_by_bit(cache: TensorCache) -> None:
    tensors: dict[Hashable, torch.Tensor] = {str(dtype): patterned(dtype, 3, 7) for dtype in WIRE_DTYPES}
    found = cache.get_many(list(tensors), LenderSource(tensors))
    assert all(same_bits(one, other) for one, other in zip(found, tensors.values(), strict=True))


@pytest.mark.parametrize("seed", range(8))
def test_shards_of_any_length_arrive_before_the_memory_is_taken_back(seed: int) -> None:
    for make in DEVICES.values():
        device = make()
        if isinstance(device, SimDevice):
            device.adversary.begin(seed, 0)
        with contextlib.closing(TensorCache(CONFIG, device=device)) as cache:
            found = cache.get_many(list(MIXED), LenderSource(MIXED))
            assert all(same_bits(one, other) for one, other in zip(found, MIXED.values(), strict=True))
            del found
            cache.clear()
        assert getattr(device, "faults", []) == []


@pytest.mark.parametrize("lost_after", [0, 1, 2])
def test_memory_that_the_owner_takes_back_is_read_by_another_way(cache: TensorCache, lost_after: int) -> None:
    source = LenderSource(MIXED, lost_after)
    found = cache.get_many(list(MIXED), source)
    assert all(same_bits(one, other) for one, other in zip(found, MIXED.values(), strict=True))
    (reader,) = source.readers
    assert reader.num_confirmed <= lost_after


def test_memory_that_does_not_last_is_staged() -> None:
    device, source = SimDevice(), LenderSource(MIXED)
    opened = source.open
    source.open = lambda keys, timeout_s: [not_lasting(reader) for reader in opened(keys, timeout_s)]  # type: ignore
    with contextlib.closing(TensorCache(CONFIG, device=device)) as cache:
        found = cache.get_many(list(MIXED), source)
        assert all(same_bits(one, other) for one, other in zip(found, MIXED.values(), strict=True))
        assert cache.buffer_stats()["pinned_capacity_bytes"] > 0
        assert source.readers[0].lent.readers == {}, "no device has registered it"
    assert device.faults == []


def not_lasting(reader: Any) -> Any:
    reader.lent.is_lasting = False
    return reader


def test_a_device_that_reads_lent_memory_takes_no_staging_buffer() -> None:
    with contextlib.closing(TensorCache(CONFIG, device=SimDevice())) as cache:
        cache.get_many(list(MIXED), LenderSource(MIXED))
        assert cache.buffer_stats()["pinned_capacity_bytes"] == 0
        assert cache.buffer_stats()["h2d_bytes"] >= sum(tensor.nbytes for tensor in MIXED.values())


def test_a_host_tier_takes_lent_bytes_by_one_copy() -> None:
    config = dataclasses.replace(CONFIG, host_tier_bytes=128 * KIB)
    with contextlib.closing(TensorCache(config, device=SimDevice())) as cache:
        found = cache.get_many(list(MIXED), LenderSource(MIXED), prefer="host")
        assert all(same_bits(one, other) for one, other in zip(found, MIXED.values(), strict=True))


def test_a_copy_that_the_device_refuses_fails_the_call_and_leaves_the_memory_until_others_are_done() -> None:
    device = SimDevice()
    with contextlib.closing(TensorCache(CONFIG, device=device)) as cache:
        device.refuse("copy", 1)
        with pytest.raises(FetchError):
            cache.get_many(list(MIXED), LenderSource(MIXED))
        found = cache.get_many(list(MIXED), LenderSource(MIXED))
        assert all(same_bits(one, other) for one, other in zip(found, MIXED.values(), strict=True))
    assert device.faults == []


def test_each_copy_is_waited_for_also_behind_one_whose_wait_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    device, waited = SimDevice(), list[Any]()
    real = device.synchronize

    def wait(event: Any) -> None:
        waited.append(event)
        real(event)
        if event is waited[0]:
            raise RuntimeError("the device is lost")

    tensors = batch(*[8 * KIB] * 8)  # two in each window
    with contextlib.closing(TensorCache(CONFIG, device=device)) as cache, monkeypatch.context() as patch:
        patch.setattr(device, "synchronize", wait)
        with pytest.raises(FetchError, match="lost"):
            cache.get_many(list(tensors), LenderSource(tensors))
        patch.undo()
    assert len(set(map(id, waited))) == 4


@pytest.mark.parametrize(("make", "order"), [(Refusing, ["confirm", "wait"]), (SimDevice, ["wait", "confirm"])])
def test_only_copies_that_read_lent_memory_are_waited_for(
    make: Callable[[], SimDevice], order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    device, done = make(), []
    wait, confirm = device.synchronize, Lender.confirm
    monkeypatch.setattr(device, "synchronize", lambda event: (done.append("wait"), wait(event)))
    monkeypatch.setattr(Lender, "confirm", lambda lender: (done.append("confirm"), confirm(lender)))
    tensors = batch(*[700] * 10)
    with contextlib.closing(TensorCache(CONFIG, device=device)) as cache:
        found = cache.get_many(list(tensors), LenderSource(tensors))
        assert done[:2] == order
        assert all(same_bits(one, other) for one, other in zip(found, tensors.values(), strict=True))
        del found
    assert device.faults == []


def test_neighbours_are_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    device = HostDevice(stages=True)
    copied: list[int] = []

    def copy_all(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], stream: Any) -> None:
        copied.extend(dst.copy_(src).numel() for dst, src in pairs)

    monkeypatch.setattr(device, "copy_all", copy_all)
    tensors = batch(*[700] * 10)
    with contextlib.closing(TensorCache(CONFIG, device=device)) as cache:
        found = cache.get_many(list(tensors), LenderSource(tensors))
        assert all(same_bits(one, other) for one, other in zip(found, tensors.values(), strict=True))
    assert copied == [9 * 1024 + 700]


@pytest.mark.parametrize("kind", [LenderSource, DictSource])
def test_a_window_that_is_placed_in_many_holes_is_one_call_without_the_gil(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    number, calls, copy = 10, list[int](), torch._foreach_copy_
    config = dataclasses.replace(CONFIG, slab_bytes=20 * KIB, pool_bytes=20 * KIB, run_bytes=KIB)
    tensors = batch(*[KIB] * number)

    def copied(to: Sequence[torch.Tensor], of: Sequence[torch.Tensor]) -> None:
        calls.append(len(to))
        copy(to, of)

    with contextlib.closing(TensorCache(config, device=HostDevice())) as cache:
        for at in range(2 * number):
            cache.put(at, torch.zeros(KIB, dtype=torch.uint8))
        cache.clear(range(0, 2 * number, 2))
        with monkeypatch.context() as patch:
            patch.setattr(torch, "_foreach_copy_", copied)
            patch.setattr(torch.Tensor, "copy_", None)
            if kind is DictSource:  # it copies into views of the arena, which are slices of one
                patch.setattr(torch.Tensor, "numpy", None)
            found = cache.get_many(list(tensors), kind(tensors))
        assert all(same_bits(one, other) for one, other in zip(found, tensors.values(), strict=True))
    assert calls == [number]


class Clock:
    """The time as a transfer sees it: the host's Python takes what a test says, and pauses are noted."""

    def __init__(self) -> None:
        self.now = time.monotonic()
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.mark.parametrize(("read_s", "num_pauses"), [(0.0, 3), (1e-4, 3), (0.01, 0)])
@pytest.mark.parametrize("kind", [LenderSource, DictSource])
def test_a_fetch_thread_pauses_only_where_its_reads_do_not_wait(
    read_s: float, num_pauses: int, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, device, copy = Clock(), HostDevice(stages=True), HostDevice.copy_all

    def copied(self: HostDevice, *args: Any) -> None:
        clock.now += 0.001  # Python of one window
        copy(self, *args)

    def read(pairs: Any) -> None:
        clock.now += read_s
        torch._foreach_copy_([to for to, _ in pairs], [of for _, of in pairs])

    monkeypatch.setattr(transfer, "time", clock)
    monkeypatch.setattr(HostDevice, "copy_all", copied)
    monkeypatch.setattr(transfer, "copy_on_host", read)
    monkeypatch.setattr(tensor_reader, "copy_on_host", read)
    monkeypatch.setattr(HostDevice, "reads", lambda *_: False)
    tensors = batch(*[8 * KIB] * 24)  # two in each window, of which the last one has none behind it
    with contextlib.closing(TensorCache(CONFIG, device=device)) as cache:
        found = cache.get_many(list(tensors), kind(tensors))
        assert all(same_bits(one, other) for one, other in zip(found, tensors.values(), strict=True))
    assert len(clock.pauses) == num_pauses
