"""What the wheel brings, how a process starts beside it, and what is left when pip takes it away."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import beside_venv

pytestmark = pytest.mark.areal


def start(python: Path, code: str, **variables: str) -> tuple[str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GPU_CACHE_", "PYTHON"))}
    done = subprocess.run(
        [python, "-c", code],
        capture_output=True,
        text=True,
        env=environment | variables,
        cwd="/",
        timeout=60,
        check=True,
    )
    return done.stdout, done.stderr


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*") if path.name != "__pycache__"}


def test_pip_brings_the_switch_and_takes_all_of_it_away(tmp_path: Path) -> None:
    venv.create(tmp_path)
    purelib, python = beside_venv._purelib(tmp_path), tmp_path / "bin" / "python"
    before, files_before = names_in(purelib), set(tmp_path.rglob("*"))
    assert beside_venv._install_wheel(tmp_path) == 0
    brought = names_in(purelib) - before
    assert {"gpu_cache", "gpu_cache_areal.pth"} < brought
    assert len(brought) == 3, "and its metadata: no package areal"
    look = "import sys; print('gpu_cache' in sys.modules, 'gpu_cache.rpc.adopt' in sys.modules, 'torch' in sys.modules)"
    assert start(python, look) == ("False False False\n", "")
    assert start(python, look, GPU_CACHE_AREAL="0") == ("False False False\n", "")
    assert start(python, look, GPU_CACHE_AREAL="1") == ("True True False\n", "")
    code = "import gpu_cache; gpu_cache.adopt()"
    assert start(python, code) == ("", "GPU_CACHE_AREAL is set, but AReaL is not installed here\n")
    command = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "uninstall", "-qy"]
    subprocess.run([*command, "rtensor-data-plane"], check=True, timeout=60, capture_output=True)
    assert set(tmp_path.rglob("*")) <= files_before, "no file, no folder, no script"


def test_the_switch_reaches_processes_that_python_starts(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(
        "import multiprocessing, sys\n"
        "def look(): return 'gpu_cache.rpc.adopt' in sys.modules\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool: print(look(), pool.apply(look))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(script)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment | {"GPU_CACHE_AREAL": "1"}, cwd=tmp_path, check=True
    )
    assert done.stdout == "True True\n"
    assert Path(sysconfig.get_path("purelib"), "gpu_cache_areal.pth").exists()
