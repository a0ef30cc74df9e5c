"""The house: which folder may import which, what is imported when, and by whom."""

from __future__ import annotations

import ast
import graphlib
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gpu_cache"

# Each folder, or module of `gpu_cache` itself, imports from its own rank or a lower one.
RANKS = [
    {"config", "errors", "hosts", "native", "process", "source", "throttle", "units"},
    {"device"},
    {"report"},
    {"pool"},
    {"reaper", "index"},
    {"transfer"},
    {"cache"},
    {"rpc"},
    {"smi"},
]
RANKS_OF_RPC = [
    {"shard", "tokens"},
    {"wire", "segments"},
    {"store", "clearing", "trimming"},
    {"client"},
    {"runtime", "storing", "views"},
    {"rtensor"},
    {"server"},
    {"adopt", "node_cache"},
    {"doctor"},
]
# What the tool, which runs without torch, reads of the cache.
OF_THE_TOOL = {"config", "hosts", "units", "report.counters", "report.schema"}

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text())
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
}


def imported(tree: ast.AST) -> set[str]:
    """Modules of the project that a module imports, at any depth of the code."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return names & MODULES.keys()


IMPORTS = {name: imported(tree) for name, tree in MODULES.items()}


def rank_of(module: str, ranks: list[set[str]], depth: int) -> int:
    part = module.split(".")[depth]
    found = [number for number, names in enumerate(ranks) if part in names]
    assert found, f"enter {part}, of {module}, in the ranks"
    return found[0]


def climbing(ranks: list[set[str]], depth: int, of: str) -> list[str]:
    """Imports that point up."""
    return [
        f"{name} imports {other}"
        for name in MODULES
        for other in IMPORTS[name]
        if name.startswith(of) and other.startswith(of) and rank_of(other, ranks, depth) > rank_of(name, ranks, depth)
    ]


def test_imports_of_folders_point_down() -> None:
    assert not climbing(RANKS, 1, "gpu_cache.")


def test_imports_of_the_data_plane_point_down() -> None:
    assert not climbing(RANKS_OF_RPC, 2, "gpu_cache.rpc.")


def test_no_modules_import_each_other_in_a_circle() -> None:
    list(graphlib.TopologicalSorter(IMPORTS).static_order())


def test_the_cache_has_never_heard_of_handles() -> None:
    for path in PACKAGE.rglob("*.py"):
        if "rpc" not in path.parts:
            found = re.search(
                r"^\s*(import|from) (areal|gpu_cache\.rpc|http|aiohttp|ray)\b", path.read_text(), re.MULTILINE
            )
            assert not found, path.name


def test_the_tool_imports_only_modules_without_torch() -> None:
    allowed = {f"gpu_cache.{name}" for name in OF_THE_TOOL}
    for name in [name for name in MODULES if name.startswith("gpu_cache.smi.")]:
        assert {other for other in IMPORTS[name] if not other.startswith("gpu_cache.smi.")} <= allowed, name


def test_nothing_is_imported_inside_a_function() -> None:
    for name, tree in MODULES.items():
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        for function in functions:
            inside = [node for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom)]
            assert not inside, f"{name}.{function.name}"


def test_one_module_names_torchs_cuda() -> None:
    named = [
        name
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr == "cuda"
        and isinstance(node.value, ast.Name)
        and node.value.id == "torch"
    ]
    assert set(named) == {"gpu_cache.device.cuda"}
