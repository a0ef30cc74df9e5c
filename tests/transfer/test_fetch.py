"""Fetches that end badly: nothing stays pending, no range is lost, the next call works."""

from __future__ import annotations

import dataclasses
import gc
import sys
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future, wait
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gpu_cache import CacheClosedError, CacheConfig, FetchError, ShardReader, ShardSpec, TensorCache, TensorReader
from gpu_cache.device.host import HostDevice
from gpu_cache.transfer import fetch
from tests.support.interleave_actors import in_background
from tests.support.interleave_stage import eventually
from tests.support.sources import DictSource, GatedReader, gated, same_bytes, some_tensors
from tests.support.threads import run_threads

CONFIG = CacheConfig(
    slab_bytes="2MiB", pool_bytes="8MiB", staging_slots=2, staging_slot_bytes="64KiB", run_bytes="16KiB"
)


@pytest.fixture(params=["direct", "staged"])
def cache(request: pytest.FixtureRequest) -> TensorCache:
    if request.param == "staged":
        return TensorCache(CONFIG, device=HostDevice(stages=True))
    config = dataclasses.replace(CONFIG, staging_slot_bytes="32KiB")  # a direct read is twice as long
    return TensorCache(config, device=HostDevice(stages=False))


def assert_empty(cache: TensorCache) -> None:
    """As if nothing had been asked for."""

    def is_empty() -> bool:
        cache.clear()
        cache.trim()
        assert cache._engine is not None
        return not any(cache._engine.pool.accounts().values())

    eventually(is_empty)  # a thread that ends may hold shards until then
    cache.resume()
    assert cache._index.is_empty


class BrokenReader:
    """Announces specs, delivers `good_reads` windows, then fails."""

    node = "broken:1"

    def __init__(
        self, specs: Sequence[ShardSpec], keys: Sequence[Hashable], good_reads: int, error: BaseException
    ) -> None:
        self.keys, self.failures = keys, dict[Hashable, Exception]()
        self._parts = [specs]
        self._left, self._error = good_reads, error
        self.num_closed = 0

    def next_specs(self) -> Sequence[ShardSpec] | None:
        return self._parts.pop() if self._parts else None

    def read_into(self, buffers: Sequence[memoryview]) -> None:
        if self._left == 0:
            raise self._error
        self._left -= 1
        for buffer in buffers:
            buffer[:] = b"\x01" * len(buffer)

    def cancel(self) -> None:
        pass

    def close(self) -> None:
        self.num_closed += 1


class Source:
    """Opens the readers that a function makes."""

    def __init__(self, make: Callable[[Sequence[Hashable]], Iterable[ShardReader]]) -> None:
        self._make = make

    def open(self, keys: Sequence[Hashable], timeout_s: float) -> Iterable[ShardReader]:
        return self._make(keys)


def bytes_spec(key: Hashable, nbytes: int) -> ShardSpec:
    return ShardSpec(key, torch.uint8, (nbytes,))


@pytest.mark.parametrize("good_reads", [0, 1, 2])
def test_a_stream_that_breaks_keeps_the_runs_that_arrived(cache: TensorCache, good_reads: int) -> None:
    keys = [f"k{number}" for number in range(12)]  # 16 KiB each: four runs a window
    reader = BrokenReader([bytes_spec(key, 16 << 10) for key in keys], keys, good_reads, ConnectionResetError("cut"))
    with pytest.raises(FetchError, match=r"cut .* shards failed") as caught:
        cache.get_many(keys, Source(lambda _: [reader]))
    assert len(cache) == 4 * good_reads
    assert set(caught.value.failures) == set(keys[4 * good_reads :])
    assert reader.num_closed == 1
    del caught
    tensors = {key: torch.zeros(16 << 10, dtype=torch.uint8) for key in keys}
    source = DictSource(tensors)
    assert len(cache.get_many(keys, source)) == 12
    assert source.asked == [keys[4 * good_reads :]]
    assert_empty(cache)


