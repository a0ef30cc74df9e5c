from __future__ import annotations

from typing import Any

import pytest
import torch

from gpu_cache.device.cuda import CudaDevice
from gpu_cache.device.cudart import has_context
from gpu_cache.device.host import HostDevice
from gpu_cache.device.placement import Placement, choose_device, group_device
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_cuda_objects import UntouchableCuda

EIGHT = FakeCuda(num_devices=8)


def choose(
    setting: str,
    cuda: Any = EIGHT,
    environ: dict[str, str] | None = None,
    bound: str | None = None,
    used: tuple[int, ...] = (),
) -> Placement:
    return choose_device(
        setting,
        cuda=cuda,
        environ=environ or {},
        bound_device=lambda: torch.device(bound) if bound else None,
        has_context=lambda index: index in used,
    )


def test_auto_is_the_host_while_cuda_is_not_initialised_and_touches_nothing_else() -> None:
    placed = choose("auto", UntouchableCuda(), {"LOCAL_RANK": "1"}, bound="cuda:1")

    assert isinstance(placed.device, HostDevice)
    assert not placed.is_final
    assert "not initialised CUDA" in placed.reason


def test_auto_is_decided_again_once_cuda_is_initialised() -> None:
    placed = choose("auto", FakeCuda(num_devices=1))

    assert placed.device.torch_device == torch.device("cuda:0")
    assert placed.is_final


@pytest.mark.parametrize("cuda", [EIGHT, UntouchableCuda()], ids=["initialised", "not initialised"])
def test_auto_is_the_host_for_good_under_torch_memory_saver(cuda: Any) -> None:
    placed = choose("auto", cuda, {"TMS_INIT_ENABLE": "1"}, bound="cuda:1")

    assert isinstance(placed.device, HostDevice)
    assert placed.is_final
    assert "TMS_INIT_ENABLE" in placed.reason


def test_cpu_is_the_host_on_every_machine() -> None:
    placed = choose("cpu", UntouchableCuda())

    assert isinstance(placed.device, HostDevice)
    assert placed.is_final


@pytest.mark.parametrize("setting", ["auto", "cuda"])
@pytest.mark.parametrize(
    ("environ", "bound", "used", "index", "reason"),
    [
        ({"LOCAL_RANK": "3"}, "cuda:5", (7,), 5, "process group"),
        ({"LOCAL_RANK": "3"}, None, (7,), 3, "LOCAL_RANK=3"),
        ({"LOCAL_RANK": "3"}, "cpu", (7,), 3, "LOCAL_RANK=3"),
        ({"LOCAL_RANK": "3"}, "cuda", (7,), 3, "LOCAL_RANK=3"),
        ({"LOCAL_RANK": "8"}, None, (7,), 7, "uses"),
        ({"LOCAL_RANK": "none"}, None, (7,), 7, "uses"),
        ({}, None, (7,), 7, "uses"),
    ],
)
def test_each_clue_names_a_device(
    setting: str, environ: dict[str, str], bound: str | None, used: tuple[int, ...], index: int, reason: str
) -> None:
    placed = choose(setting, environ=environ, bound=bound, used=used)

    assert isinstance(placed.device, CudaDevice)
    assert placed.device.torch_device == torch.device("cuda", index)
    assert reason in placed.reason
    assert placed.is_final


def test_the_only_visible_device_wins_over_local_rank() -> None:
    placed = choose("auto", FakeCuda(num_devices=1), {"LOCAL_RANK": "3"})

    assert placed.device.torch_device == torch.device("cuda:0")


@pytest.mark.parametrize("setting", ["auto", "cuda"])
@pytest.mark.parametrize("used", [(), (2, 3)])
def test_an_unclear_device_is_asked_for(setting: str, used: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match="GPU_CACHE_DEVICE") as caught:
        choose(setting, used=used)

    assert f"8 CUDA devices are visible, this process uses {len(used)}" in str(caught.value)
    assert "LOCAL_RANK (not set)" in str(caught.value)


def test_a_numbered_device_is_taken_as_it_is() -> None:
    placed = choose("cuda:6", environ={"LOCAL_RANK": "1", "TMS_INIT_ENABLE": "1"}, bound="cuda:2")

    assert placed.device.torch_device == torch.device("cuda:6")


def test_an_explicit_device_may_come_before_cuda_is_initialised() -> None:
    class NotYet(FakeCuda):
        def is_initialized(self) -> bool:
            return False

    assert choose("cuda:1", NotYet()).device.torch_device == torch.device("cuda:1")
    assert choose("cuda", NotYet(num_devices=1)).device.torch_device == torch.device("cuda:0")
    with pytest.raises(RuntimeError, match="uses 0 of them"):
        choose("cuda", NotYet(), used=(0,))  # a context that CUDA, not initialised, cannot be asked about


def test_choosing_makes_no_context() -> None:
    cuda = FakeCuda(num_devices=8)
    choose("auto", cuda, used=(4,))
    choose("cuda:1", cuda)

    assert not cuda.contexts


@pytest.mark.parametrize(("setting", "bound"), [("cuda:8", None), ("auto", "cuda:8")])
def test_a_device_that_is_not_there_is_an_error(setting: str, bound: str | None) -> None:
    with pytest.raises(ValueError, match=r"cuda:8 .*only 8 CUDA devices"):
        choose(setting, bound=bound)


@pytest.mark.parametrize("setting", ["cuda", "cuda:0"])
def test_cuda_without_cuda_is_an_error_that_names_the_setting(setting: str) -> None:
    with pytest.raises(RuntimeError, match=f"device='{setting}'.*not available"):
        choose(setting, FakeCuda(num_devices=0))


@pytest.mark.parametrize("setting", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "CPU"])
def test_other_settings_are_refused(setting: str) -> None:
    with pytest.raises(ValueError, match="use 'auto', 'cpu', 'cuda' or 'cuda:N'"):
        choose(setting)


def test_without_a_process_group_no_device_is_bound() -> None:
    assert group_device() is None


def test_the_default_group_tells_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = torch.distributed
    bound = torch.device("cuda:3")
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(
        distributed, "group", type("group", (), {"WORLD": type("Group", (), {"bound_device_id": bound})})
    )

    assert group_device() == bound


def test_a_group_on_the_host_has_no_device(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert group_device() is None
    finally:
        torch.distributed.destroy_process_group()


def test_torch_is_asked_which_devices_this_process_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_cuda_hasPrimaryContext", lambda index: index == 2, raising=False)

    assert [has_context(index) for index in range(4)] == [False, False, True, False]


def test_the_default_arguments_are_this_process() -> None:
    if not torch.cuda.is_initialized():
        assert isinstance(choose_device(environ={}).device, HostDevice)
