from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from gpu_cache.config import GIB, MIB, CacheConfig, is_off, parse_size, says_yes, variable
from gpu_cache.pool.block import aligned


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("4GiB", 4 * GIB),
        ("512 MiB", 512 * MIB),
        ("1.5KiB", 1536),
        ("4096", 4096),
        (" 7 b", 7),
        (12, 12),
        (8.0, 8),
        (np.int64(12), 12),
        ("1tib", 1 << 40),
        ("4G", 4 * GIB),
        ("1.5k", 1536),
        ("4GB", 4_000_000_000),
        ("200 mb", 200_000_000),
    ],
)
def test_sizes_are_numbers_with_units(text: float | str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "4GX", "4 i", "-1", "x", "1 2", True, None, 1.5, float("inf"), float("nan"), [1]])
def test_a_text_that_is_no_size_is_refused_by_name(text: object) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)  # type: ignore[arg-type]


def test_defaults_depend_on_the_device() -> None:
    on_cuda = CacheConfig().resolved(is_cuda=True, device_bytes=40 * GIB)
    assert (on_cuda.slab_bytes, on_cuda.prealloc_bytes, on_cuda.pool_bytes) == (256 * MIB, GIB, 4 * GIB)
    assert CacheConfig().resolved(is_cuda=True, device_bytes=200 * GIB).pool_bytes == 8 * GIB
    on_host = CacheConfig().resolved(is_cuda=False, device_bytes=0)
    assert (on_host.prealloc_bytes, on_host.pool_bytes) == (0, 2 * GIB)
    assert (on_host.staging_slots, on_host.staging_slot_bytes, on_host.run_bytes) == (8, 32 * MIB, 4 * MIB)
    assert on_host.fetch_timeout_s == 60.0


def test_a_small_device_is_not_preallocated_beyond_its_pool() -> None:
    small = CacheConfig().resolved(is_cuda=True, device_bytes=4 * GIB)
    assert small.pool_bytes is not None
    assert small.prealloc_bytes == small.pool_bytes == 4 * GIB // 10


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("GPU_CACHE_POOLBYTES", "; did you mean GPU_CACHE_POOL_BYTES?"),
        ("GPU_CACHE_stats_dirs", "; did you mean GPU_CACHE_STATS_DIR?"),
        ("GPU_CACHE_QUX_ZZZ", ""),
    ],
)
def test_a_variable_that_is_no_setting_is_warned_of_once(
    caplog: pytest.LogCaptureFixture, name: str, meant: str
) -> None:
    for _ in range(3):
        assert CacheConfig.from_env({name: "1", "GPU_CACHE_STATS_DIR": "x", "OTHER": "2"}) == CacheConfig()
    assert [record.getMessage() for record in caplog.records] == [
        f"{name} is no setting of gpu_cache, and is ignored{meant}"
    ]


def test_every_variable_that_the_package_reads_is_known(caplog: pytest.LogCaptureFixture) -> None:
    package = Path(__file__).parents[2] / "gpu_cache"
    named = {
        name for path in package.rglob("*") if path.suffix in (".py", ".cpp")
        for name in re.findall(r"\bGPU_CACHE_[A-Z_]*[A-Z]\b", path.read_text())
    }  # fmt: skip
    assert len(named) > 5
    CacheConfig.from_env(
        dict.fromkeys(named - {variable(field.name) for field in dataclasses.fields(CacheConfig)}, "1")
    )
    assert [record.getMessage() for record in caplog.records] == []


@pytest.mark.parametrize(
    ("text", "is_no"),
    [
        ("0", True),
        ("no", True),
        (" Off ", True),
        ("FALSE", True),
        (None, False),
        ("", False),
        ("1", False),
        ("n", False),
    ],
)
def test_one_rule_tells_which_text_of_a_switch_says_no(text: str | None, is_no: bool) -> None:
    assert is_off(text) is is_no


def test_a_switch_that_says_neither_yes_nor_no_is_refused_by_its_name() -> None:
    environs: list[dict[str, str]] = [{"S": "On "}, {"S": "off"}, {"S": " "}, {}]
    assert [says_yes("S", one, default=True) for one in environs] == [True, False, True, True]
    assert [says_yes("S", one, default=False) for one in environs] == [True, False, False, False]
    with pytest.raises(ValueError, match="S='maybe': must be 0 or 1"):
        says_yes("S", {"S": "maybe"}, default=True)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [("GPU_CACHE_STATS", "maybe", "must be 0 or 1"), ("GPU_CACHE_RANK", "first", "must be a whole number")],
)
def test_a_variable_that_settings_leave_open_is_refused_by_its_name(name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"{name}='{text}': {message}"):
        CacheConfig().resolved(is_cuda=False, device_bytes=0, environ={name: text, "RANK": "1"})


