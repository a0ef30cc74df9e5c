"""The HTTP backend against a real server, and against one that fails as the test says."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gpu_cache.rpc.client.backend import RTensorBackend, StreamingBackend
from gpu_cache.rpc.client.http import HttpRTensorBackend
from gpu_cache.rpc.server import main as rpc_server
from gpu_cache.rpc.server.main import ServerHandle
from gpu_cache.rpc.shard import ShardConflictError, ShardFetchError, ShardMissingError, TensorShardInfo
from gpu_cache.rpc.store import ShardStore
from tests.support.areal_fixtures import delete
from tests.support.fake_owner import FakeOwner
from tests.support.fault_server import FaultServer, frames_of, hanging_up, json_of, refusal, reply, whole
from tests.support.wire_tensors import WIRE_DTYPES, patterned, same_bits

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


def infos(address: str, *shard_ids: Any) -> list[TensorShardInfo]:
    return [TensorShardInfo(shard_id, address) for shard_id in shard_ids]


def test_it_is_a_backend(backend: HttpRTensorBackend) -> None:
    assert isinstance(backend, RTensorBackend)
    assert isinstance(backend, StreamingBackend)


@pytest.mark.parametrize(
    ("number", "said"), [(0, " must be positive"), (-1, " must be positive"), (2.5, "=2.5: must be at least 1, and a")]
)
def test_requests_of_no_shards_or_of_parts_of_shards_are_refused(number: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"max_shards_per_request{said}"):
        HttpRTensorBackend(max_shards_per_request=number)


def test_an_id_of_two_owners_is_refused(backend: HttpRTensorBackend) -> None:
    with pytest.raises(ShardConflictError, match="one owner"):
        backend.fetch([*infos("here:1", "a"), *infos("here:2", "a")])


@pytest.mark.parametrize("dtype", WIRE_DTYPES, ids=str)
@pytest.mark.parametrize("is_json", [False, True], ids=["binary", "json"])
def test_shards_arrive_bit_for_bit(
    backend: HttpRTensorBackend,
    server: ServerHandle,
    owner: FakeOwner,
    serve: Callable[..., FaultServer],
    dtype: torch.dtype,
    is_json: bool,
) -> None:
    wide = patterned(dtype, 6, 8, seed=1)
    tensors = {
        "plain": patterned(dtype, 3, 5),
        "scalar": patterned(dtype),
        "empty": torch.empty(0, 3, dtype=dtype),
        "strided": wide[::2, 1::3],
        "transposed": wide.t(),
    }
    for shard_id, tensor in tensors.items():
        owner.store[shard_id] = tensor
    address = serve(whole(json_of(tensors))).address if is_json else server.address
    fetched = backend.fetch(infos(address, *tensors))
    assert all(same_bits(got, want) for got, want in zip(fetched, tensors.values(), strict=True))


@pytest.mark.parametrize("is_json", [False, True], ids=["binary", "json"])
def test_every_bfloat16_arrives_bit_for_bit(
    backend: HttpRTensorBackend,
    server: ServerHandle,
    owner: FakeOwner,
    serve: Callable[..., FaultServer],
    is_json: bool,
) -> None:
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)
    owner.store["every"] = every
    address = serve(whole(json_of({"every": every}))).address if is_json else server.address
    assert same_bits(backend.fetch(infos(address, "every"))[0], every)


def test_results_are_in_order_over_owners_and_repeats(
    backend: HttpRTensorBackend, serve: Callable[..., FaultServer]
) -> None:
    tensors = {f"s{number}": torch.tensor([number]) for number in range(90)}
    servers = [serve(whole(form(tensors))) for form in (frames_of, json_of, frames_of)]
    shards = [TensorShardInfo(f"s{n % 80}", servers[n % 80 % 3].address) for n in (7 * k % 90 for k in range(90))]
    fetched = backend.fetch(shards)
    assert [f"s{int(tensor)}" for tensor in fetched] == [info.shard_id for info in shards]
    asked = [shard_id for server in servers for wanted in server.wanted for shard_id in wanted]
    assert len(asked) == len(set(asked)) == 80
    assert backend.fetch([]) == []


def test_one_connection_serves_one_fetch_after_another(
    backend: HttpRTensorBackend, serve: Callable[..., FaultServer]
) -> None:
    server = serve(whole(frames_of({"a": torch.ones(3)})))
    for _ in range(5):
        backend.fetch(infos(server.address, "a"))
    assert (len(server.asked), server.num_connections) == (5, 1)
    backend.close()
    backend.close()
    backend.fetch(infos(server.address, "a"))
    assert server.num_connections == 2


def test_the_json_form_is_bounded_by_number(serve: Callable[..., FaultServer]) -> None:
    tensors = {f"s{number}": torch.tensor([number]) for number in range(20)}
    server, backend = serve(whole(json_of(tensors))), HttpRTensorBackend(max_shards_per_request=8)
    backend.fetch(infos(server.address, *tensors))
    assert list(map(len, server.wanted)) == [8, 8, 4]
    backend.close()


def test_a_token_is_shown(serve: Callable[..., FaultServer], monkeypatch: pytest.MonkeyPatch, owner: FakeOwner) -> None:
    owner.store["a"] = torch.ones(3)
    with rpc_server.start(owner=owner, token="s3cret") as server:
        for token in ("wrong", None):
            backend = HttpRTensorBackend(token=token)
            with pytest.raises(ShardFetchError, match=r": 401 body=.*bearer token.*\(shards 'a'\)") as caught:
                backend.fetch(infos(server.address, "a"))
            assert server.address in str(caught.value)
            assert "s3cret" not in str(caught.value)
            with pytest.raises(ShardFetchError, match=": 401 body="):
                delete(backend, server.address, "a")
            backend.close()
        monkeypatch.setenv("AREAL_RPC_TOKEN", "s3cret")
        for backend in (HttpRTensorBackend(token="s3cret"), HttpRTensorBackend()):
            assert torch.equal(backend.fetch(infos(server.address, "a"))[0], torch.ones(3))
            backend.close()
    assert len(owner.store) == 1


def test_ipv6(backend: HttpRTensorBackend, owner: FakeOwner) -> None:
    owner.store["a"] = torch.ones(3)
    try:
        server = rpc_server.start("::1", owner=owner)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with server:
        assert server.address.startswith("[::1]:")
        assert torch.equal(backend.fetch(infos(server.address, "a"))[0], torch.ones(3))
        assert delete(backend, server.address, "a")["cleared_count"] == 1


def test_a_missing_shard_is_named(backend: HttpRTensorBackend, server: ServerHandle) -> None:
    with pytest.raises(ShardMissingError, match=f"Failed to fetch shard b from {server.address}"):
        backend.fetch(infos(server.address, "b"))


def test_an_owner_that_came_back_empty_has_nothing(
    backend: HttpRTensorBackend, serve: Callable[..., FaultServer]
) -> None:
    first = serve(whole(frames_of({"a": torch.ones(3), "b": torch.ones(2)})))
    backend.fetch(infos(first.address, "a"))
    first.close()
    with pytest.raises(ShardFetchError, match=r"after 3 attempts\. Last error: ConnectionRefusedError"):
        backend.fetch(infos(first.address, "b"))
    second = FaultServer(whole(frames_of({})), port=first.port)
    with pytest.raises(ShardMissingError):
        backend.fetch(infos(first.address, "b"))
    assert len(second.asked) == 1
    second.close()


def test_a_server_that_restarted_meanwhile_is_asked_on_a_new_connection(
    backend: HttpRTensorBackend, serve: Callable[..., FaultServer]
) -> None:
    first = serve(whole(frames_of({"a": torch.ones(3)})))
    backend.fetch(infos(first.address, "a"))
    first.close()
    second = FaultServer(whole(frames_of({"b": torch.ones(2)})), port=first.port)
    assert torch.equal(backend.fetch(infos(first.address, "b"))[0], torch.ones(2))
    second.close()


def test_one_node_that_fails_costs_only_its_connection(
    backend: HttpRTensorBackend, serve: Callable[..., FaultServer]
) -> None:
    good, bad = serve(whole(frames_of({"a": torch.ones(3)}))), serve(whole(refusal(500)))
    shards = infos(good.address, "a") + infos(bad.address, "b")
    for _ in range(3):
        with pytest.raises(ShardFetchError, match=bad.address):
            backend.fetch(shards)
    assert (len(good.asked), good.num_connections) == (3, 1)


def test_a_stored_tensor_gets_an_id_of_its_own(backend: HttpRTensorBackend) -> None:
    backend.shards = ShardStore()
    tensor = torch.ones(3)
    first, second = backend.store(tensor), backend.store(tensor)
    assert first != second
    assert uuid.UUID(first).version == 4
    assert backend.shards[first] is tensor


def test_a_backend_without_a_store_says_so() -> None:
    with pytest.raises(RuntimeError, match="has no store"):
        HttpRTensorBackend().store(torch.ones(3))


def test_no_descriptor_stays_open(serve: Callable[..., FaultServer], backend: HttpRTensorBackend) -> None:
    num_open = len(os.listdir("/proc/self/fd"))
    server = serve(whole(refusal(500)), hanging_up, hanging_up, hanging_up, whole(reply(b"junk")), whole(frames_of({})))
    for _ in range(4):
        with pytest.raises(ShardFetchError):
            backend.fetch(infos(server.address, "a"))
    with pytest.raises(ShardFetchError):
        delete(backend, server.address, "a")
    backend.close()
    server.close()
    assert len(os.listdir("/proc/self/fd")) <= num_open


def test_a_group_fetch_that_is_replaced_as_areals_tests_do_gets_each_group(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, asked = HttpRTensorBackend(max_shards_per_request=2), []

    async def group(session: Any, node_addr: str, grouped: list[tuple[int, TensorShardInfo]]) -> list[torch.Tensor]:
        asked.append((node_addr, [info.shard_id for _, info in grouped]))
        return [torch.tensor(int(info.shard_id)) for _, info in grouped]

    monkeypatch.setattr(backend, "_fetch_shard_group", group)
    shards = [TensorShardInfo(str(number), "a:1" if number % 2 else "b:1") for number in range(6)]
    assert [int(one) for one in backend.fetch(shards)] == list(range(6))
    assert asked == [("b:1", ["0", "2"]), ("b:1", ["4"]), ("a:1", ["1", "3"]), ("a:1", ["5"])]

    async def inside_a_loop() -> list[torch.Tensor]:
        return backend.fetch(shards[:1])

    assert [int(one) for one in asyncio.run(inside_a_loop())] == [0]


def test_a_session_that_is_replaced_as_areals_tests_do_is_asked(owner: FakeOwner, server: ServerHandle) -> None:
    class Backend(HttpRTensorBackend):
        num_sessions = 0

        def _create_session(self) -> Any:
            self.num_sessions += 1
            return super()._create_session()

    owner.store["a"] = torch.arange(3)
    backend = Backend()
    (found,) = backend.fetch([TensorShardInfo("a", server.address)])
    assert same_bits(found, torch.arange(3))
    with pytest.raises(
        ShardFetchError, match=r"Failed to fetch shard batch from http://.*/data/batch: 400 body=.*lost"
    ):
        backend.fetch([TensorShardInfo("lost", server.address)])
    assert backend.num_sessions == 2
