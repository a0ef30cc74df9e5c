"""The C++ functions: built by a command, never required, refused where they cannot be trusted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpu_cache import native
from gpu_cache.index import lending
from gpu_cache.pool.lease import Catch

SAYS = "from gpu_cache.index import lending; print(lending.hits.__module__)"


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )


def test_without_a_library_python_serves(tmp_path: Path) -> None:
    done = run("-c", SAYS, GPU_CACHE_NATIVE="", GPU_CACHE_NATIVE_DIR=str(tmp_path))
    assert (done.stdout, done.stderr, done.returncode) == ("gpu_cache.index.lending\n", "", 0)


def test_a_missing_library_that_is_required_is_an_error_that_says_how_to_build_it(tmp_path: Path) -> None:
    done = run("-c", SAYS, GPU_CACHE_NATIVE="1", GPU_CACHE_NATIVE_DIR=str(tmp_path))
    assert done.returncode == 1
    assert "build it: python -m gpu_cache.native" in done.stderr
    assert str(tmp_path) in done.stderr


def test_a_broken_library_is_left_out_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_CACHE_NATIVE_DIR", str(tmp_path))
    native.library().write_bytes(b"no library")
    done = run("-c", SAYS, GPU_CACHE_NATIVE="", GPU_CACHE_NATIVE_DIR=str(tmp_path))
    assert (done.stdout, done.returncode) == ("gpu_cache.index.lending\n", 0)
    assert "blocks are built in Python" in done.stderr
    assert native.library().name in done.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_a_library_of_another_user_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_CACHE_NATIVE_DIR", str(tmp_path))
    native.library().touch()
    os.chown(native.library(), 12345, -1)
    done = run("-c", SAYS, GPU_CACHE_NATIVE="1", GPU_CACHE_NATIVE_DIR=str(tmp_path))
    assert f"{native.library()} belongs to user 12345" in done.stderr


def test_a_build_without_a_compiler_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    done = run(
        "-m", "gpu_cache.native", GPU_CACHE_NATIVE="0", GPU_CACHE_NATIVE_DIR=str(tmp_path), CXX="no-such-compiler"
    )
    assert done.returncode == 2
    assert "no-such-compiler" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_build_that_fails_shows_the_words_of_the_compiler_and_leaves_nothing(tmp_path: Path) -> None:
    compiler = f"{sys.executable} -c 'raise SystemExit(\"no such header\")'"
    done = run("-m", "gpu_cache.native", GPU_CACHE_NATIVE="0", GPU_CACHE_NATIVE_DIR=str(tmp_path), CXX=compiler)
    assert done.returncode == 1
    assert "no such header" in done.stderr
    assert list(tmp_path.iterdir()) == []


needs_library = pytest.mark.skipif(native.blocks is None, reason="not built: make native")


@needs_library
def test_the_library_serves_where_it_is_built() -> None:
    assert lending.hits is native.blocks.hits


@needs_library
@pytest.mark.parametrize(
    ("offset", "nbytes", "shape", "words"),
    [
        (-512, 8, (8,), "8 bytes at -512 are not in an arena of 64"),
        (60, 8, (8,), "8 bytes at 60 are not in an arena of 64"),
        (0, 8, (-8,), r"shape \(-8,\) has a negative length"),
        (0, 8, (9,), r"8 bytes are no Byte tensor of shape \(9,\)"),
        (0, 8, (2**61 + 1, 8), "bytes are no Byte tensor of shape"),
        (0, 8, ("8",), "cannot be interpreted as an integer|must be int|integer"),
    ],
)
def test_a_block_outside_of_the_arena_is_refused(offset: int, nbytes: int, shape: tuple[int, ...], words: str) -> None:
    arena = torch.zeros(64, dtype=torch.uint8)
    with pytest.raises((ValueError, TypeError), match=words):
        native.blocks.carve(arena.untyped_storage(), offset, nbytes, arena, shape, Catch.__init__)


@needs_library
def test_the_functions_refuse_what_they_do_not_take() -> None:
    for call in (native.blocks.carve, native.blocks.lend, native.blocks.hits, native.blocks.bind):
        with pytest.raises(TypeError):
            call(1)
    for call in (native.blocks.track, native.blocks.untrack):
        with pytest.raises(TypeError, match="takes a list"):
            call(1)
    with pytest.raises(TypeError, match="is no slot"):
        native.blocks.bind(type("Entry", (), {"copy": 1}), object, print)
