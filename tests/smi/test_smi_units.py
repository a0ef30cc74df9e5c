"""Figures as people read them, quantiles, addresses, and what messages say."""

from __future__ import annotations

import math

import pytest

from gpu_cache import units
from gpu_cache.smi import figures
from gpu_cache.smi.leaks import short_dtype, short_key
from gpu_cache.smi.node import host_of, quantile_of
from tests.support.smi_machine import Machine
from tests.support.smi_reports import report

MIB = 1 << 20


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (-3, "0s"), (38.9, "38s"), (60, "1m0s"), (127, "2m7s"), (4322, "1h12m"), (273_600, "3d4h")],
)
def test_ages_have_two_units(seconds: float | None, text: str) -> None:
    assert units.age(seconds) == text


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(None, "-"), (0, "0"), (1, "0.1"), (MIB // 2, "0.5"), (MIB - 1, "1"), (8 * MIB, "8"), (12288 * MIB, "12288")],
)
def test_less_than_a_mib_does_not_look_like_nothing(nbytes: float | None, text: str) -> None:
    assert units.mib(nbytes) == text


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (None, "-"), (0, "0B"), (72, "72B"), (1023, "1023B"), (1434, "1.4KiB"), (300_000, "293KiB"), (MIB - 1, "1MiB"),
        (40 * MIB, "40MiB"), (1023 * MIB, "1023MiB"), (12288 * MIB, "12GiB"), (99.94 * MIB, "99.9MiB"),
        (5000 << 40, "5000TiB"),
    ],
)  # fmt: skip
def test_sizes_come_in_the_unit_that_fits(nbytes: float | None, text: str) -> None:
    assert units.size(nbytes) == text


def test_speeds_come_in_the_unit_that_fits() -> None:
    speeds = [None, 0, 12, 950_000, 38e6, 999.9e6, 11.44e9]
    assert list(map(units.speed, speeds)) == ["-", "0B/s", "12B/s", "950kB/s", "38MB/s", "1GB/s", "11.4GB/s"]


def test_rates_and_ordinals() -> None:
    assert [units.gigabytes(rate) for rate in (None, 0, 3e7, 11.44e9)] == ["-", "0.0", "0.03", "11.4"]
    assert [units.ordinal(n) for n in (1, 2, 3, 9, 11, 12, 13, 21, 112)] == (
        ["1st", "2nd", "3rd", "9th", "11th", "12th", "13th", "21st", "112th"]
    )
    assert (units.ratio(1, 0), units.ratio(None, 2), units.ratio(1, 2)) == (None, None, 0.5)


def test_quantiles_are_interpolated_in_their_bucket() -> None:
    edges = (1.0, 2.0, 4.0)
    assert quantile_of([0, 10, 0, 0], edges, 0.5) == 1.5
    assert quantile_of([10, 0, 10, 0], edges, 0.75) == 3.0
    assert quantile_of([10, 0, 10, 0], edges, 0.5) == 1.0
    assert quantile_of([0, 0, 0, 5], edges, 0.5) == 4.0
    assert quantile_of([0, 0, 0, 0], edges, 0.5) is None
    assert quantile_of([1, 2], edges, 0.5) is None


def test_hosts_of_addresses() -> None:
    addresses = ["gpu-a-021:35221", "10.0.0.1:80", "[fe80::1]:80", "fe80::1", "local", "other", "host:x"]
    assert [host_of(address) for address in addresses] == (
        ["gpu-a-021", "10.0.0.1", "[fe80::1]", "fe80::1", "local", "other", "host:x"]
    )


def test_a_report_of_another_process_is_not_taken_on_trust() -> None:
    odd = {"bool": True, "nan": math.nan, "long": 10**400, "low": -1e300, "text": "x", "list": [1, "x"]}
    odd["control"] = "a\x1b\x9b\nb" + "c" * 300
    assert [figures.number(odd, key) for key in odd] == [None] * 7
    assert figures.text(odd, "list") == ""
    assert figures.text(odd, "control")[:5] == "a???b"
    assert len(figures.text(odd, "control")) == 200
    assert (figures.numbers(odd, "list"), figures.numbers(odd, "text"), figures.mapping(odd, "text")) == ([], [], {})
    assert (figures.total([None, None]), figures.total([None, 2]), figures.largest([None])) == (None, 2, None)


def test_short_names() -> None:
    assert short_key("8f2c1e0a-1111-4222-8333-444455559b11") == "8f2c1e0a-...-9b11"
    assert short_key("weights/layer.0") == "weights/layer.0"
    names = ["torch.bfloat16", "torch.float32", "torch.int64", "torch.uint8", "torch.complex64", "torch.bool"]
    assert [short_dtype(name) for name in names] == ["bf16", "f32", "i64", "u8", "c64", "bool"]


def test_a_process_without_a_pid_here_is_named_otherwise(node: Machine) -> None:
    foreign = {"pid": 212, "pid_namespace": 1, "role": "critic"}
    node.folder.add(report(7, **foreign), age_s=60)
    node.folder.add(report(6, **foreign, outlived_entries=1, outlived_bytes=MIB, device="cpu", gpu_uuid=None))
    words = " ".join(node.run("--check").out.split())
    assert "Look: in its container: py-spy dump --pid 212" in words
    assert "WARN pid ?: 1 entries (1MiB) survived" in words
    assert "See them: gpu-cache-smi --leaks critic/6" in words
