"""The architecture as a table: a file imports only from lower floors."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FLOORS = {
    "gpu_cache": [
        [
            "errors",
            "config",
            "stats",
            "freelist",
            "source",
            "lease",
            "entry",
            "throttle",
            "ranges",
            "bitwise",
            "hosts",
            "process",
        ],
        [
            "cudart",
            "tensor_reader",
            "hostmem",
            "reaper",
            "report",
            "units",
            "metered_reader",
            "inflight",
            "mutation",
            "victims",
            "parked_reader",
        ],
        ["cuda_events", "cuda_pools", "tally", "rate_window", "alarms", "report_files", "summary"],
        ["device", "ledger"],
        ["placement", "block", "completion", "fence", "staging", "host_arenas", "index_view"],
        ["slab_set", "runs", "suspects"],
        ["slab", "scoped_index"],
        ["claims", "comparison"],
        ["index"],
        ["room", "scope"],
        ["host_tier"],
        ["transfer"],
        ["engine", "reader_task"],
        ["fetch", "reporter", "checksum"],
        ["publish"],
        ["observed"],
        ["reclaiming"],
        ["cache"],
    ],
    "gpu_cache.smi": [
        ["figures", "graphs", "folder", "locks", "keyboard"],
        ["nvml", "timeline"],
        ["process"],
        ["sources"],
        ["node", "columns"],
        ["problems", "metrics", "query", "dmon", "leaks", "cleanup", "events", "recording", "view", "terminal"],
        ["boxes", "document", "history", "exposition"],
        ["frame", "options"],
        ["live"],
        ["commands"],
        ["main"],
        ["__main__"],
    ],
    "areal.infra.rpc": [
        [
            "serialization",
            "shard",
            "trimming",
            "turns",
            "tokens",
            "connections",
            "own_thread",
            "backends.deadline_socket",
            "backends.node_state",
        ],
        ["layout", "clearing", "backends.bounded_call", "backends.http_connection"],
        ["owned", "backends.base"],
        ["wire", "store", "backends.ray_backend", "backends.connection_pool"],
        ["backends.http_requester", "expiry", "answers"],
        ["backends.http_reader", "backends.http_deleter"],
        ["backends.http_backend"],
        ["runtime"],
        ["data_app", "views"],
        ["rpc_server", "rtensor"],
    ],
}
# What the stats tool reads of the cache; none of them imports torch.
OF_THE_TOOL = {"gpu_cache.config", "gpu_cache.hosts", "gpu_cache.report", "gpu_cache.stats", "gpu_cache.units"}
FLOOR_OF = {
    f"{package}.{name}": number
    for package, floors in FLOORS.items()
    for number, names in enumerate(floors)
    for name in names
}
MODULES = sorted(
    {path for package in FLOORS for path in (ROOT / package.replace(".", "/")).rglob("*.py") if path.stem != "__init__"}
)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def package_of(name: str) -> str:
    return max((package for package in FLOORS if name.startswith(f"{package}.")), key=len)


def imported_modules(path: Path) -> list[str]:
    """Project modules that a file imports, at any depth of the code."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names] + [node.module or ""]
    return [name for name in names if name in FLOOR_OF]


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_file_imports_only_from_lower_floors(path: Path) -> None:
    name = module_name(path)
    assert name in FLOOR_OF, f"enter {name} in the table"
    package = package_of(name)
    for imported in imported_modules(path):
        if package_of(imported) == package:
            assert FLOOR_OF[imported] < FLOOR_OF[name], f"{name} imports {imported}, which is not on a lower floor"
        elif "gpu_cache.smi" in (package, package_of(imported)):
            assert imported in OF_THE_TOOL, f"{name} imports {imported}"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_nothing_is_imported_inside_a_function(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]:
        assert not [node for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom)], function.name


def test_gpu_cache_has_never_heard_of_rtensor() -> None:
    for path in (ROOT / "gpu_cache").rglob("*.py"):
        assert not re.search(r"^\s*(import|from) (areal|http|aiohttp|ray)\b", path.read_text(), re.MULTILINE), path.name


def test_areal_uses_gpu_cache_through_its_public_names() -> None:
    public = re.compile(
        r"^(import gpu_cache|from gpu_cache(\.(errors|config|hosts|process|hostmem|lease))? import .*)$"
    )
    for path in (ROOT / "areal").rglob("*.py"):
        lines = [line for line in path.read_text().splitlines() if re.match(r"(import|from) gpu_cache", line)]
        assert all(public.match(line) for line in lines), f"{path.name}: {lines}"


def test_only_the_device_names_torch_cuda() -> None:
    for path in MODULES:
        named = re.search(r"torch\.cuda\b(?!`)", re.sub(r'"""(.|\n)*?"""|#.*', "", path.read_text()))
        assert named is None or path.name == "device.py", path.name


def test_the_table_names_only_files_that_exist() -> None:
    assert FLOOR_OF.keys() <= {module_name(path) for path in MODULES}
