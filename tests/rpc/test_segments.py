"""The owner's shared memory: sealed, side by side, used again, and never under a reader."""

from __future__ import annotations

import errno
import fcntl
import gc
import logging
import mmap
import os
import subprocess
import sys
import uuid
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_cache import Promise, ShardSpec
from gpu_cache.rpc import segments as module
from gpu_cache.rpc.segments import FIRST_BYTES, Segment, Segments, is_wanted
from gpu_cache.rpc.shard import WireError
from gpu_cache.rpc.store import ShardStore
from gpu_cache.rpc.wire.frame import Frame
from gpu_cache.rpc.wire.records import ABSENT, ELSEWHERE, Foreseen, record_of
from tests.support.reading import parse_records
from tests.support.wire_tensors import WIRE_DTYPES, patterned, same_bits

ROOT = Path(__file__).parents[2]
SHAPES: list[tuple[int, ...]] = [(), (1,), (7,), (3, 5), (0, 4), (2, 1, 3, 1, 2, 2)]


@pytest.fixture
def store() -> Iterator[ShardStore]:
    made = ShardStore(segments=Segments(is_wanted=lambda: True))
    yield made
    made.clear()
    gc.collect()
    assert made.segments.stats()["shared_bytes"] == 0, "a range is held for ever"
    made.segments.trim()


def put(store: ShardStore, *tensors: torch.Tensor) -> list[str]:
    ids = [str(uuid.uuid4()) for _ in tensors]
    for shard_id, copy in zip(ids, store.copies(tensors), strict=True):
        store.put(shard_id, copy)
    return ids


def places(store: ShardStore, ids: list[str]) -> list[tuple[int, int]]:
    records = b"".join(shard.record for shard in store.find(ids) if shard is not None)
    found = {spec.key: (segment, place) for spec, segment, place in parse_records(records, ids).found}
    return [found[shard_id] for shard_id in ids if shard_id in found]


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
def test_copies_have_every_bit_of_every_dtype_and_shape(store: ShardStore) -> None:
    tensors = [patterned(dtype, *shape) for dtype in WIRE_DTYPES for shape in SHAPES]
    ids = put(store, *tensors)
    for tensor, shard_id in zip(tensors, ids, strict=True):
        assert same_bits(store[shard_id], tensor)
    records = b"".join(shard.record for shard in store.find(ids) if shard is not None)
    found = {spec.key: spec for spec, _, _ in parse_records(records, ids).found}
    specs = [found[shard_id] for shard_id in ids]
    assert [(one.dtype, one.shape, one.nbytes) for one in specs] == [(t.dtype, t.shape, t.nbytes) for t in tensors]


def test_records_are_compared_with_promises() -> None:
    short, long, high = (3,), (4, 5), (1,) * 7
    ids = ["second", "first", "otherwise", "unpromised", "unwelcome", "absent", "elsewhere", "of seven dimensions"]
    shapes = [short, short, long, long, short, (), short, high]
    promises: dict[Hashable, Promise] = {
        key: (torch.int64, shape, "a:1") for key, shape in zip(ids, shapes, strict=True) if key != "unpromised"
    }
    promises["otherwise"] = torch.int64, short, "a:1"
    places = [(2, 512), (2, 0), (1, 512), (1, 0), (3, 0)]
    records = [record_of(torch.int64, shape, *place) for shape, place in zip(shapes[:5], places, strict=True)]
    records[4] = record_of(torch.int32, short, 3, 0)
    asked: list[Hashable] = []

    def is_welcome(spec: ShardSpec) -> bool:
        asked.append(spec.key)
        return spec.key != "unwelcome"

    answer = Foreseen(ids, promises).compared(b"".join(records) + ABSENT + ELSEWHERE + ELSEWHERE, is_welcome)
    found = [(spec.key, spec.dtype, spec.shape, segment, place) for spec, segment, place in answer.found]
    assert found == [
        ("unpromised", torch.int64, long, 1, 0),
        ("otherwise", torch.int64, long, 1, 512),
        ("first", torch.int64, short, 2, 0),
        ("second", torch.int64, short, 2, 512),
    ]
    assert asked == ["otherwise", "unpromised", "unwelcome"]
    assert (answer.absent, answer.elsewhere) == (["absent"], ["elsewhere", "of seven dimensions"])
    with pytest.raises(WireError, match="128 bytes of records for 1 shards"):
        Foreseen(["a"], {}).compared(ABSENT * 2, is_welcome)