def test_a_large_shard_that_breaks_in_its_second_piece_loses_nothing(cache: TensorCache) -> None:
    reader = BrokenReader([bytes_spec("a", 1 << 20)], ["a"], 1, ConnectionResetError("cut"))
    with pytest.raises(FetchError):
        cache.get_many(["a"], Source(lambda _: [reader]))
    assert_empty(cache)


@pytest.mark.parametrize(
    ("announced", "message"),
    [(["a", "x"], "it sent shard 'x' without being asked for it"), (["a", "a"], "it sent shard 'a' twice")],
)
def test_a_node_that_sends_the_wrong_shards_is_not_believed(
    cache: TensorCache, announced: list[str], message: str
) -> None:
    reader = BrokenReader([bytes_spec(key, 10) for key in announced], ["a", "b"], 9, RuntimeError())
    with pytest.raises(FetchError, match=message):
        cache.get_many(["a", "b"], Source(lambda _: [reader]))
    assert len(cache) == 0
    assert_empty(cache)


@pytest.mark.parametrize("length", [0, 3])
def test_a_quantized_shard_is_refused(cache: TensorCache, length: int) -> None:
    reader = BrokenReader([ShardSpec("a", torch.quint8, (length,))], ["a"], 9, RuntimeError())
    with pytest.raises(FetchError, match=r"shards of torch.quint8 cannot be cached"):
        cache.get_many(["a"], Source(lambda _: [reader]))
    assert_empty(cache)


def test_a_reader_that_offers_a_shard_twice_is_not_believed(cache: TensorCache) -> None:
    reader = BrokenReader([], ["a", "a"], 9, RuntimeError())
    with pytest.raises(FetchError, match="broken:1 offers 'a' unasked, or twice"):
        cache.get_many(["a", "b"], Source(lambda _: [reader]))
    assert_empty(cache)


class ForgetfulReader(TensorReader):
    """A reader that has no node any more once it is closed."""

    def close(self) -> None:
        del self.node


def test_a_reader_that_has_no_node_once_it_is_closed_ends_like_any_other(cache: TensorCache) -> None:
    source = Source(lambda keys: [ForgetfulReader("node-a:1", keys, lambda: [torch.ones(3) for _ in keys])])
    assert len(cache.get_many(["a"], source)) == 1
    eventually(lambda: not cache._tasks)
    assert cache.source_stats()["node-a:1"]["entries"] == 1
    assert_empty(cache)


def test_a_callback_that_exits_keeps_no_other_call_waiting(cache: TensorCache) -> None:
    source = DictSource({name: torch.ones(3) for name in "abc"})
    readers = gated(source)
    first = cache.prefetch(["a", "b", "c"], source)
    eventually(lambda: len(readers) == 1 and readers[0].has_arrived.is_set())
    cache.prefetch(["a"], source).add_done_callback(lambda _: sys.exit("done"))
    joined = [in_background(lambda name=name: cache.get_many([name], source)) for name in "bc"]  # type: ignore[misc]
    eventually(lambda: cache.buffer_stats()["joined"] == 3)
    readers[0].gate.set()
    assert [len(one.result(30)) for one in joined] == [1, 1]
    wait([first], 30)


def test_a_shard_left_out_is_an_error_that_names_it(cache: TensorCache) -> None:
    reader = BrokenReader([bytes_spec("a", 10)], ["a", "b"], 9, RuntimeError())
    with pytest.raises(FetchError, match="shard 'b': broken:1 left it out"):
        cache.get_many(["a", "b"], Source(lambda _: [reader]))
    assert cache.keys() == ["a"]


def test_a_source_that_does_not_offer_a_key_is_an_error(cache: TensorCache) -> None:
    with pytest.raises(FetchError, match="shards 'a': no source offers them"):
        cache.get_many(["a"], Source(lambda _: []))
    assert_empty(cache)


