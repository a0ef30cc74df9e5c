"""Host memory as a device."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import torch

from gpu_cache.device.hostmem import copy_on_host, host_memory, host_tensor
from gpu_cache.device.protocol import NO_BYTES, Arena, DeviceIdentity, Event, Pinned, Stream
from gpu_cache.source import LentMemory


class HostDevice:
    """Host memory as the device: work is done when its call returns. In tests it may stage bytes as on a GPU."""

    torch_device = torch.device("cpu")
    hard_limit = ""

    def __init__(self, stages: bool = False) -> None:
        self.stages = stages

    def arena(self, nbytes: int, *, private: bool = True) -> Arena:
        return Arena(host_tensor(nbytes))

    def release_arena(self, arena: Arena) -> None:
        arena.let_go()

    def pinned(self, nbytes: int) -> Pinned:
        return Pinned(*host_memory(nbytes), is_pinned=False)

    def release_pinned(self, pinned: Pinned) -> None:
        pinned.tensor, pinned.view = NO_BYTES, memoryview(b"")

    def reads(self, memory: LentMemory) -> bool:
        return True

    def new_stream(self) -> Stream:
        return "host"

    def current_stream(self) -> Stream:
        return "host"

    def fence_streams(self) -> Sequence[Stream]:
        return ["host"]

    def copy_all(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], stream: Stream) -> None:
        copy_on_host(pairs)

    def record(self, stream: Stream, *, timing: bool = False) -> Event:
        return time.perf_counter() if timing else None

    def record_all(self, streams: Sequence[Stream]) -> list[Event]:
        return []

    def discard(self, events: Sequence[Event]) -> None:
        pass

    def wait(self, stream: Stream, event: Event) -> None:
        pass

    def query(self, event: Event) -> bool:
        return True

    def synchronize(self, event: Event) -> None:
        pass

    def elapsed_s(self, start: Event, end: Event) -> float:
        return float(end - start)

    def is_capturing(self) -> bool:
        return False

    def is_any_capturing(self, streams: Sequence[Stream]) -> bool:
        return False

    def memory_info(self) -> tuple[int, int]:
        page = os.sysconf("SC_PAGE_SIZE")
        return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page

    def num_shortages(self) -> int:
        return 0

    def identity(self) -> DeviceIdentity:
        return DeviceIdentity("host")
