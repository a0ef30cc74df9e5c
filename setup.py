"""Puts `gpu_cache_areal.pth` beside the packages of the wheel, and makes a long description of README.md.

A release sets PROJECT_URL, the address of the repository: links and pictures of README.md are absolute with it. Without
it nothing tells where the pages are, and their names stay as words. Everything else is in pyproject.toml.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PTH = "gpu_cache_areal.pth"
HOME = os.environ.get("PROJECT_URL", "").rstrip("/")
# [words](target) and ![words](target), without those that are absolute or within the page.
_RELATIVE = re.compile(r"(?P<mark>!?)\[(?P<words>[^\]]*)\]\((?!https?:|mailto:|#)(?P<target>[^)\s]+)\)")


class BuildPy(build_py):
    """Lists the `.pth` file among its outputs, so that pip removes it again."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self.copy_file(PTH, str(Path(self.build_lib, PTH)))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs: list[str] = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else [*outputs, str(Path(self.build_lib, PTH))]


def long_description(text: str, version: str, home: str) -> str:
    """Markdown that an index can show: every link absolute, or none."""

    def absolute(found: re.Match[str]) -> str:
        mark, words, target = found.group("mark", "words", "target")
        if not home:
            return "" if mark else words
        return f"{mark}[{words}]({home}/{'raw' if mark else 'blob'}/v{version}/{target})"

    return _RELATIVE.sub(absolute, text)


def _version() -> str:
    found = re.search(r'^__version__ = "(.+)"$', Path("gpu_cache", "__init__.py").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def _urls(home: str) -> dict[str, str]:
    pages = {
        "Homepage": "",
        "Documentation": "/tree/main/docs",
        "Changelog": "/blob/main/CHANGELOG.md",
        "Issues": "/issues",
    }
    return {name: home + page for name, page in pages.items()} if home else {}


setup(
    version=_version(),
    long_description=long_description(Path("README.md").read_text(), _version(), HOME),
    long_description_content_type="text/markdown",
    project_urls=_urls(HOME),
    cmdclass={"build_py": BuildPy},
)