def test_a_source_that_cannot_open_leaves_nothing_pending(cache: TensorCache) -> None:
    def fail(keys: Sequence[Hashable]) -> Iterable[ShardReader]:
        raise OSError("no route")

    with pytest.raises(OSError, match="no route"):
        cache.get_many(["a"], Source(fail))
    with pytest.raises(OSError, match="no route"):
        cache.prefetch(["a"], Source(fail))
    assert_empty(cache)


def test_a_thread_that_cannot_start_leaves_nothing_pending(cache: TensorCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.put("first", torch.ones(1))
    reader = BrokenReader([bytes_spec("a", 10)], ["a"], 9, RuntimeError())
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", lambda self: (_ for _ in ()).throw(RuntimeError("no threads left")))
        with pytest.raises(RuntimeError, match="no threads left"):
            cache.get_many(["a"], Source(lambda _: [reader]))
    assert reader.num_closed == 1
    assert not cache._tasks
    assert_empty(cache)


def test_a_late_call_gives_up_but_its_range_waits_for_the_read(cache: TensorCache) -> None:
    source = DictSource({"a": torch.full((40_000,), 1, dtype=torch.uint8)})
    readers = gated(source)
    with pytest.raises(FetchError, match=r"not here within 0\.5 s") as caught:
        cache.get_many(["a"], source, timeout_s=0.5)
    assert list(caught.value.failures) == ["a"]
    assert readers[0].is_cancelled
    assert cache._engine is not None
    assert cache.buffer_stats()["device_bytes"] > 0, "the read has not returned"
    assert cache._index.is_empty

    other = DictSource({"b": torch.full((40_000,), 2, dtype=torch.uint8)})
    (tensor,) = cache.get_many(["b"], other)
    readers[0].gate.set()
    for task in list(cache._tasks):
        task.done.result(30)
    assert bool((tensor == 2).all()), "late bytes must not land in another's range"
    assert "a" not in cache
    del tensor
    for task in list(cache._tasks):
        task.done.result(30)
    assert_empty(cache)


def test_a_joiner_of_a_call_that_gave_up_asks_for_itself(cache: TensorCache) -> None:
    source = DictSource({"a": torch.arange(10)})
    readers = gated(source)

    def claim() -> None:
        with pytest.raises(FetchError, match="not here within"):
            cache.get_many(["a"], source, timeout_s=0.3)

    claimer = threading.Thread(target=claim)
    claimer.start()
    opener = threading.Thread(target=lambda: opened(readers, 1).gate.set())
    assert opened(readers, 0).has_arrived.wait(30)
    opener.start()
    assert torch.equal(cache.get_many(["a"], source)[0], torch.arange(10))
    for thread in (claimer, opener):
        thread.join(30)
    readers[0].gate.set()
    assert source.asked == [["a"], ["a"]]
    for task in list(cache._tasks):
        task.done.result(30)
    assert_empty(cache)


def test_a_stuck_prefetch_keeps_no_call_from_fetching(cache: TensorCache) -> None:
    source = DictSource({"a": torch.arange(10)})
    readers = gated(source)
    future = cache.prefetch(["a"], source, timeout_s=0.01)
    with pytest.raises(FetchError, match="not here within"):
        cache.get_many(["a"], source, timeout_s=0.2)
    assert torch.equal(cache.get_many(["a"], DictSource({"a": torch.arange(10)}))[0], torch.arange(10))
    readers[0].gate.set()
    with pytest.raises(FetchError):
        future.result(30)


def opened(readers: list[GatedReader], number: int) -> GatedReader:
    """The reader of that number, once it was opened."""
    while len(readers) <= number:
        time.sleep(0.001)
    return readers[number]


def test_a_clear_wins_over_a_fetch_under_way_and_the_caller_still_gets_it(cache: TensorCache) -> None:
    source = DictSource({"a": torch.arange(10)})
    readers = gated(source)
    got: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: got.extend(cache.get_many(["a"], source)))
    thread.start()
    assert opened(readers, 0).has_arrived.wait(30)
    assert cache.clear(["a"]) == 0
    readers[0].gate.set()
    thread.join(30)
    assert torch.equal(got[0], torch.arange(10))
    assert "a" not in cache
    got.clear()
    assert_empty(cache)


