"""The program: one at a path, its options, its end."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gpu_cache.rpc import node_cache as module
from gpu_cache.rpc.client.http import HttpRTensorBackend
from gpu_cache.rpc.node_cache import Running
from gpu_cache.rpc.segments import node_cache_path


def test_there_is_one_at_a_path(path: Path, running: Running) -> None:
    with pytest.raises(BlockingIOError):
        Running(path, 1 << 20)
    assert os.path.realpath(path) == running.server.path


def test_it_leaves_no_link_behind(path: Path) -> None:
    with Running(path, 1 << 20) as running:
        socket_path = running.server.path
        assert path.is_symlink()
    assert not path.is_symlink()
    assert not os.path.exists(socket_path)
    assert running._lock == -1, "a forked child would close a later file of that number"
    running.stop()


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda path: path.symlink_to(path.parent)])
def test_what_else_is_at_its_path_stays_there(path: Path, make: Callable[[Path], None]) -> None:
    make(path)
    with pytest.raises(FileExistsError, match="no link of a node cache"):
        Running(path, 1 << 20)
    assert sorted(one.name for one in path.parent.iterdir()) == ["node-cache", "node-cache.lock"]


def test_a_link_of_one_that_was_killed_is_replaced(path: Path) -> None:
    with Running(path, 1 << 20) as running:
        left = os.readlink(path)
    path.symlink_to(left)
    with Running(path, 1 << 20) as running:
        assert os.path.realpath(path) == running.server.path


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to(path.parent)])
def test_what_has_come_to_its_path_meanwhile_stays_there(path: Path, make: Callable[[Path], None]) -> None:
    with Running(path, 1 << 20):
        path.unlink()
        make(path)
    assert os.path.lexists(path)


def test_a_link_that_is_removed_comes_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def wait(*_: object) -> list[list[object]]:
        found.append(path.is_symlink())
        path.unlink(missing_ok=True)
        return [[module] if len(found) == 3 else []]

    monkeypatch.setattr(module, "readable_on", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(module.select, "select", wait)
    assert module.main(["--path", str(path), "--max-bytes", "1MiB"]) == 0
    assert found == [True] * 3


def test_the_program_says_what_it_cannot_use(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "readable_on", lambda *_: contextlib.nullcontext())
    for arguments, said in (
        (["--path", str(path), "--max-bytes", "1"], "max_bytes=1: must be at least 512"),
        (["--max-bytes", "lots"], "--max-bytes: 'lots' is not a size; write bytes"),
        (["--idle-timeout", "soon"], "--idle-timeout: 'soon' is not a time above 0"),
        (["--path", ""], "name a path by --path"),
        (["--path", str(path / "missing" / "x")], "No such file or directory"),
    ):
        with pytest.raises(SystemExit) as caught:
            module.main(arguments)
        assert caught.value.code == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("said", ["", "0", "no", "False"])
def test_it_is_off_by_default(said: str) -> None:
    assert node_cache_path({"GPU_CACHE_NODE_CACHE": said}) == node_cache_path({}) == ""


@pytest.mark.parametrize("said", ["1", "yes", "atuo"])
def test_a_word_is_no_path(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_CACHE_NODE_CACHE", said)
    with pytest.raises(ValueError, match=f"GPU_CACHE_NODE_CACHE='{said}': must be auto, a path with a slash in it, or"):
        HttpRTensorBackend()


def test_a_variable_says_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as base:
        usual = node_cache_path({"GPU_CACHE_NODE_CACHE": "auto", "XDG_RUNTIME_DIR": base})
        assert usual == f"{base}/gpu-cache-memory-{os.geteuid()}/node-cache"
    assert node_cache_path({"GPU_CACHE_NODE_CACHE": "/run/mine"}) == "/run/mine"
    monkeypatch.setenv("GPU_CACHE_SHM", "0")
    monkeypatch.setenv("GPU_CACHE_NODE_CACHE", "/run/mine")
    with contextlib.closing(HttpRTensorBackend()) as backend:
        assert backend.memories is None


def test_it_ends_when_it_has_been_idle(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "readable_on", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(module.select, "select", lambda *_: (time.sleep(0.01), [[]])[1])
    assert module.main(["--path", str(path), "--idle-timeout", "0.05", "--max-bytes", "1MiB"]) == 0
