from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from gpu_cache import ShardSpec, TensorReader
from gpu_cache.pool.block import aligned
from gpu_cache.pool.completion import Completion
from gpu_cache.transfer.runs import Backlog, Piece, Run, pack


def specs_of(*lengths: int) -> list[ShardSpec]:
    return [ShardSpec(number, torch.uint8, (nbytes,)) for number, nbytes in enumerate(lengths)]


def windows(specs: list[ShardSpec], run_bytes: int, slot_bytes: int) -> list[list[Piece]]:
    """All windows of a part whose runs find room at once."""
    left = Backlog(pack(specs, run_bytes), slot_bytes, lambda runs: runs[0])
    found = []
    while left.nbytes:
        found.append(left.next_window())
    return found


def test_consecutive_shards_share_a_run_up_to_its_bytes() -> None:
    runs = list(pack(specs_of(100, 512, 600, 5000, 10), run_bytes=2048))
    assert [[spec.key for spec in run.specs] for run in runs] == [[0, 1, 2], [3], [4]]
    assert [run.nbytes for run in runs] == [2048, 5120, 512]
    assert runs[0].offsets == [0, 512, 1024]


@given(
    lengths=st.lists(st.integers(1, 9000), max_size=40),
    run_bytes=st.sampled_from([512, 2048, 4096]),
    slot_bytes=st.sampled_from([4096, 8192]),
)
@settings(max_examples=150, deadline=None)
def test_windows_cover_every_byte_once_and_in_order(lengths: list[int], run_bytes: int, slot_bytes: int) -> None:
    specs = specs_of(*lengths)
    seen: list[tuple[Run, int, int]] = []
    for window in windows(specs, run_bytes, slot_bytes):
        assert sum(piece.nbytes for piece in window) <= slot_bytes
        at = 0
        for piece in window:
            assert piece.at == at
            at += piece.nbytes
            seen.append((piece.run, piece.start, piece.nbytes))
    covered = [spec.key for run in dict.fromkeys(run for run, _, _ in seen) for spec in run.specs]
    assert covered == [spec.key for spec in specs]
    assert sum(nbytes for _, _, nbytes in seen) == sum(aligned(spec.nbytes) for spec in specs)
    for (run, start, nbytes), (after, next_start, _) in itertools.pairwise(seen):
        assert next_start == (start + nbytes if after is run else 0)


def test_buffers_are_the_shards_places_without_the_gaps() -> None:
    (window,) = windows(specs_of(100, 600), 4096, 4096)
    (piece,) = window
    room = memoryview(bytearray(range(256)) * 8)[: piece.nbytes]
    first, second = piece.buffers(room)
    assert (len(first), len(second)) == (100, 600)
    assert second == room[512:1112]


def test_a_large_shard_is_cut_into_pieces_whose_last_one_ends_it() -> None:
    pieces = [piece for window in windows(specs_of(10_000), 4096, 4096) for piece in window]
    assert [(piece.start, piece.nbytes, piece.is_last) for piece in pieces] == [
        (0, 4096, False),
        (4096, 4096, False),
        (8192, 2048, True),
    ]
    lengths = [[len(buffer) for buffer in piece.buffers(memoryview(bytearray(piece.nbytes)))] for piece in pieces]
    assert lengths == [[4096], [4096], [10_000 - 8192]]


class Events:
    """A device of which a test says which events are done, and that notes what is asked."""

    def __init__(self) -> None:
        self.done: set[str] = set()
        self.asked: list[str] = []

    def query(self, event: str) -> bool:
        self.asked.append(f"query {event}")
        return event in self.done

    def synchronize(self, event: str) -> None:
        self.asked.append(f"synchronize {event}")
        self.done.add(event)

    def wait(self, stream: str, event: str) -> None:
        self.asked.append(f"{stream} waits for {event}")


def test_done_is_remembered_only_after_the_host_saw_it() -> None:
    device = Events()
    completion = Completion(device, "copy")  # type: ignore[arg-type]
    completion.wait_on("left")
    completion.wait_on("right")
    assert not completion.is_seen, "a stream's wait proves nothing for another stream"
    assert device.asked == ["query copy", "left waits for copy", "query copy", "right waits for copy"]
    device.done.add("copy")
    completion.wait_on("left")
    assert completion.is_seen
    completion.wait_on("right")
    completion.wait_host()
    assert device.asked[4:] == ["query copy"]


def test_waiting_on_the_host_is_seeing() -> None:
    device = Events()
    completion = Completion(device, "copy")  # type: ignore[arg-type]
    completion.wait_host()
    assert completion.is_seen
    assert device.asked == ["synchronize copy"]


def test_a_reader_of_tensors_may_be_read_in_pieces() -> None:
    tensors = [torch.arange(10, dtype=torch.int32), torch.empty(0, 3), torch.tensor(7, dtype=torch.uint8)]
    reader = TensorReader("n:1", ["a", "b", "c"], lambda: tensors)
    assert reader.next_specs() == [
        ShardSpec("a", torch.int32, (10,)),
        ShardSpec("b", torch.float32, (0, 3)),
        ShardSpec("c", torch.uint8, ()),
    ]
    received = bytearray(41)
    view = memoryview(received)
    reader.read_into([view[:13], view[13:40]])
    reader.read_into([view[40:]])
    assert bytes(received) == tensors[0].numpy().tobytes() + b"\x07"
    assert reader.next_specs() is None


def test_a_reader_of_tensors_refuses_a_wrong_count() -> None:
    with pytest.raises(RuntimeError, match="n:1 returned 1 shards for 2 requested"):
        TensorReader("n:1", ["a", "b"], lambda: [torch.zeros(1)]).next_specs()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:torch.quantize_per_tensor")
def test_a_shard_that_is_no_dense_host_tensor_fails_alone() -> None:
    (freed := torch.zeros(9)).untyped_storage().resize_(0)
    with FakeTensorMode():
        fake = torch.zeros(3)
    nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    quantized = torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8)
    loaded: Any = [torch.zeros(1, device="meta"), "text", ValueError("lost"), torch.zeros(2)]
    loaded += [freed, fake, nested, quantized]
    reader = TensorReader("n:1", list("abcdefgh"), lambda: loaded)
    assert [spec.key for spec in reader.next_specs() or ()] == ["d"]
    assert [str(reader.failures[key]) for key in "abcefgh"] == [
        "shard 'a': need a dense tensor in host memory, got torch.strided on meta",
        "shard 'b' is a str: a Tensor is expected",
        "lost",
        "shard 'e': the tensor's memory was given back, as FSDP does between uses",
        "shard 'f': need a dense tensor in host memory, got FakeTensor on cpu",
        "shard 'g': need a dense tensor in host memory, got a nested one on cpu",
        "shard 'h': need a dense tensor in host memory, got torch.qint8 on cpu",
    ]