def test_strided_and_lazily_conjugated_tensors_are_copied_dense(store: ShardStore) -> None:
    originals = [patterned(torch.float32, 6, 4).T, patterned(torch.complex64, 9).conj(), torch.ones(1).expand(5)]
    for shard_id, original in zip(put(store, *originals), originals, strict=True):
        assert same_bits(store[shard_id], original.resolve_conj())


def test_shards_of_one_call_lie_side_by_side_in_steps_of_512_bytes(store: ShardStore) -> None:
    ids = put(store, *(torch.zeros(length, dtype=torch.uint8) for length in (1, 512, 513, 700)))
    (segment, start), *others = places(store, ids)
    assert others == [(segment, start + 512), (segment, start + 1024), (segment, start + 2048)]


def test_a_range_comes_free_shard_by_shard_and_is_used_again(store: ShardStore) -> None:
    ids = put(store, *(torch.zeros(512, dtype=torch.uint8) for _ in range(4)))
    before = places(store, ids)
    assert store.remove([ids[1], ids[2]]) == 2
    assert store.segments.stats()["shared_bytes"] == 1024
    store.remove([ids[0], ids[3]])
    assert places(store, put(store, torch.ones(2048, dtype=torch.uint8))) == [before[0]]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 0, 2, 3), (0, 2, 1, 3), (2, 3, 0, 1)])
def test_ranges_that_die_in_any_order_come_free_as_one(store: ShardStore, order: tuple[int, ...]) -> None:
    ids = put(store, *(torch.zeros(512 * length, dtype=torch.uint8) for length in (1, 2, 3, 1)))
    before = places(store, ids)
    for number in order:
        store.remove([ids[number]])
    assert places(store, put(store, torch.ones(512 * 7, dtype=torch.uint8))) == [before[0]]
    assert store.segments.stats()["shared_bytes"] == 512 * 7


@pytest.mark.parametrize(
    "alias",
    [
        lambda store, key: store[key][1:2],
        lambda store, key: store[key].numpy()[3:],
        lambda store, key: store.find([key])[0].memory[5:6],
        lambda store, key: store.get_many([key]),
        lambda store, key: list(Frame(store.get_many([key])[0]))[1:],
    ],
    ids=["view", "array", "buffer", "hold", "answer"],
)
def test_a_cleared_range_is_not_used_again_while_a_reader_has_an_alias(store: ShardStore, alias: Any) -> None:
    nbytes = 1 << 20
    (key,) = put(store, patterned(torch.uint8, nbytes))
    held, before = alias(store, key), places(store, [key])
    store.remove([key])
    assert store.segments.stats()["shared_bytes"] == nbytes
    others = put(store, torch.zeros(nbytes, dtype=torch.uint8))
    assert places(store, others) != before
    del held
    store.remove(others)
    assert places(store, put(store, torch.zeros(nbytes, dtype=torch.uint8))) == before


def test_aliases_of_a_shard_are_described_and_other_memory_is_elsewhere(store: ShardStore) -> None:
    (key,) = put(store, torch.arange(1024))
    store.put("alias", store[key][4:8])
    ((segment, place), (alias_segment, alias_place)) = places(store, [key, "alias"])
    assert (alias_segment, alias_place) == (segment, place + 32)
    store.put("plain", torch.ones(4))
    (flat,) = put(store, torch.zeros(1, 1, 1, 1, 1, 1, 1))
    store.put("strided", store[key][::2])
    assert [shard.record == ELSEWHERE for shard in store.find(["plain", flat, "strided"]) if shard] == [True] * 3


def test_memory_is_kept_for_the_next_step_and_given_back_when_steps_need_less(store: ShardStore) -> None:
    large, small = torch.zeros(40 << 20, dtype=torch.uint8), torch.zeros(1 << 20, dtype=torch.uint8)
    for _ in range(3):
        ids = [key for number in range(3) for key in put(store, large)]
        reserved = store.segments.stats()["shared_reserved_bytes"]
        store.remove(ids)
        assert store.segments.stats() == {"shared_bytes": 0, "shared_reserved_bytes": reserved}
    for _ in range(20):
        store.remove(put(store, small))
    assert store.segments.stats()["shared_reserved_bytes"] < reserved


