"""Make a virtual environment beside the packages of the interpreter that runs this: `beside_venv.py KIND`.

`areal`, for `make areal`, has AReaL and this project's wheel, which is built each time. `ray`, for `make ray`, has the
Ray of RAY_VERSION. `lowest`, for `make lowest`, has the oldest releases that pyproject.toml allows, but for torch. What
comes from the package index is installed once, until the requirements change. Exit 3: the index cannot be reached.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
REQUIREMENTS = ROOT / "tests" / "beside_areal" / "requirements.txt"
CONSTRAINTS = ROOT / "constraints.txt"
AREAL = "areal==1.0.4"
RAY = f"ray=={os.environ.get('RAY_VERSION', '2.60.0')}"
UNREACHABLE = 3
# pip says this where it has found no index, or nothing in it.
_NOTHING_FOUND = "(from versions: none)"
_WHEEL_OF = ("gpu_cache", "pyproject.toml", "setup.py", "MANIFEST.in", "gpu_cache_areal.pth", "README.md", "LICENSE")
_LEAST_SETUPTOOLS = 77
# Of Ray, the libraries that no test uses.
_NOT_COMPILED = r"/ray/(rllib|data|train|tune|serve|llm|air|thirdparty_files)/"


def main(kind: str) -> int:
    folder = ROOT / f".venv-{kind}"
    ready, key = folder / ".ready", _key(kind)
    if not ready.exists() or ready.read_text() != key:
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder)
        purelib = _purelib(folder)
        (purelib / "over.pth").write_text(sysconfig.get_path("purelib") + "\n")
        if failure := _INSTALLS[kind](folder):
            return failure
        ready.write_text(key)
    return _install_wheel(folder) if kind == "areal" else 0


def _key(kind: str) -> str:
    wanted = {"areal": f"{AREAL}\n{REQUIREMENTS.read_text()}", "ray": RAY, "lowest": " ".join(_lowest())}[kind]
    return hashlib.sha256(f"{sys.version} {sysconfig.get_path('purelib')}\n{wanted}".encode()).hexdigest()


def _purelib(folder: Path) -> Path:
    return Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))


def _install_areal(folder: Path) -> int:
    # Not with what it requires: that is torch of another version, and much that only engines need.
    if failure := _install(folder, AREAL, "--no-deps") or _install(folder, "-r", str(REQUIREMENTS)):
        return failure
    # Importing it compiles what it needs of hundreds of MB; each process would do so where bytecode is not written.
    written = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    code = "import areal.infra.rpc.rpc_server, areal.infra.rpc.guard.engine_blueprint"
    return subprocess.run([folder / "bin" / "python", "-c", code], cwd=folder, env=written, check=False).returncode


def _install_ray(folder: Path) -> int:
    if failure := _install(folder, RAY, "-c", str(CONSTRAINTS)):
        return failure
    # Each of its processes imports hundreds of modules; where bytecode is not written they would not start in time.
    command = [folder / "bin" / "python", "-m", "compileall", "-q", "-j", "0", "-x", _NOT_COMPILED, _purelib(folder)]
    subprocess.run(command, capture_output=True, check=False)
    return 0


def _install_lowest(folder: Path) -> int:
    return _install(folder, *_lowest())


def _lowest() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["smi"]]
    return [one.replace(">=", "==") for one in declared if not one.startswith("torch")]


_INSTALLS = {"areal": _install_areal, "ray": _install_ray, "lowest": _install_lowest}


def _install(folder: Path, *arguments: str) -> int:
    done = _pip(folder, "--retries", "1", *arguments)
    if done.returncode and _NOTHING_FOUND in done.stderr and arguments[0] != "-r":  # these come from there, too
        said = next((line for line in done.stderr.splitlines() if "onnection" in line), "it has nothing there")
        print(f"SKIPPED: the package index that has {arguments[0]} cannot be reached: {said.strip()}")
        return UNREACHABLE
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return 1
    return 0


def _pip(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install"]
    options = ["--quiet", "--disable-pip-version-check", "--no-compile"]
    return subprocess.run([*command, *options, *arguments], capture_output=True, text=True, check=False)


def _install_wheel(folder: Path) -> int:
    """Build in a copy, in which no earlier build is, and install."""
    with tempfile.TemporaryDirectory() as copy:
        for name in _WHEEL_OF:
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, Path(copy, name))
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
        isolation = ["--no-build-isolation"] if _has_setuptools() else []
        done = subprocess.run([*command, *isolation, "-w", copy, copy], capture_output=True, text=True, check=False)
        if not done.returncode:
            (wheel,) = Path(copy).glob("*.whl")
            done = _pip(folder, "--no-deps", "--no-index", "--force-reinstall", str(wheel))
    if done.returncode:
        print(done.stderr, file=sys.stderr)
    return done.returncode


def _has_setuptools() -> bool:
    try:
        return int(importlib.metadata.version("setuptools").partition(".")[0]) >= _LEAST_SETUPTOOLS
    except importlib.metadata.PackageNotFoundError:
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
