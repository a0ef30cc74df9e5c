"""The GPUs, as NVML knows them. Every call is guarded: what NVML cannot tell is None."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from typing import Any

from gpu_cache.smi.figures import printable

DRIVER_NOT_LOADED, LIBRARY_NOT_FOUND = 9, 12  # NVML's numbers; the tool's exit codes


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One GPU, or one MIG device of it. `index` is NVML's, in PCI bus order."""

    index: int
    label: str  # "3", or "3:1" for a MIG device
    uuid: str | None
    name: str
    used_bytes: int | None = None
    total_bytes: int | None = None
    process_bytes: dict[int, int] = dataclasses.field(default_factory=dict)  # by host pid


@dataclasses.dataclass(frozen=True)
class Devices:
    """One look at all of them. `problem` says why there are none; `code` is then NVML's."""

    gpus: tuple[Gpu, ...] = ()
    driver_version: str | None = None
    cuda_version: str | None = None
    problem: str | None = None
    code: int = 0

    def find(self, uuid: str) -> Gpu | None:
        """The GPU of this UUID."""
        return next((gpu for gpu in self.gpus if gpu.uuid == uuid), None) if uuid else None


class Nvml:
    """Looks at the GPUs. Never raises.

    Args:
        library: A module like `pynvml`; None: that one, imported at the first look.
    """

    def __init__(self, library: Any = None) -> None:
        self._library = library
        self._is_started = False

    def look(self) -> Devices:
        """All GPUs now."""
        problem = self._start()
        if problem is not None:
            return problem
        cuda = self._ask("nvmlSystemGetCudaDriverVersion")
        return Devices(
            gpus=tuple(self._gpus()),
            driver_version=_text(self._ask("nvmlSystemGetDriverVersion")),
            cuda_version=f"{cuda // 1000}.{cuda % 1000 // 10}" if isinstance(cuda, int) else None,
        )

    def _start(self) -> Devices | None:
        """The reason why NVML cannot be asked."""
        if self._is_started:
            return None
        try:
            self._library = self._library or importlib.import_module("pynvml")
        except ImportError:
            return Devices(problem="pip install nvidia-ml-py", code=LIBRARY_NOT_FOUND)
        try:
            self._library.nvmlInit()
        except self._library.NVMLError as error:
            code = getattr(error, "value", DRIVER_NOT_LOADED)
            return Devices(problem=printable(str(error)), code=code if code == LIBRARY_NOT_FOUND else DRIVER_NOT_LOADED)
        self._is_started = True
        return None

    def _ask(self, function: str, *arguments: Any) -> Any:
        """The answer, or None if there is none or the installed library does not know the function."""
        try:
            return getattr(self._library, function)(*arguments)
        except (self._library.NVMLError, AttributeError, UnicodeDecodeError):
            return None

    def _gpus(self) -> Iterator[Gpu]:
        for index in range(self._ask("nvmlDeviceGetCount") or 0):
            handle = self._ask("nvmlDeviceGetHandleByIndex", index)
            if handle is None:
                yield Gpu(index, str(index), None, "GPU is lost")
                continue
            parts = list(self._mig_devices(index, handle))
            yield from parts or [self._gpu(index, str(index), handle)]

    def _mig_devices(self, index: int, handle: Any) -> Iterator[Gpu]:
        mode = self._ask("nvmlDeviceGetMigMode", handle)
        if not mode or not mode[0]:
            return
        for number in range(self._ask("nvmlDeviceGetMaxMigDeviceCount", handle) or 0):
            part = self._ask("nvmlDeviceGetMigDeviceHandleByIndex", handle, number)
            if part is not None:
                yield self._gpu(index, f"{index}:{number}", part)

    def _gpu(self, index: int, label: str, handle: Any) -> Gpu:
        memory = self._ask("nvmlDeviceGetMemoryInfo", handle)
        running = self._ask("nvmlDeviceGetComputeRunningProcesses", handle) or []
        return Gpu(
            index=index,
            label=label,
            uuid=_text(self._ask("nvmlDeviceGetUUID", handle)),
            name=_text(self._ask("nvmlDeviceGetName", handle)) or "N/A",
            used_bytes=getattr(memory, "used", None),
            total_bytes=getattr(memory, "total", None),
            process_bytes={one.pid: one.usedGpuMemory for one in running if one.usedGpuMemory is not None},
        )


def _text(answer: Any) -> str | None:
    """As text; older libraries answer bytes."""
    if isinstance(answer, bytes):
        answer = answer.decode(errors="replace")
    return printable(answer) if isinstance(answer, str) else None