def test_a_small_owner_takes_little(store: ShardStore) -> None:
    put(store, torch.zeros(100))
    ((_, nbytes, descriptor),) = store.segments.descriptors(store.segments.numbers())
    assert nbytes == FIRST_BYTES
    assert os.fstat(descriptor).st_blocks * 512 <= 1 << 20


def test_shards_beyond_one_segment_get_several_and_longer_ones_their_own(
    store: ShardStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SEGMENT_BYTES", 2 << 20)
    monkeypatch.setattr(module, "FIRST_BYTES", 1 << 20)
    tensors = [patterned(torch.uint8, nbytes) for nbytes in (1 << 20, 1 << 20, 1 << 20, 5 << 20, 3)]
    ids = put(store, *tensors)
    numbers = [segment for segment, _ in places(store, ids)]
    assert numbers[0] == numbers[1]
    assert numbers.count(numbers[3]) == 1
    assert len(set(numbers)) == 3
    assert all(same_bits(store[key], tensor) for key, tensor in zip(ids, tensors, strict=True))


def test_no_other_process_can_write_resize_or_unseal_a_segment() -> None:
    segment = Segment(1, 1 << 20)
    try:
        with pytest.raises(PermissionError):
            mmap.mmap(segment.descriptor, 1 << 20)
        for nbytes in (0, 2 << 20):
            with pytest.raises(PermissionError):
                os.ftruncate(segment.descriptor, nbytes)
        with pytest.raises(PermissionError):
            fcntl.fcntl(segment.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        with pytest.raises(PermissionError):
            os.pwrite(segment.descriptor, b"x", 0)
        assert mmap.mmap(segment.descriptor, 1 << 20, prot=mmap.PROT_READ)[:2] == b"\0\0"
    finally:
        segment.close()


@pytest.mark.parametrize("text", ["0", "no", "False", "off "])
def test_a_variable_turns_it_off(text: str) -> None:
    assert is_wanted({})
    assert not is_wanted({"GPU_CACHE_SHM": text})
    store = ShardStore(segments=Segments(is_wanted=lambda: False))
    (key,) = put(store, patterned(torch.float32, 5))
    assert same_bits(store[key], patterned(torch.float32, 5))
    assert store.segments.stats() == {"shared_bytes": 0, "shared_reserved_bytes": 0}
    assert not places(store, [key])


def test_a_variable_that_says_neither_yes_nor_no_is_refused() -> None:
    with pytest.raises(ValueError, match="GPU_CACHE_SHM='n': must be 0 or 1"):
        is_wanted({"GPU_CACHE_SHM": "n"})


def test_without_such_memory_shards_are_stored_all_the_same_and_one_line_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(number: int, nbytes: int) -> Segment:
        raise OSError(errno.ENOSYS, "not here")

    store = ShardStore(segments=Segments(is_wanted=lambda: True, make=refuse))
    for _ in range(3):
        put(store, torch.ones(4))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "plain memory" in record.getMessage()
    assert len(store) == 3


def test_pages_that_the_system_does_not_have_cost_no_range(store: ShardStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "advise", lambda *_: errno.ENOMEM)
        (key,) = put(store, patterned(torch.uint8, 1 << 20))
    assert same_bits(store[key], patterned(torch.uint8, 1 << 20))
    assert store.segments.stats()["shared_bytes"] == 0


FORK = """
import os, torch
from gpu_cache.rpc import runtime
from gpu_cache.rpc.rtensor import RTensor, fetch
handle = RTensor.remotize(torch.arange(8.0), "me:1")
segments = runtime.current().store.segments
(number, _, descriptor), = segments.descriptors(segments.numbers())
assert "memfd" in os.readlink(f"/proc/self/fd/{descriptor}")
if (child := os.fork()) == 0:
    assert os.readlink(f"/proc/self/fd/{descriptor}") == "/dev/null"
    assert "memfd:gpu-cache" not in open("/proc/self/maps").read()
    own = RTensor.remotize(torch.ones(3), "me:1")
    assert fetch(own.shard.shard_id).tolist() == [1, 1, 1]
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert fetch(handle.shard.shard_id).tolist() == list(range(8))
"""


def test_a_forked_child_has_no_segment_of_its_parent_and_stores_in_its_own() -> None:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
