"""Sources for tests of the cache: tensors in a dict, with gates and faults on the way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import torch

from gpu_cache import FetchError, ShardReader, ShardSpec, TensorReader


class DictSource:
    """Serves tensors by key; a key that it does not have is a failure. Counts what it is asked for."""

    def __init__(self, tensors: Mapping[Hashable, torch.Tensor], node: str = "node-a:1") -> None:
        self.tensors, self.node = tensors, node
        self.asked: list[list[Hashable]] = []
        self.wrap: Callable[[ShardReader], ShardReader] = lambda reader: reader

    def open(self, keys: Sequence[Hashable], timeout_s: float) -> Iterable[ShardReader]:
        self.asked.append(list(keys))
        return [self.wrap(TensorReader(self.node, keys, lambda: [self._load(key) for key in keys]))]

    def _load(self, key: Hashable) -> torch.Tensor | Exception:
        return self.tensors[key] if key in self.tensors else FetchError(f"shard {key} is not at {self.node}")


class GatedReader:
    """Another reader that stops where a test says, until the test opens the gate.

    Args:
        inner: The reader whose shards it delivers.
        gate_after: Reads that pass before one waits.
    """

    def __init__(self, inner: ShardReader, gate_after: int = 0) -> None:
        self._inner, self._left = inner, gate_after
        self.has_arrived, self.gate = threading.Event(), threading.Event()
        self.is_cancelled = self.is_closed = False
        self.after_gate: Callable[[], None] = lambda: None

    @property
    def node(self) -> str:
        return self._inner.node

    @property
    def keys(self) -> Sequence[Hashable]:
        return self._inner.keys

    @property
    def failures(self) -> Mapping[Hashable, Exception]:
        return self._inner.failures

    def next_specs(self) -> Sequence[ShardSpec] | None:
        return self._inner.next_specs()

    def read_into(self, buffers: Sequence[memoryview]) -> None:
        if self._left == 0:
            self.has_arrived.set()
            assert self.gate.wait(30)
            self.after_gate()
        self._left -= 1
        self._inner.read_into(buffers)

    def cancel(self) -> None:
        self.is_cancelled = True

    def close(self) -> None:
        self.is_closed = True
        self._inner.close()


def gated(source: DictSource, gate_after: int = 0) -> list[GatedReader]:
    """Gate every reader that the source opens from now on; the list fills as they are opened."""
    readers: list[GatedReader] = []

    def wrap(reader: ShardReader) -> ShardReader:
        readers.append(GatedReader(reader, gate_after))
        return readers[-1]

    source.wrap = wrap
    return readers


def some_tensors(count: int, seed: int = 0) -> dict[Hashable, torch.Tensor]:
    """Tensors of mixed dtypes and lengths, from 4 bytes to some tens of KiB."""
    generator = torch.Generator().manual_seed(seed)
    dtypes = (torch.float32, torch.int64, torch.uint8, torch.bfloat16)
    tensors: dict[Hashable, torch.Tensor] = {}
    for number in range(count):
        length = int(torch.randint(1, 3000, (1,), generator=generator))
        values = torch.randint(0, 250, (length, 2), generator=generator)
        tensors[f"shard-{number}"] = values.to(dtypes[number % len(dtypes)])
    return tensors


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every byte."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).contiguous().view(torch.uint8))
