"""Copies what `gpu_cache.smi` needs of this tree into the wheel, beneath a folder that no other project has."""

from __future__ import annotations

import os
import re
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parents[2]
# No more: none of these imports torch.
TAKEN = (
    "__init__.py", "config.py", "hosts.py", "units.py", "report/__init__.py", "report/counters.py", "report/schema.py",
    "rpc/__init__.py", "rpc/adopt.py", "smi/*.py", "smi/*.html", "smi/uplot/*",
)  # fmt: skip
INSIDE = Path("gpu_cache_smi", "bundled", "gpu_cache")


class BuildPy(build_py):
    """Brings the copies, and lists them among its outputs, so that pip removes them again."""

    def run(self) -> None:
        super().run()
        for source, target in self._copies():
            self.mkpath(str(target.parent))
            self.copy_file(str(source), str(target))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs: list[str] = super().get_outputs(include_bytecode)
        return [*outputs, *(str(target) for _, target in self._copies())]

    def _copies(self) -> list[tuple[Path, Path]]:
        package = ROOT / "gpu_cache"
        sources = [path for pattern in TAKEN for path in sorted(package.glob(pattern))]
        return [(path, Path(self.build_lib, INSIDE, path.relative_to(package))) for path in sources]


def _version() -> str:
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "gpu_cache" / "__init__.py").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


HOME = os.environ.get("PROJECT_URL", "").rstrip("/")

setup(version=_version(), project_urls={"Homepage": HOME} if HOME else {}, cmdclass={"build_py": BuildPy})
