"""The source distribution, the wheel, and the tool's own distribution: what is in them, and that it works."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

import gpu_cache
from tests import test_readme
from tests.support import smi_recording

ROOT = Path(__file__).resolve().parents[2]
HOME = "https://example.org/owner/project"
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv*", "build", "dist", "site", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"
)
LIBRARIES = ("rich", "pygments", "markdown_it", "mdurl", "pynvml.py", "prometheus_client")  # textual: --watch alone

setuptools = pytest.importorskip("setuptools", "77", reason="builds without an index need setuptools 77 here")
pytestmark = pytest.mark.scripts


def build(what: str, tree: Path, into: Path) -> Path:
    """Build as pip does, without isolation; the build must not see this checkout's packages."""
    code = f"import setuptools.build_meta as backend; print(backend.build_{what}({str(into)!r}))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree,
        env=environment | {"PROJECT_URL": HOME},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return into / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree unpacked from the source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "tree", ignore=LEFT_OUT)
    with tarfile.open(build("sdist", folder / "tree", folder)) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"rtensor_data_plane-{gpu_cache.__version__}"


@pytest.fixture(scope="module")
def tool(tmp_path_factory: pytest.TempPathFactory, unpacked: Path) -> Path:
    """The tool's wheel."""
    return build("wheel", unpacked / "packaging" / "smi", tmp_path_factory.mktemp("tool"))


def files_of(tree: Path, *folders: str) -> set[str]:
    found = (path for folder in folders for path in (tree / folder).rglob("*"))
    return {str(path.relative_to(tree)) for path in found if path.is_file() and "__pycache__" not in path.parts}


def bare_venv(folder: Path) -> Path:
    """Its Python; it sees none of the packages of the one that runs this."""
    venv.create(folder)
    return folder / "bin" / "python"


def run(*command: object, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GPU_CACHE_", "PYTHON"))}
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        cwd="/",
        env=kept | variables,
        timeout=60,
        check=False,
    )


def install(python: Path, what: Path | str, *options: str) -> None:
    done = run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-index", *options, what)
    assert done.returncode == 0, done.stderr


