"""Pages of the site that are written elsewhere: README, CONTRIBUTING, CHANGELOG, and the reference of docstrings.

A hook of MkDocs, named in mkdocs.yml.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
# Where each is on the site.
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_LINK = re.compile(r"\]\((?!\w+:|#)([^)#]+)(#[^)]*)?\)")
_MODULES = {
    "gpu_cache": "The cache",
    "gpu_cache.rpc.rtensor": "Handles",
    "gpu_cache.rpc.server.main": "The shard server",
    "gpu_cache.rpc.shard": "Errors of shards",
}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not in docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=_LINK.sub(_link, (ROOT / source).read_text())))
    files.append(File.generated(config, "reference.md", content=reference()))
    return files


def _link(found: re.Match[str]) -> str:
    """A link as the site has it: pages of docs/ lie beside the others; what is no page becomes its name."""
    target, anchor = found[1], found[2] or ""
    if target.startswith("docs/"):
        return f"]({target.removeprefix('docs/')}{anchor})"
    return f"]({PAGES[target]}{anchor})" if target in PAGES else "](index.md)"


def reference() -> str:
    """A page with the docstrings of all public names."""
    parts = ["# Reference\n\nEvery public name, with its docstring.\n"]
    for module, title in _MODULES.items():
        parts.append(f"\n## {title}: `{module}`\n")
        parts += [f"\n::: {module}.{name}\n" for name in _public(module)]
    return "".join(parts)


def _public(module: str) -> list[str]:
    """The names that a module offers: its `__all__`, else its public classes and functions."""
    path = ROOT / module.replace(".", "/")
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