def test_a_device_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="device='gpu': must be auto, cpu, cuda or cuda:N, such as cuda:0"):
        CacheConfig(device="gpu")


def test_every_field_has_its_variable() -> None:
    values = {
        "device": "cuda:1", "slab_bytes": "8MiB", "prealloc_bytes": "0", "pool_bytes": "64MiB", "staging_slots": "2",
        "staging_slot_bytes": "1MiB", "run_bytes": "4096", "fetch_timeout_s": "2.5",
        "max_inflight_bytes": "32MiB", "ready": "stream", "reuse_fence": "noted", "stats": "0", "role": "actor",
        "rank": "3", "on_mutation": "error", "debug_checksum": "1", "host_tier_bytes": "1GiB",
    }  # fmt: skip
    assert values.keys() == {field.name for field in dataclasses.fields(CacheConfig)}
    assert list(values) == re.findall(r"^        (\w+): ", (CacheConfig.__doc__ or "").partition("Raises:")[0], re.M)
    config = CacheConfig.from_env({variable(name): value for name, value in values.items()})
    assert config == CacheConfig(
        "cuda:1",
        8 * MIB,
        0,
        64 * MIB,
        2,
        MIB,
        4096,
        2.5,
        32 * MIB,
        "stream",
        "noted",
        False,
        "actor",
        3,
        "error",
        True,
        1 << 30,
    )  # fmt: skip


def test_overrides_win_over_variables_and_empty_ones_do_not_count() -> None:
    environ = {"GPU_CACHE_POOL_BYTES": "64MiB", "GPU_CACHE_SLAB_BYTES": ""}
    config = CacheConfig.from_env(environ, pool_bytes="32MiB")
    assert (config.pool_bytes, config.slab_bytes) == (32 * MIB, 256 * MIB)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("device", "gpu"), ("slab_bytes", 0), ("slab_bytes", "1GX"), ("prealloc_bytes", -1), ("pool_bytes", 100),
        ("staging_slots", 0), ("run_bytes", "x"), ("fetch_timeout_s", 0), ("fetch_timeout_s", float("nan")),
        ("ready", "now"), ("reuse_fence", "none"), ("staging_slots", "two"), ("slab_bytes", None),
        ("stats", "perhaps"), ("stats", 2), ("role", ""), ("role", 5),
        ("rank", -1), ("rank", "x"), ("rank", 1.5), ("staging_slots", float("inf")),
        ("pool_bytes", 1 << 63), ("on_mutation", "raise"), ("on_mutation", None), ("debug_checksum", "maybe"),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_with_its_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"CacheConfig\.{field}={value!r}"):
        CacheConfig(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("pool_bytes", "-1", "GPU_CACHE_POOL_BYTES='-1': '-1' is not a size"),
        ("slab_bytes", "9" * 400, "GPU_CACHE_SLAB_BYTES='9+': '9+' is not a size"),
        ("host_tier_bytes", "99999999T", "GPU_CACHE_HOST_TIER_BYTES='99999999T': no memory has more than"),
        ("rank", "1.5", "GPU_CACHE_RANK='1.5': must be a whole number"),
        ("device", " ", "GPU_CACHE_DEVICE=' ': must be auto, cpu"),
    ],
)
def test_a_bad_variable_is_refused_by_its_name(field: str, text: str, message: str) -> None:
    environ = {variable(field): text}
    with pytest.raises(ValueError, match=message):
        CacheConfig.from_env(environ)
    assert CacheConfig.from_env(environ, **{field: getattr(CacheConfig(), field)}) == CacheConfig()


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="run_bytes=8,388,608: must fit a staging slot of 1,048,576"):
        CacheConfig(run_bytes=8 * MIB, staging_slot_bytes=MIB)
    with pytest.raises(ValueError, match="prealloc_bytes=2,097,152: must not exceed pool_bytes 1,048,576"):
        CacheConfig(prealloc_bytes=2 * MIB, pool_bytes=MIB)
    with pytest.raises(ValueError, match="debug_checksum=True: on_mutation='ignore' does nothing"):
        CacheConfig(debug_checksum=True, on_mutation="ignore")


def test_blocks_are_aligned() -> None:
    assert [aligned(n) for n in (0, 1, 512, 513)] == [0, 512, 512, 1024]