def test_the_source_distribution_is_whole_and_its_tests_run(unpacked: Path) -> None:
    folders = ("tests", "scripts", "docs", "dashboards", "packaging", "gpu_cache", "areal", ".ci")
    ours = {name for name in files_of(ROOT, *folders) if "/build/" not in name and ".egg-info" not in name}
    assert not ours - files_of(unpacked, *folders)
    names = (
        "Makefile",
        "mkdocs.yml",
        "constraints.txt",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "LICENSE",
        "gpu_cache_areal.pth",
    )
    assert all((unpacked / name).is_file() for name in names)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/smi/test_smi_units.py"]
    done = subprocess.run(command, cwd=unpacked, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout


def test_the_wheel_has_the_package_and_an_index_can_show_it(unpacked: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(build("wheel", unpacked, tmp_path)) as wheel:
        names = set(wheel.namelist())
        tops = {name.partition("/")[0] for name in names}
        about = HeaderParser().parsestr(
            wheel.read(next(n for n in wheel.namelist() if n.endswith("/METADATA"))).decode()
        )
    info = f"rtensor_data_plane-{gpu_cache.__version__}.dist-info"
    assert tops == {"gpu_cache", "gpu_cache_areal.pth", info}, "no areal, no tests"
    library = files_of(ROOT, "gpu_cache/smi/uplot")
    assert len(library) == 4
    assert library | {f"{info}/licenses/gpu_cache/smi/uplot/LICENSE"} <= names
    assert (about["Version"], about["Description-Content-Type"]) == (gpu_cache.__version__, "text/markdown")
    assert f"Homepage, {HOME}" in about.get_all("Project-URL", [])
    text = about.get_payload()
    assert isinstance(text, str)
    assert text.startswith("# RTensor data plane")
    assert "](docs/" not in text
    assert f"({HOME}/blob/v{gpu_cache.__version__}/docs/areal.md)" in text
    assert f"({HOME}/raw/v{gpu_cache.__version__}/docs/screens/" in text


def test_a_stranger_with_the_wheel_and_its_extra_runs_what_the_pages_show(unpacked: Path, tmp_path: Path) -> None:
    python = bare_venv(tmp_path / "venv")
    purelib = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")}))
    (purelib / "over.pth").write_text(sysconfig.get_path("purelib") + "\n")  # torch and the other packages
    install(python, build("wheel", unpacked, tmp_path), "--force-reinstall", "--no-deps")
    install(python, "rtensor-data-plane[smi]")  # the extra asks for nothing that is not there
    where = run(python, "-c", "import gpu_cache; print(gpu_cache.__file__)").stdout
    assert where.startswith(str(purelib))
    variables = {"GPU_CACHE_STATS_DIR": str(tmp_path), "PATH": f"{python.parent}:{os.environ['PATH']}"}
    for script, output in test_readme.SCRIPTS:
        (tmp_path / "script.py").write_text(script)
        done = run(python, "-W", "error", tmp_path / "script.py", **variables)
        assert (done.returncode, done.stderr) == (0, ""), script
        assert done.stdout == output or output is None
    commands = [command for command, _ in test_readme.COMMANDS if "gpu_cache" in command or "gpu-cache" in command]
    assert commands
    for command in commands:
        done = run("bash", "-c", command, **variables)
        assert (done.returncode, done.stderr) == (0, ""), command


def test_the_tool_runs_in_an_environment_without_torch(tool: Path, tmp_path: Path) -> None:
    python = bare_venv(tmp_path / "node")
    install(python, tool, "--no-deps")
    here = Path(next(iter(__import__("rich").__path__))).parent
    script = python.parent / "gpu-cache-smi"
    reports = tmp_path / "reports"
    reports.mkdir(mode=0o700)
    assert "pip install" in run(script, "--json", "--dir", reports).stderr + run(script, "--dir", reports).stderr
    libraries = tmp_path / "libraries"
    libraries.mkdir()
    for name in LIBRARIES:
        (libraries / name).symlink_to(here / name)
    known = run(python, "-c", "import torch, numpy, aiohttp", PYTHONPATH=str(libraries))
    assert "No module named 'torch'" in known.stderr
    seen = {
        option: run(script, *option, "--dir", reports, PYTHONPATH=str(libraries))
        for option in ((), ("--json",), ("--prom",), ("--check",))
    }
    assert {option: done.returncode for option, done in seen.items()} == dict.fromkeys(seen, 0), seen
    assert json.loads(seen["--json",].stdout)["processes"] == []
    assert gpu_cache.__version__ in run(python, "-m", "gpu_cache_smi", "--version", PYTHONPATH=str(libraries)).stdout
    (tmp_path / "run").write_text(smi_recording.as_text(smi_recording.samples(3, is_leaking=False)))
    drawn = run(script, "--timeline", tmp_path / "run", PYTHONPATH=str(libraries))
    assert drawn.returncode == 0, drawn.stderr
    assert "uPlot" in (tmp_path / "run.html").read_text()


def test_both_distributions_in_one_environment_share_the_script_alone(
    tool: Path, unpacked: Path, tmp_path: Path
) -> None:
    python = bare_venv(tmp_path / "both")
    install(python, build("wheel", unpacked, tmp_path), "--no-deps")
    before = files_of(tmp_path / "both", "lib")
    install(python, tool, "--no-deps")
    added = files_of(tmp_path / "both", "lib") - before
    assert {Path(name).parts[3].partition("-")[0] for name in added} == {"gpu_cache_smi"}
    run(sys.executable, "-m", "pip", "--python", python, "uninstall", "-qy", "gpu-cache-smi")
    assert files_of(tmp_path / "both", "lib") == before
