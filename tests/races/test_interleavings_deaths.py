"""The fetching thread dies at each step of its way: the waiting are told at once, nothing is lost, the rest goes on."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import pytest

from gpu_cache import CacheConfig, FetchError, ShardReader, ShardSpec, TensorCache
from gpu_cache.device.host import HostDevice
from gpu_cache.transfer import transfer
from tests.support.interleave_actors import PATIENCE_S, Board, SteppedReader, in_background
from tests.support.interleave_stage import GATES, NODE, SHARDS, Stage, eventually
from tests.support.sources import DictSource, same_bytes

pytestmark = pytest.mark.usefixtures("quick_collections")

DEATHS = [SystemExit, KeyboardInterrupt, MemoryError]


class Death:
    """Raises at the n-th visit of one place, as "read_into 1"; a place without a number is the first visit."""

    def __init__(self, place: str, kind: type[BaseException]) -> None:
        name, _, number = place.partition(" ")
        self._name, self._number, self.error = name, int(number or 0), kind("killed")
        self._visits: collections.Counter[str] = collections.Counter()

    def visit(self, name: str) -> None:
        self._visits[name] += 1
        if name == self._name and self._visits[name] == self._number + 1:
            raise self.error

    @property
    def has_come(self) -> bool:
        return self._visits[self._name] > self._number


class DyingReader(SteppedReader):
    """Delivers "a" and "b", then "c", and stops nowhere."""

    def __init__(self, *deaths: Death) -> None:
        self._deaths = deaths
        super().__init__(NODE, [["a", "b"], ["c"]], SHARDS, Board())
        self._credit = 1000
        self.num_closed = 0

    def _visit(self, name: str) -> None:
        for death in self._deaths:
            death.visit(name)

    def next_specs(self) -> Sequence[ShardSpec] | None:
        self._visit("next_specs")
        return super().next_specs()

    def read_into(self, buffers: Sequence[memoryview]) -> None:
        self._visit("read_into")
        super().read_into(buffers)

    @property
    def failures(self) -> Mapping[Hashable, Exception]:
        self._visit("failures")
        return {}

    @failures.setter
    def failures(self, value: object) -> None:
        pass

    def close(self) -> None:
        self.num_closed += 1
        self._visit("close")
        super().close()


class DyingDevice(HostDevice):
    """Host memory whose calls, once a test has planned a death, may be the last ones of their thread."""

    death: Death | None = None

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name in _DEVICE_CALLS and (death := super().__getattribute__("death")) is not None:
            death.visit(name)
        return found


_DEVICE_CALLS = {"arena", "pinned", "copy_all", "record", "synchronize", "elapsed_s"}

# Where the thread dies, and the shards that have arrived by then. Each is a run and a window of its own.
IN_THE_READER = {
    "next_specs": "", "read_into": "", "read_into 1": "a", "next_specs 1": "ab", "read_into 2": "ab",
    "next_specs 2": "abc", "close": "abc", "failures": "abc",
}  # fmt: skip
ON_THE_DEVICE = {
    "arena": "", "arena 1": "ab", "pinned": "", "record": "", "copy_all": "", "record 1": "", "record 2": "a",
    "copy_all 1": "a", "record 3": "a", "synchronize": "a", "elapsed_s": "a", "copy_all 2": "ab", "record 5": "ab",
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_window_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_DIRECT_SLOTS", 4)


class Source:
    """Opens one reader."""

    def __init__(self, reader: ShardReader) -> None:
        self._reader = reader

    def open(self, keys: Sequence[Hashable], timeout_s: float) -> Iterable[ShardReader]:
        return [self._reader]


CONFIG = CacheConfig(
    slab_bytes="64KiB", pool_bytes="192KiB", prealloc_bytes=0, run_bytes="32KiB", staging_slots=1,
    staging_slot_bytes="32KiB",
)  # fmt: skip


def check_death(stage: Stage, reader: DyingReader, death: Death, arrived: str) -> None:
    """All waiters are told at once, by shard; arrived shards are cached; the next call asks for the rest."""
    cache, lost = stage.cache, set("abc") - set(arrived)
    began = time.monotonic()
    call = in_background(lambda: cache.get_many(["a", "b", "c"], Source(reader), timeout_s=PATIENCE_S))
    error = call.exception(PATIENCE_S)
    assert time.monotonic() - began < PATIENCE_S / 3, "the waiters were not told"
    assert death.has_come
    if lost:
        assert isinstance(error, FetchError)
        assert set(error.failures) == lost
        assert death.error in error.failures.values()
    else:
        assert error is None
    assert reader.num_closed == 1
    assert set(cache.keys()) == set(arrived)
    del error, call
    eventually(lambda: not [one for one in threading.enumerate() if one.name == "gpu-cache-fetch"])
    assert_usable(cache, lost)
    stage.check_nothing_lost()


def assert_usable(cache: TensorCache, lost: set[str]) -> None:
    source = DictSource(SHARDS)
    tensors = cache.get_many(["a", "b", "c"], source)
    assert all(map(same_bytes, tensors, SHARDS.values()))
    assert source.asked == ([sorted(lost)] if lost else [])


@pytest.mark.parametrize("kind", DEATHS)
@pytest.mark.parametrize("stages", [False, True], ids=["direct", "staged"])
@pytest.mark.parametrize(("place", "arrived"), IN_THE_READER.items())
def test_a_thread_that_dies_in_its_reader_tells_all_waiters(
    place: str, arrived: str, stages: bool, kind: type[BaseException]
) -> None:
    death = Death(place, kind)
    check_death(Stage(HostDevice(stages), CONFIG), DyingReader(death), death, arrived)


@pytest.mark.parametrize("kind", DEATHS)
@pytest.mark.parametrize(("place", "arrived"), ON_THE_DEVICE.items())
def test_a_thread_that_dies_in_a_call_of_the_device_tells_all_waiters(
    place: str, arrived: str, kind: type[BaseException]
) -> None:
    device = DyingDevice(stages=True)
    death = device.death = Death(place, kind)
    check_death(Stage(device, CONFIG), DyingReader(Death("nowhere", kind)), death, arrived)


@pytest.mark.parametrize("place", ["close", "failures"])
def test_a_thread_that_dies_when_its_stream_has_broken_tells_all_waiters(place: str) -> None:
    broken, death = Death("read_into 1", ConnectionResetError), Death(place, SystemExit)
    reader = DyingReader(broken, death)
    check_death(Stage(HostDevice(), CONFIG), reader, broken if place == "close" else death, "a")
    assert death.has_come


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("kind", DEATHS)
def test_a_joiner_of_a_thread_that_died_asks_for_itself(gate: str, kind: type[BaseException]) -> None:
    stage, own = Stage(HostDevice(stages=True), CONFIG), DictSource(SHARDS)
    future = stage.cache.prefetch(["a"], stage.source)
    reader = stage.at(gate)
    call = in_background(lambda: stage.cache.get_many(["a"], own))
    eventually(lambda: stage.cache.buffer_stats()["joined"])
    error = kind("killed")
    reader.break_off(error)
    assert same_bytes(call.result(PATIENCE_S)[0], SHARDS["a"])
    assert own.asked == [["a"]]
    failure = future.exception(PATIENCE_S)
    assert isinstance(failure, FetchError)
    assert failure.failures == {"a": error}
    del failure, future, call
    stage.check_nothing_lost()


@pytest.mark.parametrize("kind", DEATHS)
@pytest.mark.parametrize("place", ["pinned", "record", "copy_all", "record 1", "arena"])
def test_a_put_that_is_interrupted_loses_nothing(place: str, kind: type[BaseException]) -> None:
    device = DyingDevice(stages=True)
    stage, death = Stage(device, CONFIG), Death(place, kind)
    device.death = death
    with pytest.raises(kind) as caught:
        stage.cache.put("a", SHARDS["a"])
    assert caught.value is death.error
    del caught
    assert stage.cache.keys() == []
    assert stage.cache.put("a", SHARDS["a"])
    assert_usable(stage.cache, {"b", "c"})
    stage.check_nothing_lost()


def test_a_source_that_is_interrupted_after_its_first_reader_closes_that() -> None:
    stage, reader = Stage(HostDevice(), CONFIG), DyingReader()

    class Interrupted:
        def open(self, keys: Sequence[Hashable], timeout_s: float) -> Iterable[ShardReader]:
            yield reader
            raise KeyboardInterrupt

    for call in (stage.cache.get_many, stage.cache.prefetch):
        with pytest.raises(KeyboardInterrupt):
            call(["a", "b", "c", "d"], Interrupted())
    assert reader.num_closed == 2
    assert_usable(stage.cache, set("abc"))
    stage.check_nothing_lost()
