"""The devices as NVML tells them, and without an NVML."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from gpu_cache.smi.nvml import Nvml
from tests.support.smi_nvml import FakeNvml, NVMLError, eight_gpus
from tests.support.smi_reports import MIB, uuid


def test_gpus_come_in_the_order_of_the_bus_with_their_processes() -> None:
    devices = Nvml(FakeNvml()).look()
    assert [gpu.label for gpu in devices.gpus] == list("01234567")
    assert (devices.driver_version, devices.cuda_version, devices.problem) == ("570.124.06", "12.8", None)
    assert devices.gpus[0].process_bytes == {41873: 98300 * MIB}
    assert devices.find(uuid(3)) is devices.gpus[3]
    assert devices.find("") is None


def test_it_starts_once() -> None:
    library = FakeNvml()
    nvml = Nvml(library)
    nvml.look(), nvml.look()
    assert library.num_starts == 1


@pytest.mark.parametrize(("failure", "code"), [(9, 9), (12, 12), (15, 9)])
def test_without_a_driver_it_says_so_in_nvmls_words(failure: int, code: int) -> None:
    devices = Nvml(FakeNvml(failure=failure)).look()
    assert (devices.gpus, devices.code, devices.problem) == ((), code, str(NVMLError(failure)))


def test_a_driver_that_comes_later_is_found() -> None:
    library = FakeNvml(failure=9)
    nvml = Nvml(library)
    assert nvml.look().problem
    library._failure = 0
    assert len(nvml.look().gpus) == 8


def test_without_the_python_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    devices = Nvml().look()
    assert (devices.code, devices.problem) == (12, "pip install nvidia-ml-py")


def test_the_real_package_has_every_name_that_the_tool_uses() -> None:
    pynvml = importlib.import_module("pynvml")
    asked = [name for name in dir(FakeNvml) if name.startswith("nvml")]
    assert [name for name in asked if not hasattr(pynvml, name)] == []
    assert pynvml.NVML_ERROR_DRIVER_NOT_LOADED == 9
    assert pynvml.NVML_ERROR_LIBRARY_NOT_FOUND == 12


def test_a_lost_gpu_keeps_its_place() -> None:
    gpus = eight_gpus()
    gpus[2]["is_lost"] = True
    found = Nvml(FakeNvml(gpus)).look().gpus
    assert [gpu.label for gpu in found] == list("01234567")
    assert (found[2].name, found[2].uuid, found[2].used_bytes) == ("GPU is lost", None, None)


def test_memory_that_nvml_cannot_tell_is_unknown() -> None:
    gpu = Nvml(FakeNvml([{"uuid": "GPU-1", "name": "GB10"}])).look().gpus[0]
    assert (gpu.name, gpu.used_bytes, gpu.total_bytes) == ("GB10", None, None)


def test_mig_devices_stand_for_their_gpu() -> None:
    parts = [{"uuid": f"MIG-{n}", "name": "H100 MIG 3g.40gb", "used": n * MIB, "total": 40960 * MIB} for n in (1, 2)]
    found = Nvml(FakeNvml([{"uuid": "GPU-0", "name": "H100", "parts": parts}, *eight_gpus()[:1]])).look().gpus
    assert [(gpu.label, gpu.index) for gpu in found] == [("0:0", 0), ("0:1", 0), ("1", 1)]
    assert found[1].used_bytes == 2 * MIB


def test_a_name_cannot_paint_the_terminal() -> None:
    gpu = Nvml(FakeNvml([{"uuid": "GPU-1", "name": "evil\x1b[2J"}])).look().gpus[0]
    assert gpu.name == "evil?[2J"