def test_closing_ends_a_fetch_under_way(cache: TensorCache) -> None:
    source = DictSource({"a": torch.arange(10)})
    readers = gated(source)
    errors: list[CacheClosedError] = []

    def fetch() -> None:
        with pytest.raises(CacheClosedError) as caught:
            cache.get_many(["a"], source)
        errors.append(caught.value)

    thread = threading.Thread(target=fetch)
    thread.start()
    assert opened(readers, 0).has_arrived.wait(30)
    readers[0].cancel = readers[0].gate.set  # type: ignore[method-assign]
    cache.close()
    thread.join(30)
    assert len(errors) == 1
    assert readers[0].is_closed


def test_two_nodes_are_drained_in_parallel_and_fail_apart(cache: TensorCache) -> None:
    good = DictSource({"a": torch.arange(10)}, node="good:1")
    arrived = threading.Event()

    class Waits(BrokenReader):
        def next_specs(self) -> Sequence[ShardSpec] | None:
            assert arrived.wait(30), "the other reader is not drained meanwhile"
            raise ConnectionResetError("bad:1 is gone")

    def open_both(keys: Sequence[Hashable]) -> Iterable[ShardReader]:
        (inner,) = good.open(["a"], 1.0)
        (last,) = gated_then(inner, arrived)
        return [Waits([], ["b"], 0, RuntimeError()), last]

    with pytest.raises(FetchError, match="bad:1 is gone") as caught:
        cache.get_many(["a", "b"], Source(open_both))
    assert list(caught.value.failures) == ["b"]
    assert cache.keys() == ["a"]


def gated_then(inner: ShardReader, then: threading.Event) -> list[ShardReader]:
    """The reader, which tells when it is drained."""
    close = inner.close

    def tell() -> None:
        close()
        then.set()

    inner.close = tell  # type: ignore[method-assign]
    return [inner]


@pytest.mark.parametrize("ends_in_time", [False, True])
def test_threads_that_fetch_and_clear_at_random_get_the_right_bytes(cache: TensorCache, ends_in_time: bool) -> None:
    tensors = some_tensors(60)
    keys, source = list(tensors), DictSource(tensors)
    source.wrap = lambda reader: setattr(reader, "ends_in_time", ends_in_time) or reader
    prefetches: list[Future[int]] = []

    def work(seed: int) -> None:
        chooser = torch.Generator().manual_seed(seed)
        for _ in range(40):
            first, count, action = torch.randint(0, 50, (3,), generator=chooser).tolist()
            wanted = keys[first : first + count % 10 + 1]
            if action % 5 == 0:
                cache.clear(wanted)
            elif action % 5 == 1:
                prefetches.append(cache.prefetch(wanted, source))
            else:
                got = cache.get_many(wanted, source)
                assert all(same_bytes(tensor, tensors[key]) for key, tensor in zip(wanted, got, strict=True))

    run_threads([lambda seed=seed: work(seed) for seed in range(6)])
    assert not wait(prefetches, 30).not_done  # until then their threads may hold shards
    assert_empty(cache)


class TimedReader(TensorReader):
    """Takes a second to answer, or to say that there is no more, and three seconds for each read."""

    def __init__(self, clock: SimpleNamespace, fault: Exception | None) -> None:
        super().__init__("n:1", ["a", "b"], lambda: [torch.zeros(8000, dtype=torch.uint8)] * 2)
        self._clock, self._fault = clock, fault

    def next_specs(self) -> Sequence[ShardSpec] | None:
        self._clock.now += 1
        return super().next_specs()

    def read_into(self, buffers: Sequence[memoryview]) -> None:
        self._clock.now += 3
        if self._fault is not None and len(self._left) == 1:
            raise self._fault
        super().read_into(buffers)


