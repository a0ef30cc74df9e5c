"""Writes into what `localize` gave, over real connections: new handles bring the original bytes."""

from __future__ import annotations

import pytest
import torch

from gpu_cache import FetchError, MutatedError
from gpu_cache.rpc import runtime
from gpu_cache.rpc.rtensor import RTensor, buffer_stats
from gpu_cache.rpc.server import main as rpc_server
from gpu_cache.rpc.server.main import ServerHandle
from tests.support.areal_fixtures import remote
from tests.support.fake_owner import FakeOwner
from tests.support.sources import same_bytes

TENSORS = {"a": torch.randn(50, 20), "b": torch.arange(300)}


@pytest.fixture
def owner() -> FakeOwner:
    owner = FakeOwner()
    owner.store.update(TENSORS)
    return owner


def localized(server: ServerHandle) -> dict[str, torch.Tensor]:
    """By new handles, as with each message."""
    return RTensor.localize({key: remote(server.address, key, tensor) for key, tensor in TENSORS.items()})  # type: ignore[no-any-return]


def test_new_handles_bring_the_original_and_one_warning(
    placed: None, server: ServerHandle, caplog: pytest.LogCaptureFixture
) -> None:
    first = localized(server)
    first["a"].mul_(2)
    for _ in range(3):
        assert all(same_bytes(tensor, TENSORS[key]) for key, tensor in localized(server).items())
    assert torch.equal(first["a"], TENSORS["a"] * 2)
    (record,) = caplog.records
    assert f"shard 'a' (4,000 bytes from {server.address}) was written to in place" in record.getMessage()
    assert (buffer_stats()["mutations"], buffer_stats()["misses"]) == (1, 3)


def test_a_written_shard_that_its_owner_cleared_is_an_error(
    placed: None, server: ServerHandle, owner: FakeOwner
) -> None:
    localized(server)["a"].zero_()
    owner.store.clear()
    with pytest.raises(FetchError, match="cached copies of 'a' were dropped, as a reader wrote into them") as caught:
        localized(server)
    assert server.address in str(caught.value)
    assert caught.value.failures.keys() == {"a"}
    b = RTensor.localize(remote(server.address, "b", TENSORS["b"]))
    assert same_bytes(b, TENSORS["b"])
    assert (buffer_stats()["mutations"], buffer_stats()["fetch_errors"]) == (1, 1)


def test_a_written_shard_whose_owner_is_gone_is_an_error(owner: FakeOwner) -> None:
    runtime.configure(device="cpu", fetch_timeout_s=2)
    with rpc_server.start(owner=owner) as server:
        localized(server)["a"].zero_()
    with pytest.raises(FetchError, match="cached copies of 'a' were dropped"):
        localized(server)


def test_policies_and_checksums_are_settings_like_others(server: ServerHandle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_CACHE_ON_MUTATION", "error")
    monkeypatch.setenv("GPU_CACHE_DEBUG_CHECKSUM", "1")
    runtime.configure(device="cpu")
    localized(server)["b"].numpy().fill(0)
    with pytest.raises(MutatedError, match="'b'"):
        localized(server)
