"""A cache on its own, with a source of one's own: shards are files, read straight into the cache's memory.

    python scripts/examples/own_source.py

A source opens readers. A reader describes its shards (`next_specs`), then fills buffers with their bytes (`read_into`):
pinned buffers on a GPU's node, else the slabs themselves. So no byte is copied in between.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections import deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from io import FileIO
from pathlib import Path

import torch

from gpu_cache import FetchError, ShardReader, ShardSpec, TensorCache

DTYPES = {"f32": torch.float32, "i64": torch.int64}


class FileReader:
    """Reads files whose names say what is in them: `weights.4x128.f32`."""

    def __init__(self, folder: Path, keys: Sequence[Hashable]) -> None:
        self.node, self.keys = str(folder), keys
        self.failures: dict[Hashable, Exception] = {}
        self._folder, self._parts = folder, [list(keys)]
        self._files: deque[FileIO] = deque()  # to be read, in the order of the specs

    def next_specs(self) -> Sequence[ShardSpec] | None:
        """Describe all that there is, in one part; name what is missing in `failures`."""
        if not self._parts:
            return None
        specs = []
        for key in self._parts.pop():
            path = self._folder / str(key)
            if not path.exists():
                self.failures[key] = FileNotFoundError(f"there is no {path}")
                continue
            shape, dtype = str(key).split(".")[1:]
            specs.append(ShardSpec(key, DTYPES[dtype], tuple(map(int, shape.split("x")))))
            self._files.append(FileIO(path))
        return specs

    def read_into(self, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers in order; a large shard comes in several, each the next bytes of its file."""
        for buffer in buffers:
            file, read = self._files[0], 0
            while read < len(buffer):
                if not (count := file.readinto(buffer[read:])):
                    raise FetchError(f"{file.name} is shorter than its name says")
                read += count
            if file.tell() == os.fstat(file.fileno()).st_size:
                self._files.popleft().close()

    def cancel(self) -> None:
        """A read of a local file ends soon by itself."""

    def close(self) -> None:
        """Close what was not read."""
        while self._files:
            self._files.popleft().close()


class Folder:
    """A source: one reader for all keys, as they are on one disk."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def open(self, keys: Sequence[Hashable], timeout_s: float) -> Iterable[ShardReader]:
        return [FileReader(self._path, keys)]


def write(folder: Path, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Write tensors to files; their names are the keys of the shards."""
    names = []
    for name, tensor in tensors.items():
        dtype = next(short for short, one in DTYPES.items() if one is tensor.dtype)
        names.append(f"{name}.{'x'.join(map(str, tensor.shape))}.{dtype}")
        (folder / names[-1]).write_bytes(tensor.numpy().tobytes())
    return names


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Folder(Path(folder))
        keys = write(Path(folder), {"ids": torch.arange(512).view(4, 128), "scores": torch.ones(4)})
        with contextlib.closing(TensorCache()) as cache:
            for epoch in range(3):
                ids, scores = cache.get_many(keys, source)
                print(f"epoch {epoch}:", tuple(ids.shape), scores.sum().item(), cache.buffer_stats()["hits"], "hits")
            (missing,) = cache.get_many(["none.4.f32"], source, on_error="none")
            print("missing:", missing)
            print("cleared:", cache.clear())


if __name__ == "__main__":
    main()
