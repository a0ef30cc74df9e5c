"""The transport that docs/transports.md shows works, as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpu_cache import FetchError
from gpu_cache.rpc import node_cache
from gpu_cache.rpc.client import memory, same_host
from gpu_cache.rpc.segments import node_cache_path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/transports.md").read_text()
(CODE,) = re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("GPU_CACHE_DEVICE", "cpu")
    found: dict[str, Any] = {}
    exec(compile(CODE, "docs/transports.md", "exec"), found)
    return found


def test_the_source_of_the_docs_delivers_files_and_names_what_is_missing(names: dict[str, Any], tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(10.0),
        "b": np.zeros((3, 2), dtype=np.int32),
        "large": np.arange(3_000_000),
        "0": np.ones(0),
        "scalar": np.array(2.5),
    }
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    for tensor, array in zip(names["load"](tmp_path, list(arrays)), arrays.values(), strict=True):
        assert torch.equal(tensor, torch.from_numpy(array))
    with pytest.raises(FetchError, match="shard gone"):
        names["load"](tmp_path, ["a", "gone"])


def test_it_has_about_fifty_lines() -> None:
    assert len([line for line in CODE.splitlines() if line]) <= 55


def test_the_reasons_in_the_docs_are_those_of_the_code() -> None:
    code = Path(memory.__file__).read_text() + Path(same_host.__file__).read_text()
    for words in (
        "cannot be reached from here", "nothing listens on", "is another user's", "no descriptor left",
        "offers no shared memory", "no answer on",
    ):  # fmt: skip
        assert words in TEXT
        assert words in code


def test_the_systemd_unit_serves_where_the_page_sends_its_trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    unit = (ROOT / "scripts/systemd/gpu-cache-node-cache.service").read_text()
    (command,) = re.findall(r"^ExecStart=/usr/bin/env \$\{PYTHON\} -m gpu_cache\.rpc\.node_cache (.*)$", unit, re.M)
    (default,) = re.findall(r"^Environment=MAX_BYTES=(.*)$", unit, re.M)
    command = command.replace("%t", "/run/user/7").replace("${MAX_BYTES}", default)
    served = node_cache._parser().parse_args(shlex.split(command))
    assert served.max_bytes == node_cache.DEFAULT_MAX_BYTES
    for text, folder in ((unit, "%t"), (TEXT, "$XDG_RUNTIME_DIR")):
        said = set(re.findall(r"GPU_CACHE_NODE_CACHE=(\S+/gpu-cache-node-cache)", text))
        assert {word.replace(folder, "/run/user/7") for word in said} == {served.path}
    monkeypatch.setenv("GPU_CACHE_NODE_CACHE", served.path)
    assert node_cache_path() == served.path