@pytest.mark.parametrize(("fault", "told"), [(None, [("n:1", 7.0)]), (FetchError("broke off"), [])])
def test_an_answer_is_timed_from_its_request_to_its_last_byte(
    fault: Exception | None, told: list[tuple[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CacheConfig(device="cpu", staging_slot_bytes=4096, run_bytes=4096, stats=False)
    cache, clock, noted = TensorCache(config), SimpleNamespace(now=time.monotonic()), list[tuple[str, float]]()
    monkeypatch.setattr(fetch, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(cache._index, "note_answer", lambda node, s, transport: noted.append((node, round(s, 6))))
    source = SimpleNamespace(open=lambda keys, timeout_s: [TimedReader(clock, fault)])
    cache.get_many(["a", "b"], source, on_error="none")
    assert noted == told


@pytest.mark.parametrize("is_over", [False, True], ids=["in time", "too late"])
def test_a_shard_written_into_meanwhile_is_fetched_again_although_another_fails(
    cache: TensorCache, is_over: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source, wait = DictSource({"a": torch.arange(9)}), fetch.Fetch.wait
    written: list[torch.Tensor] = []

    def write_once(call: fetch.Fetch) -> None:
        wait(call)
        if not written:
            held = cache.get("a")
            assert held is not None
            written.append(held.zero_())
            call.deadline = 0.0 if is_over else call.deadline

    monkeypatch.setattr(fetch.Fetch, "wait", write_once)
    found, lacking = cache.get_many(["a", "nowhere"], source, on_error="none")
    assert lacking is None
    if is_over:
        assert found is None
        assert "2 of 2 shards failed: 'nowhere', 'a'" in caplog.text
    else:
        assert found is not None
        assert torch.equal(found, torch.arange(9))


class PunctualReader(TensorReader):
    """It says that its calls end in time, and notes the thread that drains it."""

    ends_in_time = True
    thread: int | None = None

    def next_specs(self) -> Sequence[ShardSpec] | None:
        self.thread = threading.get_ident()
        return super().next_specs()


def punctual(load: Callable[[], Sequence[torch.Tensor | Exception]], *keys: str) -> tuple[list[PunctualReader], Source]:
    """Readers of one shard each, and their source."""
    readers = [PunctualReader(f"node-{key}:1", [key], load) for key in keys]
    return readers, Source(lambda _: readers)


def test_a_calling_thread_drains_its_last_reader_itself(cache: TensorCache) -> None:
    readers, source = punctual(lambda: [torch.arange(10)], "a", "b", "c")
    calling = in_background(lambda: (cache.get_many(["a", "b", "c"], source), threading.get_ident()))
    tensors, thread = calling.result(30)
    assert [reader.thread == thread for reader in readers] == [False, False, True]
    assert all(torch.equal(tensor, torch.arange(10)) for tensor in tensors)
    assert not cache._tasks
    del tensors, calling
    assert_empty(cache)


def test_the_main_thread_drains_no_reader(cache: TensorCache) -> None:
    """Ctrl-C could come between two steps."""
    (reader,), source = punctual(lambda: [torch.arange(10)], "a")
    assert len(cache.get_many(["a"], source)) == 1
    assert reader.thread not in (None, threading.get_ident())


def test_a_prefetch_drains_no_reader_itself(cache: TensorCache) -> None:
    begun = threading.Event()
    _, source = punctual(lambda: [torch.arange(10)] if begun.wait(30) else [], "a")
    prefetching = in_background(lambda: cache.prefetch(["a"], source)).result(30)
    begun.set()
    assert prefetching.result(30) == 1


def test_closing_ends_a_call_that_drains_its_reader_itself(cache: TensorCache) -> None:
    begun, cut = threading.Event(), threading.Event()

    def load() -> list[torch.Tensor | Exception]:
        begun.set()
        assert cut.wait(30)
        return [torch.arange(10)]

    (reader,), source = punctual(load, "a")
    reader._on_cancel = cut.set
    calling = in_background(lambda: cache.get_many(["a"], source))
    assert begun.wait(30)
    cache.close()
    with pytest.raises(CacheClosedError):
        calling.result(30)
    assert not cache._tasks


def test_an_error_keeps_no_frame_of_the_thread_that_drained(cache: TensorCache) -> None:
    """Another call's error would keep the tensors of this thread's callers."""

    class Big:
        pass

    def load() -> list[torch.Tensor | Exception]:
        try:
            raise OSError("the line is down")
        except OSError as error:
            raise TypeError("no such node") from error

    kept: list[BaseException] = []

    def call() -> object:
        big = Big()
        try:
            raise KeyError("handled before")
        except KeyError:
            with pytest.raises(FetchError, match="no such node") as caught:
                cache.get_many(["a"], punctual(load, "a")[1])
            has_frames = sys.exc_info()[2] is not None
        kept.append(caught.value.failures["a"])
        return weakref.ref(big), has_frames

    dead, has_frames = in_background(call).result(30)
    gc.collect()
    assert dead() is None
    assert has_frames, "the exception that the caller handles is its own"
    assert isinstance(kept[0], TypeError)
    assert "in load" in kept[0].__notes__[0]
    assert repr(kept[0].__cause__) == "OSError('the line is down')"
    assert kept[0].__cause__.__context__ is None


class NotelessError(Exception):
    def add_note(self, note: str) -> None:
        raise RuntimeError("no notes")


class FrozenError(Exception):
    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"cannot assign to field {name!r}")


@pytest.mark.parametrize("kind", [NotelessError, FrozenError])
def test_an_error_that_takes_no_note_fails_its_shard_like_any_other(cache: TensorCache, kind: type[Exception]) -> None:
    error = kind("the line is down")

    def load() -> list[torch.Tensor | Exception]:
        raise error

    with pytest.raises(FetchError, match="the line is down") as caught:
        cache.get_many(["a"], punctual(load, "a")[1], timeout_s=30)
    assert caught.value.failures == {"a": error}
    assert error.__traceback__ is None
    assert not cache._tasks


def test_an_error_that_a_source_raises_again_and_again_has_one_note(cache: TensorCache) -> None:
    error = OSError("the line is down")

    def load() -> list[torch.Tensor | Exception]:
        raise error

    for _ in range(3):
        with pytest.raises(FetchError, match="the line is down"):
            cache.get_many(["a"], punctual(load, "a")[1])
    assert len(error.__notes__) == 1


def test_a_reader_whose_parts_are_lost_again_and_again_ends_in_time(cache: TensorCache) -> None:
    def load() -> list[torch.Tensor | Exception]:
        reader._is_loaded = False
        lost = FetchError("the part is lost")
        lost.may_go_on = True
        raise lost

    (reader,), source = punctual(load, "a")
    calling = in_background(lambda: cache.get_many(["a"], source, timeout_s=0.3))
    with pytest.raises(FetchError, match="the part is lost"):
        calling.result(10)
    assert not cache._tasks


@pytest.mark.parametrize("error", [OSError("no disk"), StopIteration(), SystemExit(3)], ids=repr)
def test_an_error_of_a_reader_of_users_is_named_with_its_node(cache: TensorCache, error: BaseException) -> None:
    reader = BrokenReader([bytes_spec("a", 10)], ["a"], 0, error)
    words = f": {error}" if str(error) else ""
    message = rf"^Failed to fetch shards from broken:1: {type(error).__name__}{words} \[1 of 1 shards failed: 'a'\]$"
    with pytest.raises(FetchError, match=message) as caught:
        cache.get_many(["a"], Source(lambda _: [reader]))
    assert caught.value.failures == {"a": error}
    with pytest.raises(FetchError, match="from broken:1: "):
        cache.prefetch(["a"], Source(lambda _: [BrokenReader([bytes_spec("a", 10)], ["a"], 0, error)])).result(30)


def test_a_failure_in_words_is_an_error(cache: TensorCache) -> None:
    reader = BrokenReader([], ["a"], 0, OSError())
    reader.failures["a"] = "it was moved"  # type: ignore[assignment]
    with pytest.raises(FetchError, match=r"^Failed to fetch shard 'a' from broken:1: it was moved$"):
        cache.get_many(["a"], Source(lambda _: [reader]))


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (None, "a NoneType: a list of ShardReaders is expected"),
        (TensorReader("n", ["a"], list), "a TensorReader: a list of ShardReaders is expected"),
        ([TensorReader("n", ["a"], list), None], "a NoneType as a ShardReader, which has no node, keys, failures"),
        ({"n": 7}, "a str as a ShardReader, which has no node, keys"),
        ([SimpleNamespace(**{**vars(TensorReader("n", ["a"], list)), "next_specs": 0, "read_into": 0, "close": 0})],
         "a SimpleNamespace as a ShardReader, which has no cancel"),
    ],
)  # fmt: skip
def test_a_source_that_opens_no_readers_is_named(cache: TensorCache, returned: Any, said: str) -> None:
    for call in (cache.get_many, cache.prefetch):
        with pytest.raises(TypeError, match=f"^open of the source Source returned {said}"):
            call(["a"], Source(lambda _: returned))
    assert cache.keys() == []


@pytest.mark.parametrize("loaded", [None, (one for one in "a"), 7], ids=["none", "generator", "number"])
def test_a_load_that_returns_no_list_is_named(cache: TensorCache, loaded: Any) -> None:
    reader = TensorReader("disk", ["a"], lambda: loaded)
    with pytest.raises(
        FetchError, match=f"disk returned a {type(loaded).__name__}: a list with a tensor for each shard"
    ):
        cache.get_many(["a"], Source(lambda _: [reader]))


def test_one_tensor_is_no_list_of_shards(cache: TensorCache) -> None:
    """Its rows would pass for shards."""
    reader = TensorReader("disk", ["a"], lambda: torch.ones(1, 3))  # type: ignore[arg-type,return-value]
    with pytest.raises(FetchError, match="disk returned one tensor: a list"):
        cache.get_many(["a"], Source(lambda _: [reader]))


@pytest.mark.parametrize("shape", [[2, 3], torch.Size([2, 3]), (np.int64(2), np.int64(3)), np.array([2, 3])], ids=repr)
def test_a_shape_is_any_sequence_of_whole_numbers(cache: TensorCache, shape: Sequence[int]) -> None:
    spec = ShardSpec("a", torch.uint8, shape)
    assert (spec.shape, spec.nbytes, type(spec.nbytes)) == ((2, 3), 6, int)
    (tensor,) = cache.get_many(["a"], Source(lambda _: [BrokenReader([spec], ["a"], 1, OSError())]))
    assert tensor.shape == (2, 3)


def test_a_shape_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shard 'a' has the shape \[-1, 3\]: no length is negative"):
        ShardSpec("a", torch.uint8, (-1, 3))
    with pytest.raises(TypeError, match="float"):
        ShardSpec("a", torch.uint8, (1.5, 3))  # type: ignore[arg-type]


def test_a_class_is_no_source(cache: TensorCache) -> None:
    with pytest.raises(TypeError, match=r"source is the class DictSource: .* such as DictSource\(\)"):
        cache.get_many(["a"], DictSource)  # type: ignore[arg-type]
