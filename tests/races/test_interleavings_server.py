"""One owner misbehaves in every way there is while another one serves: each shard has an outcome of its own, nothing
leaks, what arrived stays cached, and the next call works.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch

from gpu_cache import CacheConfig, FetchError, TensorCache
from gpu_cache.device.host import HostDevice
from gpu_cache.rpc import runtime
from gpu_cache.rpc.rtensor import RTensor
from gpu_cache.rpc.wire.serialization import tensor_to_json
from gpu_cache.transfer import transfer
from tests.support.areal_fixtures import fault_servers, http_backend, nothing_forgotten, remote, with_settings
from tests.support.bad_frames import entry
from tests.support.fault_server import (
    Exchange,
    FaultServer,
    Step,
    cut,
    dripping,
    frame,
    frames_of,
    hanging_up,
    raw_frame,
    refusal,
    reply,
    silent,
    whole,
)
from tests.support.interleave_actors import PATIENCE_S, in_background
from tests.support.interleave_stage import eventually, late_call
from tests.support.wire_tensors import patterned, same_bits

# In the order of their bytes in a frame. Each is a run and a window of its own.
BAD = {"a": patterned(torch.float64, 3, seed=1), "none": torch.empty(0, 2), "b": patterned(torch.uint8, 5, seed=2)}
GOOD = {"x": patterned(torch.float32, 2, 2, seed=3), "y": patterned(torch.int16, 3, seed=4)}
CONFIG = CacheConfig(
    device="cpu", slab_bytes="64KiB", pool_bytes="256KiB", staging_slots=2, staging_slot_bytes=512, run_bytes=512
)
BODY = frame(BAD)
HEADER_BYTES = len(BODY) - 24 - 5
ANSWER = reply(BODY)
HEAD_BYTES = len(ANSWER) - len(BODY)


class Town:
    """A good owner and a bad one, whose shards are read as one batch, and everything that must hold after a fault.

    Args:
        start: Starts a server.
    """

    def __init__(self, start: Callable[..., FaultServer]) -> None:
        self._start = start
        self.bad, self._good = start(whole(frames_of(BAD))), start(whole(frames_of(GOOD)))

    def reborn(self, step: Step) -> None:
        """The bad owner, which was closed, is there again under its address."""
        self.bad = self._start(step, port=self.bad.port)

    def batch(self) -> dict[str, RTensor]:
        """Fresh handles, as they come out of another process."""
        owners = [(self.bad.address, BAD), (self._good.address, GOOD)]
        return {name: remote(address, name, tensor) for address, owned in owners for name, tensor in owned.items()}

    def check_fault(self, *arrived: str, sent: Iterable[str] | None = None) -> str:
        """Reading the batch fails for the bad owner's shards but those that arrived, and for no other.

        Args:
            arrived: These.
            sent: What may have arrived, where that is not certain; None: nothing else.
        Returns:
            What the error says.
        """
        handles = self.batch()
        with pytest.raises(FetchError) as caught:
            RTensor.localize(handles)
        failures, text = caught.value.failures, str(caught.value)
        del caught
        lost = set(failures)
        assert BAD.keys() - set(arrived if sent is None else sent) <= lost <= BAD.keys() - set(arrived), text
        assert all(repr(name) in text for name in failures)
        assert all(self.bad.address in str(cause) or "not here within" in str(cause) for cause in failures.values())
        assert all(handle.data.is_meta for handle in handles.values())
        self._check_nothing_leaked()
        assert set(runtime.current().cache.keys()) == (BAD | GOOD).keys() - lost
        self._check_next_call(lost)
        return text

    def clear(self) -> None:
        cache = runtime.current().cache
        cache.clear()
        cache.synchronize()
        assert cache.buffer_stats()["device_bytes"] == 0

    def _check_nothing_leaked(self) -> None:
        """No range, slot or thread of the fetch is left."""
        cache = runtime.current().cache
        eventually(lambda: not cache._tasks)
        eventually(lambda: "gpu-cache-fetch" not in [thread.name for thread in threading.enumerate()])
        cache.synchronize()
        assert cache._engine is not None
        accounts = cache._engine.pool.accounts()
        num_blocks = len(set(cache.keys()) - {"none"})
        assert (accounts["pending"], accounts["quarantined"]) == (0, 0)
        assert accounts["held"] == num_blocks * 512, "a range belongs to no shard"
        assert cache.buffer_stats()["pinned_bytes"] == 0
        assert len(cache._index._entries) == len(cache), "a shard is still PENDING"

    def _check_next_call(self, lost: set[str]) -> None:
        """The bad owner has come to its senses: it is asked for what is missing, and nothing else."""
        self.bad.script, num_asked = [whole(frames_of(BAD))], len(self.bad.asked)
        tensors = RTensor.localize(self.batch())
        wrong = [name for name, tensor in tensors.items() if not same_bits(tensor, (BAD | GOOD)[name])]
        assert not wrong
        assert [set(asked.shard_ids) for asked in self.bad.asked[num_asked:]] == ([lost] if lost else [])


@pytest.fixture(params=["into the pool", "through staging"], autouse=True)
def placed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Received straight into the pool's memory, or into staging buffers and copied; no pause before another try."""
    monkeypatch.setattr(transfer, "_DIRECT_SLOTS", 1)  # reads as short as those through staging
    runtime.configure(CONFIG)
    if request.param == "through staging":
        runtime.current().cache = TensorCache(CONFIG, device=HostDevice(stages=True))
    with_settings(http_backend(), retry_pause_s=0.0)


