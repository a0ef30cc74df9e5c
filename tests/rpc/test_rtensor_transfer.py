"""Handles over the wire: batches bit for bit, fetched once, and alive for as long as anybody looks."""

from __future__ import annotations

import asyncio
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gpu_cache import FetchError
from gpu_cache.rpc.rtensor import RTensor, buffer_stats, fetch_buffer_stats
from gpu_cache.rpc.server.main import ServerHandle
from gpu_cache.rpc.shard import collect_leaves
from tests.support.areal_fixtures import remote
from tests.support.fake_owner import FakeOwner
from tests.support.fault_server import Exchange, FaultServer, frame, frames_of, hanging_up, json_of, reply, whole
from tests.support.sources import same_bytes
from tests.support.threads import run_threads
from tests.support.wire_tensors import WIRE_DTYPES, patterned

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

Sample = namedtuple("Sample", "prompt answer")
MIB = 1 << 20


def named(tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"shard-{number}": tensor for number, tensor in enumerate(tensors)}


def nest(leaves: list[Any]) -> Any:
    """The same leaves in dicts, lists, tuples and named tuples."""
    quarter = len(leaves) // 4
    return {
        "list": leaves[:quarter],
        "tuple": (*leaves[quarter : 2 * quarter], "text"),
        "samples": [Sample(*leaves[at : at + 2]) for at in range(2 * quarter, 3 * quarter, 2)],
        "deep": {"er": [[{"x": leaf}] for leaf in leaves[3 * quarter :]]},
    }


def check_batch(address: str, tensors: dict[str, torch.Tensor]) -> None:
    localized = RTensor.localize(nest([remote(address, shard_id, tensor) for shard_id, tensor in tensors.items()]))
    got, want = collect_leaves(localized, torch.Tensor), collect_leaves(nest(list(tensors.values())), torch.Tensor)
    assert len(want) == len(tensors)
    assert all(map(same_bytes, got, want))
    assert len(got) == len(want)
    assert (type(localized["samples"][0]), type(localized["tuple"]), localized["tuple"][-1]) == (Sample, tuple, "text")


def many_small(count: int = 3072) -> dict[str, torch.Tensor]:
    """Of every dtype that travels, 9 KiB in the mean; with scalars, empty ones and ones with holes among them."""
    tensors = []
    for number in range(count):
        dtype = WIRE_DTYPES[number % len(WIRE_DTYPES)]
        length = 1 + number * 977 % (18_000 // dtype.itemsize)
        kind = number // len(WIRE_DTYPES) % 16
        shape = {0: (), 1: (0, 3), 2: (length, 0)}.get(kind, (length,))
        tensor = patterned(dtype, *shape, seed=number)
        tensors.append(patterned(dtype, length, 4, seed=number)[::2, 1:3].t() if kind == 3 else tensor)
    return named(tensors)


def few_large(total_bytes: int, count: int = 64) -> dict[str, torch.Tensor]:
    """From a twenty-fifth of the largest to the largest; cheap to make, and nowhere the same."""
    weights = [1 + 24 * (number / (count - 1)) ** 2 for number in range(count)]
    tensors = []
    for number, weight in enumerate(weights):
        length = int(total_bytes * weight / sum(weights)) // 32 * 4
        words = torch.arange(length, dtype=torch.int64).mul_(0x9E3779B97F4A7C1 + number)
        dtype = WIRE_DTYPES[1 + number % (len(WIRE_DTYPES) - 1)]  # bool has but two values
        tensors.append(words.view(torch.uint8).view(dtype).view(2, -1))
    return named(tensors)


@pytest.mark.usefixtures("placed")
def test_a_batch_of_many_small_shards(server: ServerHandle, owner: FakeOwner) -> None:
    tensors = many_small()
    owner.store.update(tensors)
    check_batch(server.address, tensors)


@pytest.mark.usefixtures("placed")
@pytest.mark.parametrize(
    "total_bytes", [160 * MIB, pytest.param(1100 * MIB, marks=pytest.mark.slow)], ids=["160 MiB", "1.1 GiB"]
)
def test_a_batch_of_few_large_shards(server: ServerHandle, owner: FakeOwner, total_bytes: int) -> None:
    tensors = few_large(total_bytes)
    owner.store.update(tensors)
    check_batch(server.address, tensors)


@pytest.mark.parametrize(
    "total_bytes", [8 * MIB, pytest.param(128 * MIB, marks=pytest.mark.slow)], ids=["8 MiB", "128 MiB"]
)
def test_a_batch_in_the_json_form(serve: Callable[..., FaultServer], total_bytes: int) -> None:
    tensors = named([*many_small(168).values(), *few_large(total_bytes).values()])
    server = serve(whole(json_of(tensors)))
    check_batch(server.address, tensors)
    assert max(map(len, server.wanted)) == 32


@pytest.mark.usefixtures("placed")
@pytest.mark.parametrize("form", [frames_of, json_of])
def test_every_pattern_of_bfloat16(serve: Callable[..., FaultServer], form: Any) -> None:
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)
    server = serve(whole(form({"every": every})))
    assert same_bytes(remote(server.address, "every", every).to_local(), every)


