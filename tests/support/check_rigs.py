"""Rigs on which tests run the GPU checks: the fake of CUDA, and the simulated device where streams must lag."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from gpu_cache import CacheConfig, TensorCache
from gpu_cache.device.private_pools import _raw_memory
from tests.support.cuda_devices import cuda_device
from tests.support.fake_cuda import MIB, FakeCuda
from tests.support.gpu_scene import LONG_CYCLES, SHARD_BYTES, Rig, small_config
from tests.support.sim_device import SimDevice
from tests.support.sim_streams import SimStream


class FakeRig(Rig):
    """The real `CudaDevice` over the fake CUDA; large sizes are a sixty-fourth, and little is repeated.

    Attributes:
        cuda: The fake, whose `violations` tell what a GPU would not have borne.
    """

    where = torch.device("cpu")
    mib = MIB // 64
    hurry = 500

    def __init__(self, folder: Path) -> None:
        self.cuda = FakeCuda(num_devices=1, pin_limit_bytes=512 * MIB, device_bytes=512 * MIB)
        self.device = cuda_device(self.cuda, folder, index=0)

    def small_cache(self) -> TensorCache:
        return TensorCache(small_config(), device=self.device)

    def default_cache(self) -> TensorCache:
        sizes = {"slab_bytes": 32 * MIB, "prealloc_bytes": 32 * MIB, "pool_bytes": 64 * MIB}
        return TensorCache(CacheConfig(**sizes), device=self.device)

    def synchronize(self) -> None:
        self.cuda.advance()

    def empty(self, nbytes: int) -> torch.Tensor:
        with _raw_memory():
            return self.cuda.empty(nbytes, dtype=torch.uint8, device=self.device.torch_device)

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.data_ptr() in self.cuda.pinned

    def pinned_by_torch(self, nbytes: int) -> torch.Tensor:
        return self.device.pinned(nbytes).tensor

    def launch(self) -> None:
        try:
            self.cuda.check_last_error()
        finally:
            self.cuda.thread.sticky_error = 0

    def apart(self, _run: Callable[[], str], here: Callable[[], str]) -> str:
        return here()

    @contextmanager
    def capturing(self) -> Iterator[Any]:
        with self.cuda.capture(self.cuda.Stream(device=self.device.torch_device)):
            yield SimpleNamespace(replay=lambda: None)  # captured work has run already


class SimRig(Rig):
    """The simulated device: streams run when a thread waits for them, busy ones last.

    Attributes:
        device: Its `faults` name every race.
    """

    where = torch.device("cpu")

    def __init__(self) -> None:
        self.device = SimDevice()
        self.device.adversary.begin()
        self._busy: list[SimStream] = []

    def small_cache(self) -> TensorCache:
        return TensorCache(small_config(), device=self.device)

    def consumers(self) -> Sequence[SimStream]:
        return self.device.pooled[:2]

    def load_kernels(self, streams: Sequence[SimStream]) -> None:
        pass

    def keep_busy(self, stream: SimStream, cycles: int = LONG_CYCLES) -> None:
        self._busy.append(stream)

    def synchronize(self) -> None:
        streams = [one for one in self.device.pooled if one not in self._busy]
        self.device.adversary.finish(streams)
        self._busy.clear()
        self.device.synchronize_all()

    def current(self, stream: SimStream) -> AbstractContextManager[Any]:
        return self.device.stream(stream)

    def is_idle(self, stream: SimStream) -> bool:
        return not stream.queue

    def blank(self, nbytes: int) -> torch.Tensor:
        return self.device.pinned(SHARD_BYTES).tensor[:nbytes]

    def read(self, block: torch.Tensor, seen: torch.Tensor, stream: SimStream) -> None:
        self.device.copy_all([(seen, block)], stream)

    def record_stream(self, block: torch.Tensor, stream: SimStream) -> None:
        """Torch's allocator has no say here, as on a GPU."""