@pytest.fixture
def town(placed: None) -> Iterator[Town]:
    """Both owners; in the end no descriptor is open that was not before."""
    num_open = len(os.listdir("/proc/self/fd"))
    with nothing_forgotten(), fault_servers() as start:
        yield Town(start)
        runtime.current().close()
    assert len(os.listdir("/proc/self/fd")) <= num_open


def sending(data: bytes, then: Step = hanging_up) -> Step:
    """Send this much, and then do something else."""

    def step(exchange: Exchange) -> None:
        exchange.send(data)
        then(exchange)

    return step


def complete_after(num_body_bytes: int) -> list[str]:
    """The shards that so many bytes of the body bring."""
    ends = {"a": HEADER_BYTES + 24, "none": HEADER_BYTES, "b": HEADER_BYTES + 29}
    return [name for name, end in ends.items() if num_body_bytes >= end]


def test_an_answer_that_ends_at_any_byte_brings_the_shards_before_it(town: Town) -> None:
    for num_sent in [*range(0, HEAD_BYTES, 3), *range(HEAD_BYTES, len(ANSWER))]:
        town.bad.script = [sending(ANSWER[:num_sent]), hanging_up]
        town.bad.asked.clear()
        town.check_fault(*complete_after(num_sent - HEAD_BYTES))
        town.clear()


def test_an_answer_that_is_reset_at_any_byte_brings_no_more_than_came_before_it(town: Town) -> None:
    for num_body_bytes in range(0, len(BODY), 5):
        town.bad.script = [cut(reply(BODY), num_body_bytes, by_reset=True), hanging_up]
        town.bad.asked.clear()
        town.check_fault(sent=complete_after(num_body_bytes))
        town.clear()


FIRST_BYTES = HEAD_BYTES + HEADER_BYTES + 24  # up to the end of "a"
SLOW: dict[str, tuple[Step, list[str]]] = {
    "silent": (silent, []),
    "silent after a byte": (dripping(ANSWER, 1, every_s=60), []),
    "silent in the header": (dripping(ANSWER, HEAD_BYTES + 50, every_s=60), []),
    "silent in a shard": (dripping(ANSWER, FIRST_BYTES + 1, every_s=60), ["a", "none"]),
    "dripping": (dripping(ANSWER, FIRST_BYTES, every_s=0.2), ["a", "none"]),
}


@pytest.mark.parametrize(("step", "arrived"), SLOW.values(), ids=SLOW)
def test_a_slow_answer_brings_the_shards_that_came_in_time(town: Town, step: Step, arrived: list[str]) -> None:
    town.bad.script, cache = [step], runtime.current().cache
    with late_call() as is_up:
        in_background(
            lambda: (eventually(lambda: town.bad.asked and {*GOOD, *arrived} <= set(cache.keys())), is_up.set())
        )
        assert "not here within" in town.check_fault(*arrived)


def test_a_drip_that_never_ends_ends_at_the_deadline(town: Town) -> None:
    cache = runtime.current().cache
    RTensor.localize([town.batch()[name] for name in GOOD])
    patient, cache.config = cache.config, dataclasses.replace(cache.config, fetch_timeout_s=0.5)
    town.bad.script, began = [dripping(ANSWER, HEAD_BYTES, every_s=0.01)], time.monotonic()
    with pytest.raises(FetchError) as caught:
        RTensor.localize(town.batch())
    assert time.monotonic() - began < 5
    assert caught.value.failures.keys() <= BAD.keys()
    del caught
    cache.config = patient
    town.bad.hang_up()
    town.clear()
    town.bad.script = [hanging_up]
    town.check_fault()


