"""Deleting shards at their owners, who may be busy, broken or gone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import torch

from gpu_cache.errors import failure_reason
from gpu_cache.rpc.client.http import HttpRTensorBackend
from gpu_cache.rpc.server.main import ServerHandle
from gpu_cache.rpc.shard import (
    ShardAnswerError,
    ShardClearError,
    ShardFetchError,
    ShardRefusedError,
    ShardUnreachableError,
)
from tests.support.areal_fixtures import delete, full_listener, with_settings
from tests.support.fake_owner import FakeOwner
from tests.support.fault_server import FaultServer, hanging_up, refusal, reply, silent, whole


def test_deleting_returns_the_owners_statistics(
    backend: HttpRTensorBackend, server: ServerHandle, owner: FakeOwner
) -> None:
    for shard_id in "abc":
        owner.store[shard_id] = torch.ones(2)
    statistics = delete(backend, server.address, "a", "unknown", "b")
    assert statistics == {"status": "ok", "cleared_count": 2, "num_tensors": 1, "total_bytes": 8}
    assert owner.evicted == ["a", "unknown", "b"]


def test_deleting_is_tried_three_times(backend: HttpRTensorBackend, serve: Callable[..., FaultServer]) -> None:
    done = whole(reply(b'{"status": "ok"}', content_type="application/json"))
    server = serve(hanging_up, whole(refusal(503, Retry_After="0")), done)
    assert delete(backend, server.address, "a") == {"status": "ok"}
    assert [(asked.method, asked.path, asked.shard_ids) for asked in server.asked] == [
        ("DELETE", "/data/clear", ["a"])
    ] * 3
    server = serve(hanging_up)
    with pytest.raises(ShardFetchError) as caught:
        delete(backend, server.address, "a", "b")
    expected = f"Failed to clear shards at http://{server.address}/data/clear after 3 attempts. Last error: Remote"
    assert str(caught.value).startswith(expected)
    assert str(caught.value).endswith("(shards 'a', 'b')")
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    "answer", [refusal(500, "oops"), refusal(404), reply(b"[]"), reply(b"junk"), reply(b"[" * 100_000)]
)
def test_an_owner_that_refuses_to_delete_is_quoted(
    backend: HttpRTensorBackend, serve: Callable[..., FaultServer], answer: bytes
) -> None:
    server = serve(whole(answer))
    with pytest.raises(ShardFetchError, match=f"Failed to clear shards at http://{server.address}/data/clear: "):
        delete(backend, server.address, "a")
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (refusal(401), ShardRefusedError),
        (refusal(413), ShardRefusedError),
        (refusal(500), ShardAnswerError),
        (reply(b"junk"), ShardAnswerError),
    ],
)
def test_why_an_owner_was_not_told_has_a_type(
    backend: HttpRTensorBackend, serve: Callable[..., FaultServer], answer: bytes, kind: type[ShardFetchError]
) -> None:
    owner = serve(whole(answer)).address
    for address, expected in ((owner, kind), ("127.0.0.1:1", ShardUnreachableError), ("node-7", ShardUnreachableError)):
        with pytest.raises(ShardClearError) as caught:
            delete(backend, address, "a")
        assert type(caught.value.__cause__) is expected
        assert failure_reason(caught.value) == expected.reason


@pytest.mark.parametrize("address", ["", "node-7", "node-7:99999"])
def test_deleting_at_no_address_is_an_error(backend: HttpRTensorBackend, address: str) -> None:
    with pytest.raises(ShardFetchError, match="is not an address"):
        delete(backend, address, "a")


def test_an_owner_that_hangs_is_given_up(serve: Callable[..., FaultServer]) -> None:
    backend = with_settings(HttpRTensorBackend(), retry_pause_s=0.0, delete_timeout_s=0.15)
    server = serve(silent)
    with pytest.raises(ShardFetchError, match=r"after 3 attempts\. Last error: TimeoutError.*; [0-9.]+ s in all"):
        delete(backend, server.address, "a")
    with full_listener() as (host, port), pytest.raises(ShardFetchError, match="Last error: TimeoutError"):
        delete(backend, f"{host}:{port}", "a")
    backend.close()


def test_many_owners_that_hang_are_given_up_together(serve: Callable[..., FaultServer]) -> None:
    """More than a loop's own threads: each delete is under way before any ends."""
    num_owners = 40
    server = serve(silent)

    async def scenario() -> None:
        backend = HttpRTensorBackend()
        tasks = [asyncio.create_task(backend.delete(server.address, [str(n)])) for n in range(num_owners)]
        while len(server.asked) < num_owners:
            assert not any(task.done() for task in tasks)
            await asyncio.sleep(0.001)
        server.close()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, ShardFetchError) for result in results)
        backend.close()

    asyncio.run(scenario())
    assert {wanted[0] for wanted in server.wanted} == set(map(str, range(num_owners)))
