from __future__ import annotations

import pickle

import pytest

from gpu_cache.errors import CacheClosedError, CacheFullError, FetchError, GpuCacheError, MutatedError, TransferError


def test_errors_have_the_documented_bases() -> None:
    assert issubclass(CacheFullError, MemoryError)
    assert issubclass(FetchError, RuntimeError)
    for kind in (CacheFullError, CacheClosedError, FetchError, TransferError, MutatedError):
        assert issubclass(kind, GpuCacheError)


def test_a_full_pool_is_told_in_numbers() -> None:
    text = str(CacheFullError(4_194_304, 1_048_576, 8_589_934_592))
    assert "need 4,194,304 bytes, 1,048,576 free of 8,589,934,592" in text
    assert "GPU_CACHE_POOL_BYTES" in text


def test_a_write_is_told_with_shards_policy_and_remedy() -> None:
    text = str(MutatedError(["a", "b", "c", "d"]))
    assert text.startswith("4 cached shards were written to in place since they came: 'a', 'b', 'c', ...;")
    assert "on_mutation (GPU_CACHE_ON_MUTATION) is 'error'. Clone a tensor before" in text


@pytest.mark.parametrize(
    "error",
    [
        CacheFullError(3, 2, 1),
        FetchError("late", {"a": TransferError("x")}),
        CacheClosedError("closed"),
        MutatedError(["a", 5]),
    ],
)
def test_errors_survive_pickling(error: GpuCacheError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert {k: str(v) for k, v in getattr(copy, "failures", {}).items()} == {
        k: str(v) for k, v in getattr(error, "failures", {}).items()
    }