def lying(begin: int, end: int, **fields: object) -> Step:
    """A frame whose second shard is described falsely."""
    second = {"dtype": "U8", "shape": [5], "data_offsets": [24 + begin, 29 + end]} | fields
    header = {
        "__metadata__": {"ids": json.dumps(list(BAD))},
        "0": entry(0, 24, "F64", [3]),
        "1": entry(24, 24, "F32", [0, 2]),
        "2": second,
    }
    return whole(reply(raw_frame(header, BODY[HEADER_BYTES:])))


def header_length(change: int) -> Step:
    """A frame that lies about the length of its header."""
    return whole(reply((HEADER_BYTES - 8 + change).to_bytes(8, "little") + BODY[8:]))


def in_json(**second: object) -> Step:
    """The JSON form, with something about "b" that is not so."""
    described = [tensor_to_json(tensor) for tensor in BAD.values()]
    described[2] |= second
    return whole(reply(json.dumps(described).encode(), content_type="application/octet-stream"))


LIES: dict[str, tuple[Step, list[str]]] = {
    "body shorter than announced": (whole(reply(BODY, length=len(BODY) - 1)), []),
    "body shorter than the header": (whole(reply(BODY, length=20)), []),
    "body longer than announced, then nothing": (sending(reply(BODY, length=len(BODY) + 1)), []),
    "body of no length": (whole(reply(BODY, length=0)), []),
    "header longer than it is": (header_length(8), []),
    "header shorter than it is": (header_length(-8), []),
    "header as long as the body": (header_length(29), []),
    "header of no length": (header_length(8 - HEADER_BYTES), []),
    "shard longer than it is": (lying(0, 1), []),
    "shard shorter than it is": (lying(0, -1), []),
    "shard overlapping the one before": (lying(-1, -1), []),
    "shard of a wrong dtype": (lying(0, 0, dtype="I64"), []),
    "shard of an unknown dtype": (lying(0, 0, dtype="F5"), []),
    "shard of a wrong shape": (lying(0, 0, shape=[6]), []),
    "in JSON, of a wrong dtype": (in_json(dtype="torch.int64"), ["a", "none"]),
    "in JSON, of an unknown dtype": (in_json(dtype="torch.Tensor"), ["a", "none"]),
    "in JSON, longer than it is": (in_json(shape=[6]), ["a", "none"]),
    "in JSON, shorter than it is": (in_json(shape=[1]), ["a", "none"]),
    "in JSON, without data": (in_json(data=None), ["a", "none"]),
    "in JSON, too few": (whole(reply(b"[]", content_type="application/octet-stream")), []),
    "500": (whole(refusal(500, "oops")), []),
    "500 in mid-body": (sending(reply(BODY)[:FIRST_BYTES], lambda exchange: exchange.hang_up()), ["a", "none"]),
    "503": (whole(refusal(503, "busy")), []),
    "404": (whole(refusal(404, "gone")), []),
}


@pytest.mark.parametrize(("step", "arrived"), LIES.values(), ids=LIES)
def test_an_answer_that_is_no_use_costs_its_own_shards(town: Town, step: Step, arrived: list[str]) -> None:
    town.bad.script = [step, whole(refusal(500, "oops"))]
    town.check_fault(*arrived)


def test_an_owner_that_vanishes_costs_its_shards_and_comes_back_empty_and_then_full(town: Town) -> None:
    town.bad.close()
    with pytest.raises(FetchError, match="ConnectionRefusedError") as caught:
        RTensor.localize(town.batch())
    assert caught.value.failures.keys() == BAD.keys()
    del caught
    town.reborn(whole(frames_of({})))
    assert "the owner does not have it" in town.check_fault()


def test_an_owner_that_comes_back_empty_in_mid_answer_has_lost_the_rest(town: Town) -> None:
    with_settings(http_backend(), retry_pause_s=0.5)  # so long it may take to come back
    town.bad.script = [sending(ANSWER[: FIRST_BYTES + 2], lambda exchange: exchange.wait())]

    def die() -> None:
        eventually(lambda: "a" in runtime.current().cache)
        town.bad.close()
        town.reborn(whole(frames_of({})))

    dying = in_background(die)
    assert "Failed to fetch shard b from" in town.check_fault("a", "none")
    dying.result(PATIENCE_S)
