"""A read that broke off goes on in the same bytes only: a shard that its owner replaced meanwhile begins again."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import select
import socket
import threading
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_cache.rpc import runtime
from gpu_cache.rpc.client.connection import split_address
from gpu_cache.rpc.client.http import HttpRTensorBackend
from gpu_cache.rpc.rtensor import RTensor, TensorShardInfo
from gpu_cache.rpc.server import main as rpc_server
from gpu_cache.rpc.shard import ShardAnswerError, ShardFetchError
from gpu_cache.rpc.store import ShardStore
from gpu_cache.rpc.wire.frame import Frame
from tests.support.areal_fixtures import remote, with_settings
from tests.support.fake_owner import FakeOwner
from tests.support.fault_server import (
    Answer,
    Asked,
    Exchange,
    FaultServer,
    Step,
    by,
    cut,
    frame,
    frames_of,
    json_of,
    reply,
    whole,
)
from tests.support.reading import drained, drained_by_windows, reader_of
from tests.support.wire_tensors import WIRE_DTYPES, patterned, same_bits

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


def bytes_of(*seeds: int, length: int = 1000) -> dict[str, torch.Tensor]:
    return {f"s{index}": patterned(torch.uint8, length, seed=seed) for index, seed in enumerate(seeds)}


OLD, NEW = bytes_of(1), bytes_of(2)
HEADER_BYTES = len(frame(OLD)) - 1000


def without_serials(tensors: Mapping[str, torch.Tensor]) -> Answer:
    """What an owner answers that numbers nothing."""
    return lambda asked: reply(b"".join(map(bytes, Frame((name, tensors[name]) for name in asked.shard_ids))))


@dataclasses.dataclass(frozen=True)
class Change:
    """What answered at first, what answers after the cut, and which bytes are right then."""

    before: Answer
    after: Answer
    expected: dict[str, torch.Tensor]

    @property
    def header_bytes(self) -> int:
        answer = self.before(Asked("POST", "/data/batch", {}, json.dumps({"shard_ids": ["s0"]}).encode()))
        return len(answer.partition(b"\r\n\r\n")[2]) - 1000


CHANGES = {
    "none": Change(by("A", frames_of(OLD)), by("A", frames_of(OLD)), OLD),
    "another incarnation": Change(by("A", frames_of(OLD)), by("B", frames_of(NEW)), NEW),
    "a PUT over the id": Change(by("A", frames_of(OLD)), by("A", frames_of(NEW, first=2)), NEW),
    "no incarnation": Change(frames_of(OLD), frames_of(NEW), NEW),
    "no incarnation any more": Change(by("A", frames_of(OLD)), frames_of(NEW), NEW),
    "no serials": Change(by("A", without_serials(OLD)), by("A", without_serials(NEW)), NEW),
    "no serials any more": Change(by("A", frames_of(OLD)), by("A", without_serials(NEW)), NEW),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("num_sent", [1, 500, 999])
def test_a_read_goes_on_in_the_same_bytes_or_begins_the_shard_again(
    serve: Callable[..., FaultServer], change: Change, num_sent: int
) -> None:
    server = serve(cut(change.before, change.header_bytes + num_sent), whole(change.after))
    assert same_bits(drained(reader_of(server.address, ["s0"]), buffer_bytes=7)["s0"], change.expected["s0"])
    assert server.wanted == [["s0"]] * 2, "into the same buffers, by the answer that said so"


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_shard_whose_first_bytes_went_on_already_is_announced_again(
    serve: Callable[..., FaultServer], change: Change
) -> None:
    server = serve(cut(change.before, change.header_bytes + 700), whole(change.after))
    assert same_bits(drained_by_windows(reader_of(server.address, ["s0"]), 300)["s0"], change.expected["s0"])
    assert len(server.wanted) == (2 if change.expected is OLD else 3)


def test_shards_that_were_complete_stay_as_they_were(serve: Callable[..., FaultServer]) -> None:
    old, new = bytes_of(1, 2, 3), bytes_of(4, 5, 6)
    header_bytes = len(frame(old)) - 3000
    server = serve(cut(by("A", frames_of(old)), header_bytes + 1500), whole(by("B", frames_of(new))))
    got = drained_by_windows(reader_of(server.address, list(old)), 1000)
    assert [same_bits(got[name], old[name]) for name in old] == [True, False, False]
    assert [same_bits(got[name], new[name]) for name in new] == [False, True, True]
    assert server.wanted == [["s0", "s1", "s2"], ["s1", "s2"]]


OTHERWISE: dict[str, tuple[Answer, torch.Tensor]] = {
    "shape": (by("B", frames_of({"s0": OLD["s0"][:10]})), OLD["s0"][:10]),
    "dtype": (by("B", frames_of({"s0": NEW["s0"].view(torch.int64)})), NEW["s0"].view(torch.int64)),
    "form": (json_of(NEW), NEW["s0"]),
}


@pytest.mark.parametrize(("after", "expected"), OTHERWISE.values(), ids=OTHERWISE)
def test_a_header_announces_the_shard_that_the_owner_has(
    serve: Callable[..., FaultServer], after: Answer, expected: torch.Tensor
) -> None:
    server = serve(cut(by("A", frames_of(OLD)), HEADER_BYTES + 500), whole(after))
    assert same_bits(drained_by_windows(reader_of(server.address, ["s0"]), 1 << 20)["s0"], expected)
    assert len(server.wanted) == 3


def test_a_shard_other_than_promised_fails_alone(serve: Callable[..., FaultServer]) -> None:
    old = bytes_of(1, 2)
    new = {"s0": OLD["s0"][:10], "s1": patterned(torch.uint8, 1000, seed=7)}
    header_bytes = len(frame(old)) - 2000
    server = serve(cut(by("A", frames_of(old)), header_bytes + 500), whole(by("B", frames_of(new))))
    reader = reader_of(server.address, list(old), promised=old)
    assert same_bits(drained_by_windows(reader, 1 << 20)["s1"], new["s1"])
    assert list(reader.failures) == ["s0"]
    assert "torch.uint8 of shape [1000] is promised, torch.uint8 of shape [10] was found" in str(reader.failures["s0"])


def test_an_owner_that_replaces_a_shard_whenever_it_breaks_off_is_given_up(serve: Callable[..., FaultServer]) -> None:
    at = HEADER_BYTES + 700
    answers = [by(name, frames_of(OLD)) for name in "ABCDEFGH"]
    server = serve(*(cut(answer, at) for answer in answers))
    with pytest.raises(ShardAnswerError, match=r"s0 from .* broke off in its 1,000 bytes, .* 3 times in a row"):
        drained_by_windows(reader_of(server.address, ["s0"]), 300)
    server = serve(*(cut(answer, at) for answer in answers))
    with pytest.raises(ShardFetchError, match="after 3 attempts"):
        drained_by_windows(reader_of(server.address, ["s0"]), 1 << 20)
    assert len(server.asked) == 3, "what was read again is no progress"


def test_an_empty_shard_is_not_asked_for_again(serve: Callable[..., FaultServer]) -> None:
    tensors = {**OLD, "none": torch.empty(0, 3)}
    at = len(frame(tensors)) - 500
    server = serve(cut(by("A", frames_of(tensors)), at), whole(by("B", frames_of(NEW))))
    got = drained_by_windows(reader_of(server.address, list(tensors)), 1 << 20)
    assert same_bits(got["s0"], NEW["s0"])
    assert same_bits(got["none"], tensors["none"])
    server = serve(cut(by("A", frames_of(tensors)), at), whole(by("B", frames_of(NEW))))
    assert drained_by_windows(reader_of(server.address, list(tensors)), 300).keys() == tensors.keys()


def test_the_backends_own_fetch_begins_again_too(serve: Callable[..., FaultServer]) -> None:
    old, new = bytes_of(1, 2), bytes_of(3, 4, length=2000)
    at = len(frame(old)) - 500
    server = serve(cut(by("A", frames_of(old)), at), whole(by("B", frames_of(new))))
    backend = with_settings(HttpRTensorBackend(), retry_pause_s=0.0)
    got = backend.fetch([TensorShardInfo(name, server.address) for name in old])
    assert same_bits(got[0], old["s0"])
    assert same_bits(got[1], new["s1"]), "no handle promised its old length"
    backend.close()


@pytest.mark.parametrize("at", [1, 100_000, 700_000, (1 << 20) - 1])
def test_a_localized_shard_is_wholly_old_or_wholly_new(serve: Callable[..., FaultServer], at: int) -> None:
    """Larger than what one read fills: its first windows are in the slab when the connection breaks off."""
    runtime.configure(device="cpu", staging_slots=2, staging_slot_bytes="64KiB", run_bytes="64KiB")
    old, new = ({"s": patterned(torch.int32, 1 << 18, seed=seed)} for seed in (1, 2))
    header_bytes = len(frame(old)) - (1 << 20)
    for after in (by("B", frames_of(new)), by("A", frames_of(new, first=9))):
        server = serve(cut(by("A", frames_of(old)), header_bytes + at), whole(after))
        assert same_bits(RTensor.localize(remote(server.address, "s", old["s"])), new["s"])
        runtime.current().cache.clear()


class CuttingProxy:
    """Passes on bytes in both directions; of what comes back on its first connection only so many."""

    def __init__(self, address: str, num_bytes: int, before_the_next: Callable[[], object]) -> None:
        self._server, self._num_bytes, self._before_the_next = split_address(address), num_bytes, before_the_next
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._stop, self._stopped = socket.socketpair()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def __enter__(self) -> CuttingProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.close()
        self._thread.join(30)
        self._stopped.close()
        self._listener.close()
        assert not self._thread.is_alive()

    def _serve(self) -> None:
        num_bytes = self._num_bytes
        while self._stopped not in select.select([self._listener, self._stopped], [], [])[0]:
            client, _ = self._listener.accept()
            with client, socket.create_connection(self._server) as server, contextlib.suppress(ConnectionError):
                self._pass_on(client, server, num_bytes)
            if num_bytes == self._num_bytes:
                self._before_the_next()
                num_bytes = 1 << 40

    def _pass_on(self, client: socket.socket, server: socket.socket, num_bytes: int) -> None:
        while num_bytes:
            ready = select.select([client, server, self._stopped], [], [])[0]
            if self._stopped in ready:
                return
            if server in ready:
                data = server.recv(min(num_bytes, 1 << 16))
                num_bytes -= len(data)
                client.sendall(data)
            else:
                data = client.recv(1 << 16)
                server.sendall(data)
            if not data:
                return


REAL_CHANGES: dict[str, Callable[[FakeOwner], object]] = {
    "put": lambda owner: owner.store.put("s", NEW_S.clone()),
    "written in place": lambda owner: owner.store["s"].copy_(NEW_S),
    "cleared and put": lambda owner: (owner.store.clear(), owner.store.put("s", NEW_S.clone())),
    "nothing": lambda owner: None,
}
OLD_S, NEW_S = patterned(torch.int64, 300_000, seed=1), patterned(torch.int64, 300_000, seed=2)


@pytest.mark.parametrize("change", REAL_CHANGES)
@pytest.mark.parametrize("num_bytes", [1000, 1_300_000, 2_399_000])
def test_a_server_whose_shard_changes_while_it_is_read(change: str, num_bytes: int) -> None:
    runtime.configure(device="cpu", staging_slots=2, staging_slot_bytes="64KiB", run_bytes="64KiB")
    owner = FakeOwner()
    owner.store["s"] = OLD_S.clone()
    with (
        rpc_server.start(owner=owner) as server,
        CuttingProxy(server.address, num_bytes, lambda: REAL_CHANGES[change](owner)) as proxy,
    ):
        got = RTensor.localize(remote(proxy.address, "s", OLD_S))
    assert same_bits(got, OLD_S if change == "nothing" else NEW_S)


class Owner:
    """Keeps every tensor that it ever had under an id."""

    def __init__(self, kinds: Sequence[tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self.kinds = {f"s{index}": kind for index, kind in enumerate(kinds)}
        self.versions: dict[str, list[torch.Tensor]] = {name: [] for name in self.kinds}
        self.num_starts = 0
        self.suffer("restart")

    def suffer(self, change: str) -> None:
        if change == "restart":
            self.store, self.num_starts = ShardStore(), self.num_starts + 1
        if change != "nothing":
            for name in list(self.kinds)[: 1 if change == "put first" else None]:
                dtype, shape = self.kinds[name]
                self.versions[name].append(patterned(dtype, *shape, seed=len(self.versions[name])))
                self.store.put(name, self.versions[name][-1])

    def answer(self, asked: Asked) -> bytes:
        body = b"".join(map(bytes, Frame(self.store.get_many(asked.shard_ids)[0])))
        return reply(body, X_Shard_Incarnation=str(self.num_starts))

    def step(self, change: str, num_body_bytes: int) -> Step:
        def act(exchange: Exchange) -> None:
            self.suffer(change)
            cut(self.answer, num_body_bytes)(exchange)

        return act


KINDS = st.tuples(st.sampled_from(WIRE_DTYPES), st.lists(st.integers(0, 6), max_size=3).map(tuple))
CUTS = st.tuples(st.sampled_from(["nothing", "restart", "put", "put first"]), st.integers(0, 1500))
NUM_EXAMPLES = [pytest.param(200, id="short"), pytest.param(5_000, id="long", marks=pytest.mark.slow)]


@pytest.mark.parametrize("num_examples", NUM_EXAMPLES)
def test_each_shard_is_of_one_version_across_answers(num_examples: int) -> None:
    @settings(deadline=None, max_examples=num_examples, database=None)
    @given(
        kinds=st.lists(KINDS, min_size=1, max_size=4),
        cuts=st.lists(CUTS, min_size=1, max_size=2),
        last=CUTS,
        window_bytes=st.sampled_from([1, 5, 16, 64, 1 << 20]),
    )
    def check(
        kinds: list[tuple[torch.dtype, tuple[int, ...]]],
        cuts: list[tuple[str, int]],
        last: tuple[str, int],
        window_bytes: int,
    ) -> None:
        owner = Owner(kinds)
        server.script = [*(owner.step(*each) for each in cuts), owner.step(last[0], 1 << 20), whole(owner.answer)]
        server.asked.clear()
        got = drained_by_windows(reader_of(server.address, list(owner.kinds)), window_bytes)
        assert got.keys() == owner.kinds.keys()
        for name, versions in owner.versions.items():
            assert any(same_bits(got[name], version) for version in versions), name

    with FaultServer(whole(b"")) as server:
        check()
