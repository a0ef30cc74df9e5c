"""Owners that were killed and are back at their address: what they lost is lost at once, what they have is served."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from gpu_cache import FetchError
from gpu_cache.rpc import runtime
from gpu_cache.rpc.client.pool import ConnectionPool, NodeState
from gpu_cache.rpc.client.reader import HttpReader
from gpu_cache.rpc.rtensor import RTensor, ShardLostError, ShardMissingError
from gpu_cache.rpc.server import main as rpc_server
from tests.support.areal_fixtures import delete, http_backend, remote
from tests.support.fake_owner import FakeOwner
from tests.support.fault_server import FaultServer, by, cut, frame, frames_of, json_of, whole
from tests.support.interleave_actors import in_background
from tests.support.reading import drained, reader_of
from tests.support.server_process import ServerProcess, server_process
from tests.support.wire_tensors import patterned, same_bits

PAIR = {"a": torch.arange(300), "b": torch.full((5,), 2.5)}


@pytest.fixture(autouse=True)
def on_the_host() -> None:
    runtime.configure(device="cpu", staging_slots=2, staging_slot_bytes="64KiB", run_bytes="64KiB")


def idle_connections() -> int:
    return len(http_backend()._connections._idle)


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """It serves until a test kills it, and serves again when that test is done."""
    with server_process() as process:
        yield process


def test_between_two_fetches_an_owner_is_killed_and_comes_back_empty_and_is_refilled(server: ServerProcess) -> None:
    server.put(PAIR)
    first = server.health()["incarnation"]
    assert same_bits(remote(server.address, "a", PAIR["a"]).to_local(), PAIR["a"])
    assert idle_connections() == 1
    server.kill()
    server.start()
    second = server.health()["incarnation"]
    assert first != second
    with pytest.raises(FetchError) as caught:
        RTensor.localize([remote(server.address, name, tensor) for name, tensor in PAIR.items()])
    (lost,) = caught.value.failures.values()  # "a" is cached
    assert isinstance(lost, ShardLostError)
    assert (lost.shard_id, lost.node_addr, lost.before, lost.now) == ("b", server.address, first, second)
    assert all(text in str(lost) for text in ("shard b", server.address, first, second))
    del caught
    server.put({"b": PAIR["b"]})
    assert same_bits(remote(server.address, "b", PAIR["b"]).to_local(), PAIR["b"])
    assert delete(http_backend(), server.address, "b")["cleared_count"] == 1


LARGE = {name: patterned(torch.int64, 1 << 20, seed=number) for number, name in enumerate("abcd")}  # 8 MiB each


def test_in_mid_body_an_owner_is_killed_and_comes_back_with_some_of_its_shards(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_begun, may_go_on, read_into = threading.Event(), threading.Event(), HttpReader.read_into

    def gated(reader: HttpReader, buffers: Sequence[memoryview]) -> None:
        read_into(reader, buffers)
        has_begun.set()
        assert may_go_on.wait(60)

    monkeypatch.setattr(HttpReader, "read_into", gated)
    server.put(LARGE)
    handles = {name: remote(server.address, name, tensor) for name, tensor in LARGE.items()}
    localized = in_background(lambda: RTensor.localize(handles, on_error="none"))
    assert has_begun.wait(60)
    server.kill()
    server.start()
    server.put({name: LARGE[name] for name in "bd"})
    may_go_on.set()
    got = localized.result(60)
    assert [name for name in got if got[name] is None] == ["a", "c"]
    assert all(same_bits(got[name], LARGE[name]) for name in "bd")
    assert server.health()["sent_payload_bytes"] == 16 << 20, "they were sent once"
    counted = runtime.current().cache.source_stats()[server.address]["fetch_errors_by_reason"]
    assert counted == {"missing": 2}
    with pytest.raises(FetchError) as caught:
        RTensor.localize(handles["c"])
    assert isinstance(caught.value.failures["c"], ShardLostError)
    del caught, got


@pytest.mark.parametrize("num_sent", [0, 1, 300 * 8, 300 * 8 + 1])
def test_an_owner_that_is_back_empty_in_mid_body_has_lost_the_rest(
    serve: Callable[..., FaultServer], num_sent: int
) -> None:
    header_bytes = len(frame(PAIR)) - 300 * 8 - 20
    server = serve(cut(by("old", frames_of(PAIR)), header_bytes + num_sent), whole(by("new", frames_of({}))))
    with pytest.raises(FetchError) as caught:
        RTensor.localize([remote(server.address, name, tensor) for name, tensor in PAIR.items()])
    # Both are one run: none of it is there before all of it is.
    assert all(isinstance(error, ShardLostError) for error in caught.value.failures.values())
    assert set(caught.value.failures) >= {"b"}
    assert server.wanted[1:] == ([["a", "b"]] if num_sent < 300 * 8 else [["b"], ["a"]])


def test_bytes_read_in_vain_are_asked_for_again(serve: Callable[..., FaultServer]) -> None:
    """The first shard had come, but nothing was made of it before the second turned out to be lost."""
    header_bytes = len(frame(PAIR)) - 300 * 8 - 20
    left = {"a": PAIR["a"]}
    server = serve(cut(by("old", frames_of(PAIR)), header_bytes + 300 * 8 + 7), whole(by("new", frames_of(left))))
    got = RTensor.localize([remote(server.address, name, tensor) for name, tensor in PAIR.items()], on_error="none")
    assert same_bits(got[0], PAIR["a"])
    assert got[1] is None
    assert server.wanted == [["a", "b"], ["b"], ["a"]]


def test_a_server_without_an_incarnation_has_lost_nothing(serve: Callable[..., FaultServer]) -> None:
    server = serve(whole(frames_of({"a": PAIR["a"]})), whole(frames_of({})))
    node = NodeState()
    drained(reader_of(server.address, ["a"], node=node))
    reader = reader_of(server.address, ["a"], node=node)
    assert drained(reader) == {}
    assert type(reader.failures["a"]) is ShardMissingError
    assert node.restart is None


def test_a_shard_that_was_cleared_is_not_lost(serve: Callable[..., FaultServer]) -> None:
    server, node = serve(whole(by("one", frames_of({"a": PAIR["a"]})))), NodeState()
    for wanted in ("a", "b"):
        reader = reader_of(server.address, [wanted], node=node)
        drained(reader)
    assert type(reader.failures["b"]) is ShardMissingError


def test_idle_connections_to_the_old_one_are_closed(serve: Callable[..., FaultServer]) -> None:
    old, new = whole(by("old", frames_of(PAIR))), whole(by("new", frames_of(PAIR)))
    server, pool, node = serve(old, old, old, new), ConnectionPool(), NodeState()
    readers = [reader_of(server.address, ["a", "b"], pool=pool, node=node) for _ in range(3)]
    for reader in readers:
        assert reader.next_specs() is not None
        reader.read_into([memoryview(bytearray(300 * 8 + 20))])
    for reader in readers:
        reader.close()
    assert len(pool._idle) == 3
    drained(reader_of(server.address, ["a"], pool=pool, node=node))
    assert len(pool._idle) == 1, "that of the new one"
    pool.close()


def test_the_form_of_a_restarted_owner_is_learnt_again(serve: Callable[..., FaultServer]) -> None:
    many = {f"s{number}": torch.tensor([number]) for number in range(9)}
    server, node = serve(whole(by("old", frames_of(many))), whole(by("new", json_of(many)))), NodeState()
    drained(reader_of(server.address, ["s0"], promised=many, node=node, max_json_shards=4))
    assert node.is_binary
    drained(reader_of(server.address, list(many), promised=many, node=node, max_json_shards=4))
    assert not node.is_binary


def test_a_late_answer_of_the_old_one_changes_nothing() -> None:
    node = NodeState()
    assert not node.note("")
    assert not node.note("A")
    assert node.restart is None
    node.is_binary = True
    assert node.note("B")
    assert not node.is_binary
    assert not node.note("A")
    assert not node.note("")
    assert not node.note("B")
    assert node.restart == ("A", "B")
    assert node.note("C")
    assert node.restart == ("B", "C")


def test_the_error_of_a_lost_shard_survives_pickling() -> None:
    lost = ShardLostError("s", "n:1", "A", "B")
    again = pickle.loads(pickle.dumps(lost))
    assert (type(again), str(again), again.now) == (ShardLostError, str(lost), "B")
    assert issubclass(ShardLostError, ShardMissingError)


def test_each_start_of_a_server_is_an_incarnation_of_its_own() -> None:
    owner, node = FakeOwner(), NodeState()
    owner.store.update(PAIR)
    for _ in range(2):
        with rpc_server.start(owner=owner) as server:
            drained(reader_of(server.address, ["a"], node=node))
    assert node.restart is not None


def test_the_removals_of_a_new_server_are_no_news_of_the_old_one() -> None:
    told: list[None] = []
    node = NodeState(lambda: told.append(None))
    node.note("A")
    for removals in ("0", "0", "5"):
        node.note_removals(removals)
    assert len(told) == 1
    node.note("B")
    for removals in ("0", "0", "1"):
        node.note_removals(removals)
    assert len(told) == 2
