"""Memory of the simulated device, and what the host does with it: the actor that no stream orders."""

from __future__ import annotations

import threading

import numpy as np
import torch

from tests.support.sim_clock import HOST, POISON, Clock, Region, Touch


class SimHost:
    """The part of a `SimDevice` that knows its memory and the host's place in time.

    Attributes:
        faults: Races and wrong bytes.
    """

    def __init__(self) -> None:
        self.faults: list[str] = []
        # Guards every field below.
        self._lock = threading.RLock()
        self._regions: list[Region] = []  # also the released ones: their addresses must not come again
        self._host: Clock = {HOST: 1}

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is in an arena or in pinned memory, which streams may read."""
        with self._lock:
            return any(region.contains(tensor.data_ptr()) for region in self._regions)

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether it is in pinned memory, which the host may read."""
        return self.knows(tensor) and self._find(tensor)[0].name.startswith("slot")

    def host_read(self, tensor: torch.Tensor, expected: np.ndarray, what: str) -> None:
        """Read bytes of pinned memory now, whatever the streams have not done by now."""
        with self._lock:
            region, begin = self._find(tensor)
            self._note(region.read(begin, len(expected), self._touch(f"the host reads {what}"), self._host))
            if not np.array_equal(region.memory[begin : begin + len(expected)], expected):
                self._note(f"wrong bytes: the host read {what} at {region.name}+{begin}")

    def host_store(self, tensor: torch.Tensor, values: np.ndarray) -> None:
        """Write bytes of pinned memory now, in place, which torch counts."""
        tensor.add_(0)
        with self._lock:
            region, begin = self._find(tensor)
            self._note(region.write(begin, len(values), self._touch("a store"), self._host))
            region.memory[begin : begin + len(values)] = values

    def host_write(self, tensor: torch.Tensor, what: str) -> None:
        """The host may write these bytes from now on: poison them."""
        with self._lock:
            region, begin = self._find(tensor)
            self._poison(region, begin, tensor.numel(), what)

    def _poison(self, region: Region, begin: int, nbytes: int, what: str) -> None:
        self._note(region.write(begin, nbytes, self._touch(what), self._host))
        region.memory[begin : begin + nbytes] = POISON

    def _touch(self, what: str) -> Touch:
        return Touch(HOST, self._host[HOST], what)

    def _note(self, fault: str) -> None:
        if fault:
            self.faults.append(fault)

    def _find(self, tensor: torch.Tensor) -> tuple[Region, int]:
        """Where a tensor's bytes begin."""
        address = tensor.data_ptr()
        with self._lock:
            for region in self._regions:
                if region.contains(address):
                    return region, address - region.base
        raise AssertionError(f"{address:#x} is no memory of this device")
