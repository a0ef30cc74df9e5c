"""Shards of owners on the same host are read from their memory bit by bit."""

from __future__ import annotations

from collections.abc import Hashable

import pytest
import torch

from gpu_cache import FetchError, ShardSpec
from gpu_cache.rpc import runtime
from gpu_cache.rpc.client.http import HttpRTensorBackend, drained
from gpu_cache.rpc.rtensor import RTensor, TensorShardInfo, clear_fetch_buffer, set_backend
from gpu_cache.rpc.server.main import ServerHandle
from tests.support.areal_fixtures import remote
from tests.support.fake_owner import FakeOwner
from tests.support.same_host_reads import localized, read, reader, transport
from tests.support.wire_tensors import WIRE_DTYPES, patterned, same_bits

SHAPES: list[tuple[int, ...]] = [(), (1,), (3, 5), (0, 4), (2, 1, 3, 1, 2, 2), (1, 1, 1, 1, 1, 1, 7)]
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


def test_a_cold_read_describes_each_shard_once_over_either_way(
    owner: FakeOwner, known: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {f"s{number}": patterned(torch.float32, number) for number in range(20)}
    owner.put(tensors)
    described: list[Hashable] = []
    real = ShardSpec.__init__

    def describe(self: ShardSpec, key: Hashable, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        described.append(key)
        real(self, key, dtype, shape)

    monkeypatch.setattr(ShardSpec, "__init__", describe)
    over_http = HttpRTensorBackend(same_host=False)
    for way in ("shm", "http"):
        localized(known, tensors)
        assert transport(known) == way
        assert sorted(map(str, described)) == sorted(tensors)
        described.clear()
        clear_fetch_buffer()
        set_backend(over_http)
    over_http.close()


def test_every_dtype_and_shape_arrives_bit_by_bit(owner: FakeOwner, known: str) -> None:
    tensors = {f"{dtype}{shape}": patterned(dtype, *shape) for dtype in WIRE_DTYPES for shape in SHAPES}
    owner.put(tensors)
    found = localized(known, tensors)
    assert all(same_bits(one, other) for one, other in zip(found, tensors.values(), strict=True))
    few = {key: one for key, one in tensors.items() if one.ndim < 7}
    clear_fetch_buffer()
    assert all(same_bits(one, other) for one, other in zip(localized(known, few), few.values(), strict=True))
    assert transport(known) == "shm"


@pytest.mark.parametrize("same_host", [True, False])
def test_a_promised_shape_may_be_a_list(
    owner: FakeOwner, known: str, shared: HttpRTensorBackend, same_host: bool
) -> None:
    owner.put({"a": (tensor := patterned(torch.float32, 2, 3))})
    backend = shared if same_host else HttpRTensorBackend(same_host=False)
    source = backend.source({"a": TensorShardInfo("a", known)}, {"a": (torch.float32, [2, 3], known)})  # type: ignore[dict-item]
    (opened,) = source.open(["a"], 30.0)
    assert same_bits(drained(opened)["a"], tensor)
    if not same_host:
        backend.close()


def test_only_the_first_request_to_an_owner_goes_over_http(
    owner: FakeOwner, server: ServerHandle, shared: HttpRTensorBackend
) -> None:
    tensors = {f"s{number}": patterned(torch.int64, 50, seed=number) for number in range(100)}
    owner.put(tensors)
    found = localized(server.address, tensors)
    assert all(same_bits(one, other) for one, other in zip(found, tensors.values(), strict=True))
    assert transport(server.address) == "shm"
    assert runtime.current().cache.buffer_stats()["fetch_bytes"] == 100 * 400


def test_a_batch_is_lent_in_the_order_in_which_it_lies(
    owner: FakeOwner, known: str, shared: HttpRTensorBackend
) -> None:
    owner.put({"a": torch.arange(9.0), "b": torch.ones(3, 3)})
    source = reader(shared, known, "b", "a")
    specs = source.next_specs()
    assert specs is not None
    assert source.is_lending
    assert [spec.key for spec in specs] == ["a", "b"], "in the order in which they lie"
    assert [one.nbytes for one in source.read_run([(0, 36), (512, 36)])] == [548], "one stretch"
    source.confirm()
    assert source.next_specs() is None
    source.close()


def test_fetch_reads_memory_too(owner: FakeOwner, known: str, shared: HttpRTensorBackend) -> None:
    tensors = {"a": patterned(torch.float32, 70_000), "b": patterned(torch.bool, 3), "empty": torch.ones(0, 3)}
    owner.put(tensors)
    found = shared.fetch([TensorShardInfo(key, known) for key in tensors])
    assert all(same_bits(one, other) for one, other in zip(found, tensors.values(), strict=True))


def test_shards_that_lie_elsewhere_come_over_http_with_the_others(owner: FakeOwner, known: str) -> None:
    tensors = {f"s{number}": patterned(torch.int32, 40, seed=number) for number in range(8)}
    owner.put(dict(list(tensors.items())[:4]))
    owner.store.update(dict(list(tensors.items())[4:]))
    found = localized(known, tensors)
    assert all(same_bits(one, other) for one, other in zip(found, tensors.values(), strict=True))


def test_shards_that_lie_elsewhere_are_not_lost_when_the_path_goes(
    owner: FakeOwner, known: str, shared: HttpRTensorBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner.put({"a": torch.ones(5)})
    owner.store["elsewhere"] = torch.zeros(3)
    owner.put({"later": torch.ones(7)})
    monkeypatch.setattr("gpu_cache.rpc.client.same_host.MAX_IDS", 2)
    source = reader(shared, known, "a", "elsewhere", "later")
    assert [spec.key for spec in source.next_specs() or ()] == ["a"]
    assert read(source, 20) == bytes(torch.ones(5).numpy())
    source.confirm()
    assert shared.memories is not None
    way = source._way()
    assert way is not None
    shared.memories.refuse(way.path, known, "another reader found it out of reach")
    assert sorted(spec.key for spec in source.next_specs() or ()) == ["elsewhere", "later"]
    source.close()


@pytest.mark.parametrize("case", ["missing", "shape", "dtype"])
def test_failures_read_as_over_http(owner: FakeOwner, known: str, case: str) -> None:
    owner.put({"a": torch.ones(4), "b": torch.zeros(2)})
    asked = {"missing": ("gone", torch.ones(4)), "shape": ("a", torch.ones(5)), "dtype": ("a", torch.arange(4))}[case]
    words = []
    for is_shared in (True, False):
        backend = HttpRTensorBackend(same_host=is_shared)
        backend._nodes = runtime.current().backend._nodes  # type: ignore[attr-defined]  # they know the owner
        set_backend(backend)
        with pytest.raises(FetchError) as caught:
            RTensor.localize([remote(known, *asked), remote(known, "b", torch.zeros(2))])
        words.append([(type(one), str(one)) for one in caught.value.failures.values()])
        del caught
        assert len(clear_and_list()) == 1, "the other shard is cached"
        backend.close()
    assert words[0] == words[1]


def clear_and_list() -> list[Hashable]:
    keys = list(runtime.current().cache.keys())
    clear_fetch_buffer()
    return keys
