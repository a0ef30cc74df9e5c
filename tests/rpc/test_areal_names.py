"""AReaL's names in a checkout: the modules of `gpu_cache.rpc`, the same objects."""

from __future__ import annotations

import copy
import fnmatch
import gc
import importlib
import os
import pickle
import subprocess
import sys
import tomllib
import types
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import areal.infra.rpc.rpc_server
import areal.infra.rpc.rtensor
import areal.infra.rpc.serialization
from gpu_cache import process, rpc
from gpu_cache.rpc import adopt, rtensor
from gpu_cache.rpc.server import main
from gpu_cache.rpc.wire import serialization

ROOT = Path(__file__).parents[2]
NAMES = {"rtensor": rtensor, "serialization": serialization, "rpc_server": main}


def run(code: str, path: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=120)


@pytest.mark.parametrize("name", NAMES)
def test_a_module_is_the_same_object_under_both_names(name: str) -> None:
    assert importlib.import_module(f"areal.infra.rpc.{name}") is NAMES[name]
    assert getattr(importlib.import_module("areal.infra.rpc"), name) is NAMES[name]


def test_the_package_has_the_same_names() -> None:
    package = importlib.import_module("areal.infra.rpc")
    assert all(getattr(package, name) is getattr(rpc, name) for name in rpc.__all__)


def test_a_patch_under_areals_name_is_a_patch_of_the_module() -> None:
    with mock.patch("areal.infra.rpc.rtensor.get_backend") as patched:
        assert rtensor.get_backend is patched
    assert areal.infra.rpc.rtensor.RTensor is rtensor.RTensor


def test_a_handle_travels_under_the_name_that_each_wire_has_for_it() -> None:
    handle = rtensor.RTensor(rtensor.TensorShardInfo("a", "h:1"), torch.empty(3, device="meta"))
    assert b"gpu_cache.rpc.rtensor" in pickle.dumps(handle)
    assert b"areal" not in pickle.dumps(copy.copy(handle))
    assert serialization.serialize_value(handle)["class_path"] == "areal.infra.rpc.rtensor.RTensor"


def test_without_any_areal_on_the_path_the_data_plane_is_whole(tmp_path: Path) -> None:
    (tmp_path / "gpu_cache").symlink_to(ROOT / "gpu_cache")
    code = """
import sys
sys.modules["areal"] = None
from gpu_cache.rpc import RTensor
from gpu_cache.rpc.server import main
print(RTensor.__module__)
"""
    done = run(code, [str(tmp_path)], tmp_path)
    assert (done.stdout, done.stderr) == ("gpu_cache.rpc.rtensor\n", "")


def test_pip_installs_no_package_of_areals_name() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = setuptools["packages"]["find"]["include"]
    packages = {str(path.parent.relative_to(ROOT)).replace("/", ".") for path in ROOT.glob("*/**/__init__.py")}
    installed = {name for name in packages if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)}
    assert {name.partition(".")[0] for name in installed} == {"gpu_cache"}
    assert "gpu_cache.rpc.wire" in installed


def test_a_checkout_says_that_it_is_imported_instead_of_an_installed_areal(tmp_path: Path) -> None:
    metadata = tmp_path / "areal-1.2.3.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: areal\nVersion: 1.2.3\n")
    done = run("import areal", [str(tmp_path), str(ROOT)], tmp_path)
    assert done.returncode == 0
    assert done.stderr.startswith(f"AReaL 1.2.3 is installed, but {ROOT}/areal/__init__.py is imported instead")


def test_the_codec_pauses_the_collector_once_for_nested_containers(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[int] = []

    class Counting(process.CollectorPause):
        def __enter__(self) -> None:
            entered.append(1)
            super().__enter__()

    codec = types.ModuleType("codec")

    def walk(value: Any) -> Any:
        """As AReaL's codec: it looks its own function up for each value inside."""
        assert not isinstance(value, list) or not gc.isenabled()
        return [codec.serialize_value(one) for one in value] if isinstance(value, list) else value

    class SerializedDataclass:
        @classmethod
        def from_dataclass(cls, value: Any) -> Any: ...

    codec.__dict__.update(
        serialize_value=walk,
        deserialize_value=lambda value: [codec.deserialize_value(one) for one in value] if value else value,
        SerializedDataclass=SerializedDataclass,
    )
    monkeypatch.setattr(process, "no_collections", Counting())
    adopt._handle_codec(codec)
    nested = [[1, [2]], [[3]], 4]
    assert codec.serialize_value(nested) == nested
    assert codec.deserialize_value([[[]], []]) == [[[]], []]
    assert len(entered) == 2
    assert gc.isenabled()


@pytest.mark.parametrize("shape", ["", {}, None, "12", [2.0], [-1]], ids=str)
def test_a_handle_whose_shape_is_none_is_left_to_areals_codec(shape: Any) -> None:
    handle = rtensor.RTensor(rtensor.TensorShardInfo("a", "b:1"), torch.empty(2, device="meta"))
    described: Any = rtensor.handle_to_json(handle)
    found = rtensor.handle_from_json(described)
    assert found is not None
    assert found.data.shape == (2,)
    described["data"]["data"]["shape"] = shape
    assert rtensor.handle_from_json(described) is None


def test_our_codec_writes_a_handle_as_field_by_field_and_makes_no_tensor_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (handle,) = rtensor.RTensor.remotize([torch.ones(2, 3, dtype=torch.float16)], "127.0.0.1:9")
    written = serialization.serialize_value([handle])
    assert "data" not in vars(handle)
    monkeypatch.setattr(serialization, "_writer_of_class", {})
    assert written == serialization.serialize_value([handle])


@pytest.mark.parametrize(
    ("owner", "meta", "words"),
    [
        ("h:1", torch.empty(2, dtype=torch.bits8, device="meta"), "tensors of torch.bits8 do not travel"),
        ("h:1", torch.empty([1] * 65, device="meta"), "tensors of rank 65 do not travel"),
        (Path("h"), torch.empty(2, device="meta"), "PosixPath does not travel"),
    ],
    ids=["dtype", "rank", "owner"],
)
def test_our_codec_refuses_a_handle_that_no_codec_reads(owner: Any, meta: torch.Tensor, words: str) -> None:
    handle = rtensor.RTensor(rtensor.TensorShardInfo("a", owner), meta)
    with pytest.raises(TypeError, match=words):
        serialization.serialize_value([handle])


@pytest.mark.parametrize("said", ["", "0", "no", "False", " off "])
def test_a_variable_that_says_no_leaves_areal_alone(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_CACHE_AREAL", said)
    assert not adopt.is_asked_for()
    adopt.start()
    assert not adopt.is_installed()