def test_once_cached_no_owner_is_needed(server: ServerHandle, owner: FakeOwner) -> None:
    owner.store["a"] = torch.arange(9)
    remote(server.address, "a", torch.arange(9)).to_local()
    server.stop()
    assert torch.equal(remote(server.address, "a", torch.arange(9)).to_local(), torch.arange(9))
    with pytest.raises(FetchError, match=r"after 3 attempts.*'b'"):
        RTensor.localize([remote(server.address, name, torch.arange(9)) for name in ("a", "b")])


def test_a_partial_hit_asks_only_for_the_misses(serve: Callable[..., FaultServer]) -> None:
    tensors = named([torch.tensor([number]) for number in range(9)])
    server = serve(whole(frames_of(tensors)))
    handles = lambda *numbers: [remote(server.address, f"shard-{n}", torch.ones(1).long()) for n in numbers]  # noqa: E731
    RTensor.localize(handles(4, 1))
    found = RTensor.localize(handles(0, 1, 2, 1, 4, 3, 0))
    assert [int(tensor) for tensor in found] == [0, 1, 2, 1, 4, 3, 0]
    assert server.wanted == [["shard-4", "shard-1"], ["shard-0", "shard-2", "shard-3"]]


def test_results_are_paired_with_ids_in_any_order(serve: Callable[..., FaultServer]) -> None:
    tensors = named([torch.full((5,), float(number)) for number in range(9)])
    backwards = lambda asked: reply(frame({name: tensors[name] for name in reversed(asked.shard_ids)}))  # noqa: E731
    server = serve(whole(backwards))
    found = RTensor.localize([remote(server.address, shard_id, tensor) for shard_id, tensor in tensors.items()])
    assert all(same_bytes(got, want) for got, want in zip(found, tensors.values(), strict=True))


def test_ten_threads_make_one_fetch(serve: Callable[..., FaultServer]) -> None:
    tensor = torch.arange(1000)

    def answer_when_all_wait(exchange: Exchange) -> None:
        while buffer_stats()["joined"] < 9:
            exchange.wait(0.001)
        whole(frames_of({"a": tensor}))(exchange)

    server = serve(answer_when_all_wait)
    found: list[torch.Tensor] = []
    run_threads([lambda: found.append(remote(server.address, "a", tensor).to_local())] * 10)
    assert server.wanted == [["a"]]
    assert all(torch.equal(got, tensor) for got in found)
    assert len({got.data_ptr() for got in found}) == 1


def test_clearing_evicts_before_the_owner_is_told(serve: Callable[..., FaultServer]) -> None:
    cached: list[dict[str, int]] = []
    clear = lambda exchange: (cached.append(fetch_buffer_stats()), whole(reply(b"{}"))(exchange))  # noqa: E731
    server = serve(whole(frames_of({"a": torch.ones(3)})), clear)
    remote(server.address, "a", torch.ones(3)).to_local()
    assert asyncio.run(RTensor.clear_node(server.address, ["a"])) == {}
    assert cached == [{"num_entries": 0}]


def test_clearing_evicts_even_if_the_owner_cannot_be_told(serve: Callable[..., FaultServer]) -> None:
    server = serve(whole(frames_of({"a": torch.ones(3)})), hanging_up)
    remote(server.address, "a", torch.ones(3)).to_local()
    with pytest.raises(
        FetchError, match=f"Failed to clear shards at http://{server.address}/data/clear after 3 attempts"
    ):
        asyncio.run(RTensor.clear_node(server.address, ["a"]))
    assert fetch_buffer_stats() == {"num_entries": 0}


def test_the_end_of_a_step_leaves_nothing_anywhere(server: ServerHandle, owner: FakeOwner) -> None:
    owner.store.update(named([torch.ones(3)] * 4))
    handles = [remote(server.address, shard_id, torch.ones(3)) for shard_id in owner.store]
    RTensor.localize(handles)
    gone = remote("127.0.0.1:1", "gone", torch.ones(3))
    consumed: list[Any] = []
    report = asyncio.run(RTensor.clear_everywhere([handles, {"x": gone}], [consumed.extend]))
    assert [failure.who for failure in report.failures] == ["127.0.0.1:1"]
    assert report.owners[server.address]["num_tensors"] == 0
    assert sorted(consumed) == sorted([*owner.evicted, "gone"])
    assert len(consumed) == 5
    assert fetch_buffer_stats() == {"num_entries": 0}
