"""A made-up NVML: the functions of `pynvml` that the tool calls, over GPUs that a test describes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tests.support.smi_reports import FIRST_PID, MIB, uuid

_WORDS = {3: "Not Supported", 9: "Driver Not Loaded", 12: "NVML Shared Library Not Found", 15: "GPU is lost"}


class NVMLError(Exception):
    """As pynvml's: the number in `value`, NVML's words as text."""

    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.value = value

    def __str__(self) -> str:
        return _WORDS[self.value]


class FakeNvml:
    """The module.

    Args:
        gpus: Each a dict with name, uuid, used, total in bytes, pids (pid -> bytes), parts (MIG devices), is_lost.
        failure: Number of the error with which it refuses to start.
    """

    NVMLError = NVMLError

    def __init__(self, gpus: list[dict[str, Any]] | None = None, failure: int = 0) -> None:
        self._gpus = eight_gpus() if gpus is None else gpus
        self._failure = failure
        self.num_starts = 0

    def nvmlInit(self) -> None:  # noqa: N802
        self.num_starts += 1
        if self._failure:
            raise NVMLError(self._failure)

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "570.124.06"

    def nvmlSystemGetCudaDriverVersion(self) -> int:  # noqa: N802
        return 12080

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self._gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:  # noqa: N802
        return _present(self._gpus[index])

    def nvmlDeviceGetUUID(self, gpu: dict[str, Any]) -> str:  # noqa: N802
        return gpu["uuid"]

    def nvmlDeviceGetName(self, gpu: dict[str, Any]) -> bytes:  # noqa: N802
        return gpu["name"].encode()

    def nvmlDeviceGetMemoryInfo(self, gpu: dict[str, Any]) -> SimpleNamespace:  # noqa: N802
        if "used" not in gpu:
            raise NVMLError(3)
        return SimpleNamespace(used=gpu["used"], total=gpu["total"])

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: dict[str, Any]) -> list[SimpleNamespace]:  # noqa: N802
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in gpu.get("pids", {}).items()]

    def nvmlDeviceGetMigMode(self, gpu: dict[str, Any]) -> list[int]:  # noqa: N802
        if "parts" not in gpu:
            raise NVMLError(3)
        return [1, 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, gpu: dict[str, Any]) -> int:  # noqa: N802
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, gpu: dict[str, Any], index: int) -> dict[str, Any]:  # noqa: N802
        if index >= len(gpu["parts"]):
            raise NVMLError(3)
        return gpu["parts"][index]


def _present(gpu: dict[str, Any]) -> dict[str, Any]:
    if gpu.get("is_lost"):
        raise NVMLError(15)
    return gpu


def eight_gpus() -> list[dict[str, Any]]:
    """Those of the specification's first screen; NVML hands them out in the order of the bus."""
    used = [98304, 98335, 98366, 98397, 98428, 98459, 4, 98521]
    return [
        {
            "uuid": uuid(index),
            "name": "NVIDIA H200",
            "used": used_mib * MIB,
            "total": 143771 * MIB,
            "pids": {FIRST_PID + index: (used_mib - 4) * MIB} if used_mib > 4 else {},
        }
        for index, used_mib in enumerate(used)
    ]
