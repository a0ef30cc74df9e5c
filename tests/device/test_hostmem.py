from __future__ import annotations

import gc
import mmap
import os

import pytest
import torch

from gpu_cache.device import hostmem
from gpu_cache.device.hostmem import host_memory


def mapped_kib() -> int:
    """Resident memory of this process."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * mmap.PAGESIZE // 1024


def test_tensor_and_view_are_the_same_zeroed_bytes() -> None:
    tensor, view = host_memory(5000)

    assert (tensor.dtype, tensor.shape, len(view)) == (torch.uint8, (5000,), 5000)
    assert not view.readonly
    assert bytes(view) == bytes(5000)
    view[:3] = b"abc"
    tensor[4999] = 7
    assert bytes(tensor[:3].tolist()) == b"abc"
    assert view[4999] == 7


@pytest.mark.parametrize("nbytes", [1, mmap.PAGESIZE, mmap.PAGESIZE + 1])
def test_memory_starts_at_a_page(nbytes: int) -> None:
    tensor, view = host_memory(nbytes)

    assert tensor.data_ptr() % mmap.PAGESIZE == 0
    assert tensor.numel() == len(view) == nbytes


def test_tensor_outlives_the_view_even_a_released_one() -> None:
    tensor, view = host_memory(4096)
    view[:] = bytes([9]) * 4096
    view.release()
    del view
    gc.collect()

    assert int(tensor.sum()) == 9 * 4096


def test_view_outlives_the_tensor() -> None:
    tensor, view = host_memory(4096)
    alias = tensor[4000:]
    alias.fill_(5)
    del tensor, alias
    gc.collect()

    assert view[4095] == 5


def test_memory_is_unmapped_with_its_last_alias() -> None:
    tensor, view = host_memory(64 << 20)
    resident = mapped_kib()
    array = tensor[1:].numpy()
    del tensor, view
    gc.collect()
    assert mapped_kib() > resident - (32 << 10)

    del array
    gc.collect()
    assert mapped_kib() < resident - (32 << 10)


@pytest.mark.parametrize("is_old_kernel", [False, True])
def test_every_page_is_present_before_use(is_old_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if is_old_kernel:
        monkeypatch.setattr(hostmem, "POPULATE_WRITE", 9999)
    before = mapped_kib()
    memory = host_memory(32 << 20)

    assert mapped_kib() >= before + (31 << 10)
    assert int(memory[0].sum()) == 0


def test_a_forked_child_does_not_get_the_memory() -> None:
    tensor, _ = host_memory(mmap.PAGESIZE)
    with open("/proc/self/smaps") as smaps:
        lines = smaps.read().splitlines()
    start = f"{tensor.data_ptr():x}-"
    at = next(number for number, line in enumerate(lines) if line.startswith(start))
    flags = next(line for line in lines[at:] if line.startswith("VmFlags:")).split()

    assert "dc" in flags, "not MADV_DONTFORK"
    assert "sh" not in flags, "shared, not private"


def test_memory_made_in_inference_mode_is_an_ordinary_tensor() -> None:
    with torch.inference_mode():
        tensor, _ = host_memory(16)

    assert not tensor.is_inference()
    tensor.add_(1)


@pytest.mark.parametrize("nbytes", [0, -1])
def test_a_length_below_one_is_refused(nbytes: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        host_memory(nbytes)


def test_a_length_beyond_the_host_is_an_os_error() -> None:
    with pytest.raises(OSError, match="allocate"):
        host_memory(os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE * 1000)
